"""The documentation is run: every doctest, every README block, and the table of methods checked."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from onlinesel import rl, strategies

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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


@pytest.mark.parametrize(
    ("line", "code"), python_blocks(README.read_text("utf-8")) if README.exists() else []
)
def test_readme_block(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Blank lines in front make a traceback point into the README.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "__main__"})


def test_the_readme_has_blocks_and_lists_every_method() -> None:
    text = README.read_text("utf-8")
    assert python_blocks(text) != []
    assert sorted(methods_in_table(text)) == sorted(strategies.__all__)
    contract = {
        "Advantages", "PreferenceTerms", "PreferenceTokens", "PreferenceWeights", "PromptPool",
        "PromptSampler", "Rollouts", "TokenSignals", "TokenTerms", "TokenWeights",
    }  # fmt: skip
    assert sorted(methods_in_table(text, "GRPO")) == sorted(set(rl.__all__) - contract)


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


@pytest.mark.parametrize("name", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(name: str) -> None:
    path = next(p for p in (ROOT / name, ROOT / "docs" / name) if p.exists())
    text = path.read_text("utf-8")
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
