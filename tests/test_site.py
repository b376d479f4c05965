"""The site: built strictly, without network, and with every public name in its reference."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("onlinesel.bench", "onlinesel.recipes")  # run, not imported: no reference
NEEDED = "mkdocs-material and mkdocstrings are not installed: pip install onlinesel[docs]"
RESOURCE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?:[^\"\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=NEEDED)
    folder = tmp_path_factory.mktemp("site")
    proxy = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, **proxy, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INFO" in done.stderr  # with fewer words, warnings would not be counted
    return folder


def public_names() -> list[str]:
    """Return all names in an `__all__` of a module whose path has no underscore."""
    found = []
    folders = {"onlinesel": "onlinesel", "callbacks": "onlinesel.callbacks"}
    for folder, package in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join([package, *(part for part in parts if part != "__init__")])
            if folder == "callbacks" and path.name != "__init__.py":
                continue  # the rooms of a host; its package has what is public
            if any(part.startswith("_") for part in module.split(".")):
                continue
            if not module.startswith(COMMANDS):
                found += [f"{module}.{name}" for name in listed(path)]
    return found


def listed(path: Path) -> list[str]:
    """Return the names in a file's `__all__`."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    rendered = {line.split(" ")[0] for line in inventory.splitlines()}
    names = public_names()
    assert len(names) > 150
    assert {"onlinesel.steps", "onlinesel.callbacks.hf.OnlineSelection"} <= set(names)
    assert [name for name in names if name not in rendered] == []


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    found = {url for page in pages for url in RESOURCE.findall(page.read_text("utf-8"))}
    assert len(pages) > 30 and found == set()


def test_pages_show_what_lies_outside_of_docs(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    figure = re.search(r'src="?([^"\s>]+demo_grpo_mixed_5_seeds\.png)', home)
    assert figure and (site / figure[1]).read_bytes()[:4] == b"\x89PNG"
    link = re.search(r'href="?([^"\s>]*choosing/)', home)
    assert link and (site / link[1] / "index.html").is_file()
    changes = (site / "CHANGELOG/index.html").read_text("utf-8")
    assert re.search(r'href="?\.\./gpu/', changes)


def test_docstrings_show_no_roles(site: Path) -> None:
    page = (site / "reference/strategies/index.html").read_text("utf-8")
    assert "onlinesel.strategies.uds.UDS" in page
    assert re.findall(r":(?:class|func|meth|mod|attr|data):", page) == []
