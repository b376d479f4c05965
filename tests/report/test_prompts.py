"""`onlinesel prompts`: which prompts it lists, what it prints, what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from onlinesel import cli
from onlinesel.report.prompts import main, rank, read_prompts
from onlinesel.report.runlog import Prompt, RunLog, read_run

TABLE = [
    Prompt(2**60, 0.9, 0.05, 12, 40),
    Prompt(3, 0.125, 0.1, 4, 17),
    Prompt(1, 0.125, 0.25, 0, None),
    Prompt(2, math.nan, 0.5, 0, None),
]

LONG = "one\x1b[31m\n  two\ud800" + 80 * "x"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with RunLog(tmp_path / "band-0") as log:
        log.start(name="band")
        log.prompt_table([(7, 0.5, 0.5, 1, 1)])
        log.prompt_table([*TABLE[:2], tuple(TABLE[2]), TABLE[3]._asdict()])
        log.rows([(1, None, LONG), (3, "a", "three"), (9, None, "")])
    return tmp_path / "band-0"


def test_the_table_is_replaced_as_a_whole(run: Path) -> None:
    first = (run / "prompts.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"id": 2**60, "rate": 0.9, "std": 0.05, "visits": 12, "last": 40}
    assert '"rate": null' in (run / "prompts.jsonl").read_text()
    assert not (run / "prompts.jsonl.tmp").exists()
    found = read_run(run).prompts
    assert list(found) == [2**60, 3, 1, 2] and found[3] == TABLE[1] and found[1].last is None
    assert math.isnan(found[2].rate) and found[2][2:] == (0.5, 0, None)


def test_which_prompts_are_listed() -> None:
    found = {title: [p.id for p in listed] for title, listed in rank(TABLE, 2).items()}
    assert found == {"easiest": [2**60, 1], "hardest": [1, 3], "most uncertain": [2, 1]}
    assert [p.id for p in rank(TABLE, 9)["hardest"]] == [1, 3, 2**60]
    with pytest.raises(ValueError, match="rank: count must be at least 1, got 0. Pass a positive"):
        rank(TABLE, 0)


def test_what_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--count", "2"]) == 0
    text = "one [31m two " + 58 * "x" + "…"
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: 4 prompts, 2 visited",
        "",
        "Easiest:",
        "                   id      pass rate  visits  last step  text",
        "  1152921504606846976  0.900 ± 0.050      12         40",
        f"                    1  0.125 ± 0.250       0          -  {text}",
        "",
        "Hardest:",
        "  id      pass rate  visits  last step  text",
        f"   1  0.125 ± 0.250       0          -  {text}",
        "   3  0.125 ± 0.100       4         17  three",
        "",
        "Most uncertain:",
        "  id      pass rate  visits  last step  text",
        "   2      ? ± 0.500       0          -",
        f"   1  0.125 ± 0.250       0          -  {text}",
    ]


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prompts", str(run), "--count", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["visited"]) == (4, 2)
    assert found["most_uncertain"] == [
        {"id": 2, "rate": None, "std": 0.5, "visits": 0, "last": None, "text": None}
    ]
    assert found["hardest"][0]["text"] == LONG


def test_lists_without_a_number_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="band")
        log.prompt_table([Prompt(1, 0.5, math.nan, 3, 2)])
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "  id  pass rate  visits  last step"
    assert lines[4] == "   1  0.500 ± ?       3          2"
    assert lines[-1] == "  none: no prompt has the number that this list goes by"


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"read_run: path must exist, got .*nowhere"):
        read_prompts(tmp_path / "nowhere")
    RunLog(tmp_path).start(name="UDS")
    assert cli.main(["prompts", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"onlinesel prompts: read_prompts: path must hold a prompts.jsonl with prompts, got "
        f"{tmp_path} without. Only runs that predict pass rates write it, with "
        "RunLog.prompt_table.\n"
    )
    RunLog(tmp_path).prompt_table([])
    assert cli.main(["prompts", str(tmp_path)]) == 2
    with pytest.raises(TypeError):
        RunLog(tmp_path).prompt_table([(1.5, 0.5, 0.1, 0, None)])  # type: ignore[list-item]
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--count", "x"])
    assert "invalid int value: 'x'" in capsys.readouterr().err


def test_it_needs_no_extra(run: Path) -> None:
    code = (
        "import sys\nfor name in ('matplotlib', 'jinja2', 'numpy'): sys.modules[name] = None\n"
        f"from onlinesel.report.prompts import main\nmain([{str(run)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Hardest:" in done.stdout, done.stderr
