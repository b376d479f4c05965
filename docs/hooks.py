"""What `mkdocs build` needs beside the pages: what they show from elsewhere, and the API reference.

Pages link to files of the repository as GitHub shows them (`../recipes/results/demo.png`). The
site holds the files that are linked, below the same names, and links are turned to them. The pages
of the reference are written here from the `__all__` of the modules, so that none can be forgotten:
a name that nothing renders is a link without a target, which `strict` refuses.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # pages of the site that lie elsewhere
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "examples/launch/README.md": "examples/launch/README.md",
    "recipes/results/demo_cpu_5_seeds.md": "recipes/results/demo_cpu_5_seeds.md",
    "recipes/results/demo_grpo_cpu_5_seeds.md": "recipes/results/demo_grpo_cpu_5_seeds.md",
}
HOSTS = ("hf", "grpo", "dpo", "lightning", "loop")
REFERENCE = {  # a page of the reference, and its modules; those inside of a package follow it
    "Contract": ("", "types", "selector", "combine", "quotas", "weights"),
    "Hosts": tuple(f"callbacks.{host}" for host in HOSTS),
    "Strategies": ("strategies",),
    "GRPO and DPO": ("rl",),
    "Domains": ("mixing",),
    "Kernels": ("kernels",),
    "Scoring": ("scoring",),
    "Data": ("data",),
    "Steps and ranks": ("step", "parallel", "ledger"),
    "Records and reports": ("report",),
    "Command line": ("cli",),
}
LINK = re.compile(r"(\]\()((?!https?:|#|mailto:)[^)\s#]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)\s*$)", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put the pages of the reference where the navigation has a place for them."""
    pages = [{name: page_of(name)} for name in REFERENCE]
    config.nav = [
        {key: pages if value == "REFERENCE" else value}
        for entry in config.nav
        for key, value in entry.items()
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of `docs/`, and the reference."""
    for source, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for file in list(files):
        if file.src_uri.endswith(".md"):
            for link in LINK.findall(FENCED.sub("", file.content_string)):
                add_linked(file.src_uri, link[1], files, config)
    for page, content in reference().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository to links between pages of the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(here)

    def turned(match: re.Match[str]) -> str:
        uri = uri_of(repository_path(here, match[2]))
        return match[1] + posixpath.relpath(uri, folder or ".") + match[3]

    parts = FENCED.split(markdown)
    return "".join(p if i % 2 else LINK.sub(turned, p) for i, p in enumerate(parts))


def add_linked(uri: str, link: str, files: Any, config: Any) -> None:
    """Add a file of the repository that a page links to and the site does not have."""
    path = repository_path(uri, link)
    target = uri_of(path)
    if files.get_file_from_path(target) is None and (ROOT / path).is_file():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))


def repository_path(uri: str, link: str) -> str:
    """Return the path in the repository of what the page at a place of the site links to."""
    outside = {place: source for source, place in OUTSIDE.items()}
    source = outside.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def uri_of(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    return OUTSIDE.get(path, path.removeprefix("docs/"))


# The reference ------------------------------------------------------------------------------


def page_of(name: str) -> str:
    """Return the place of a page of the reference."""
    return f"reference/{name.lower().replace(' ', '_')}.md"


def reference() -> dict[str, str]:
    """Return the pages of the reference."""
    os.environ.setdefault("GRIFFE_LOG_LEVEL", "ERROR")
    package = griffe.load("onlinesel", search_paths=[str(ROOT)], resolve_aliases=True)
    modules = {name: tuple(modules_of(package, roots)) for name, roots in REFERENCE.items()}
    rendered = {module.path for members in modules.values() for module in members}
    return {
        page_of(name): f"# {name}\n\n" + "\n".join(section(m, rendered) for m in members)
        for name, members in modules.items()
    }


def modules_of(package: Any, roots: tuple[str, ...]) -> Any:
    """Yield modules, each with the public ones inside of it; of the door and hosts no others."""
    for root in roots:
        module = package[root] if root else package
        yield module
        if root and not root.startswith("callbacks."):
            yield from inside(module)


def inside(module: Any) -> Any:
    """Yield the public modules inside of a package."""
    for name, inner in sorted(module.modules.items()):
        if not name.startswith("_") and not inner.is_alias:
            yield inner
            yield from inside(inner)


def section(module: Any, rendered: set[str]) -> str:
    """Return a module's part of its page: docstring, links to what is elsewhere, its own names."""
    own, linked = [], []
    for name in sorted(map(str, module.exports or ()), key=str.lower):
        home = module[name].canonical_path
        elsewhere = home.rpartition(".")[0]
        (linked if elsewhere in rendered - {module.path} else own).append((name, home))
    lines = [f"::: {module.path}", "    options:", "      members: []", ""]
    if linked:
        lines += ["Names: " + ", ".join(f"[`{n}`][{home}]" for n, home in linked) + ".", ""]
    for name, _ in own:
        lines += [f"::: {module.path}.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)
