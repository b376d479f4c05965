"""The documentation is run: every doctest, every block of a page; what tables say is checked."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from onlinesel import rl, strategies

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = {"README.md": README, **{f"docs/{p.name}": p for p in sorted(ROOT.glob("docs/*.md"))}}
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OTHER_PYTHON = {"py", "python3", "py3", "pycon", "ipython"}  # would slip past the tests


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return line number and code of every python block; refuse one that asks not to be run."""
    blocks: list[tuple[int, str]] = []
    opened: re.Match[str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if opened is None and match:
            opened, start, code = match, number, []
            words = match["info"].split()
            if words and (words[0] in OTHER_PYTHON or (words[0] == "python" and len(words) > 1)):
                raise ValueError(
                    f"line {number}: fence must be exactly python, got {match['info']!r}"
                )
        elif (
            opened
            and match
            and match["ticks"].startswith(opened["ticks"])
            and not match["info"].strip()
        ):
            if opened["info"].strip() == "python":
                blocks.append((start, "\n".join(code) + "\n"))
            opened = None
        elif opened:
            code.append(line.removeprefix(opened["indent"]))
    if opened:
        raise ValueError(f"line {start}: fence is never closed")
    return blocks


def methods_in_table(text: str, heading: str = "Methods") -> list[str]:
    """Return the names in the first column of the table below a heading."""
    start = rf"^## {re.escape(heading)}\b[^\n]*$(.*?)(?=^## |\Z)"
    section = re.search(start, text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| *`(\w+)` *\|", section[1], re.MULTILINE) if section else []


def module_names() -> list[str]:
    found = (ROOT / "onlinesel").rglob("*.py")
    paths = [p for p in found if p.stem != "__main__" and "_moved" not in p.parts]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return sorted(".".join(part for part in names if part != "__init__") for names in parts)


@pytest.mark.parametrize("name", module_names())
def test_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        pytest.skip("needs triton")
    assert doctest.testmod(module).failed == 0


def blocks_of_pages() -> list[Any]:
    """Return page, line and code of every block, with a name that finds it."""
    return [
        pytest.param(path, line, code, id=f"{name}:{line}")
        for name, path in PAGES.items()
        for line, code in python_blocks(path.read_text("utf-8"))
    ]


def masked(line: str) -> str:
    """Return a line of output without what depends on the machine's speed."""
    line = re.sub(r"('selection/score_share': )'[^']*'", r"\1'...'", line)
    before, took, after = line.partition("choosing took")
    return before + took + re.sub(r"\d+(\.\d+)?", "...", after)


@pytest.mark.parametrize(("path", "line", "code"), blocks_of_pages())
def test_block(
    path: Path,
    line: int,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It runs, and prints what the page says behind it."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "onlinesel")
    # Blank lines in front make a traceback point into the page.
    exec(compile("\n" * line + code, str(path), "exec"), {"__name__": "__main__"})
    behind = "\n".join(path.read_text("utf-8").splitlines()[line + code.count("\n") + 1 :])
    said = re.match(r"\s*```text\n(.*?)```", behind, re.DOTALL)
    written = [*caplog.messages, *re.split(r"[\r\n]+", "".join(capfd.readouterr()))]
    expected = {masked(out) for out in said[1].splitlines()} if said else set()
    assert expected - {masked(out) for out in written} == set()


def test_the_readme_is_a_front_door() -> None:
    """Short, with a block that runs and says what it prints; the rest is on the pages."""
    text = README.read_text("utf-8")
    assert len(python_blocks(text)) == 1 and text.count("```text") == 1
    assert len(text.split()) < 1400
    named = {f"docs/{page}" for page in re.findall(r"\]\(docs/([\w.]+)", text)}
    assert named == set(PAGES) - {"README.md"}


def test_every_method_is_listed() -> None:
    methods = methods_in_table(PAGES["docs/choosing.md"].read_text("utf-8"), "The methods")
    assert sorted(methods) == sorted(strategies.__all__)
    contract = {
        "Advantages", "PreferenceTerms", "PreferenceTokens", "PreferenceWeights", "PromptPool",
        "PromptSampler", "Rollouts", "TokenSignals", "TokenTerms", "TokenWeights",
    }  # fmt: skip
    parts = methods_in_table(PAGES["docs/grpo.md"].read_text("utf-8"), "Parts")
    assert sorted(parts) == sorted(set(rl.__all__) - contract)


@pytest.mark.parametrize("name", ["README.md", "docs/choosing.md", "docs/grpo_tuning.md"])
def test_a_measured_interval_has_its_source(name: str) -> None:
    """Every mean and interval stands in a committed table of the five seeds."""
    found = "".join(p.read_text("utf-8") for p in (ROOT / "recipes/results").glob("*seeds.md"))
    found = found.replace("0.60 ± 0.39 of uniform", "60 ± 39 % of uniform")
    said = set(re.findall(r"[−+]?[\d.]+ ± [\d.]+", PAGES[name].read_text("utf-8")))
    assert len(said) > 5 and {interval for interval in said if interval not in found} == set()


def test_the_tests_in_the_table_of_engines_exist() -> None:
    text = (ROOT / "docs/engines.md").read_text("utf-8")
    named = dict(re.findall(r"\b([A-Z]\d+)\s+`(test_\w+::test_\w+)`", text))
    used = {
        cell
        for line in text.splitlines()
        if line.startswith("|")
        for cell in re.findall(r"\b[A-Z]\d+\b", line)
    }
    assert len(named) > 25 and used == set(named)
    for test in named.values():
        file, name = test.split("::")
        source = (ROOT / f"tests/callbacks/{file}.py").read_text("utf-8")
        assert f"def {name}(" in source, test


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    path = PAGES[name]
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text))
    assert {link for link in links if not (path.parent / link).exists()} == set()
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in HEADING.findall(text)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_blocks_are_found_wherever_they_stand() -> None:
    text = (
        "```python\na = 1\n```\n~~~~sh\n```python\n~~~~\n1. item\n   ```python\n   if a:\n"
        "       b = 2\n   ```\n````text\n```\n````\n"
    )
    assert python_blocks(text) == [(1, "a = 1\n"), (8, "if a:\n    b = 2\n")]


@pytest.mark.parametrize(
    "text", ["```python notest\n```", "```py\n```", "~~~python3\n~~~", "```python\n"]
)
def test_a_block_cannot_ask_not_to_be_run(text: str) -> None:
    with pytest.raises(ValueError, match="line 1: fence"):
        python_blocks(text)


def test_the_table_is_read_below_its_heading_only() -> None:
    row = "| Method | Cost |\n|---|---|\n"
    text = f"## Before\n{row}| `A` | 0 |\n\n## Methods\nText `B`.\n\n{row}| `C` | 1 |\n|`D`|`E`|\n"
    assert methods_in_table(text + f"\n## After\n{row}| `F` | 2 |\n") == ["C", "D"]
    assert methods_in_table("no table") == []
