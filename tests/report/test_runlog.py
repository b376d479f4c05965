from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onlinesel.report.prompts import read_prompts
from onlinesel.report.runlog import Row, RunLog, find_runs, read_run

BIG = 2**62 + 1


def write(path: Path, steps: int = 3, **meta: object) -> Path:
    with RunLog(path) as log:
        log.start(name="UDS", **meta)
        for k in range(1, steps + 1):
            log.step(step=k, seconds=0.5 * k, rows=2 * k, candidates=4 * k, loss=1.0 / k, lr=0.1)
            log.choice(k, [BIG, k], [1.0, 0.0], scores=[2.0, math.inf], tokens=[3, 4])
            log.evaluation(step=k, seconds=0.5 * k, cpu_seconds=0.4 * k, rows=2 * k, loss=2.0 / k)
    return path


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path, strategy="UDS()", candidates=2, scope="global", seed=7, budget="time", note="é")
    with RunLog(tmp_path, resume_step=3) as log:
        log.rows([Row(BIG, "wiki", "水\u2028\ud800"), {"id": 2, "source": None, "text": "a\nb"}])
    run = read_run(tmp_path)
    assert (run.name, run.strategy, run.candidates, run.seed) == ("UDS", "UDS()", 2, 7)
    assert (run.scope, run.budget, dict(run.extra)) == ("global", "time", {"note": "é"})
    assert run.command and run.hardware and run.date and run.versions["python"]
    assert [s.loss for s in run.steps] == [1.0, 0.5, 1.0 / 3]
    assert run.steps[1].metrics == {"lr": 0.1} and math.isnan(run.steps[1].cpu_seconds)
    assert run.evals[2].cpu_seconds == pytest.approx(1.2) and run.evals[2].loss == 2.0 / 3
    assert run.rows[BIG] == Row(BIG, "wiki", "水\u2028\ud800")
    assert run.rows[2] == Row(2, None, "a\nb")


def test_ids_are_exact_and_non_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path, steps=1)
    line = json.loads((tmp_path / "choices.jsonl").read_text())
    assert line == {
        "step": 1, "ids": [BIG, 1], "weights": [1.0, 0.0], "scores": [2.0, None], "tokens": [3, 4],
    }  # fmt: skip
    choice = read_run(tmp_path).choices[0]
    assert choice.ids[0] == BIG and int(float(BIG)) != BIG
    assert choice.scores is not None and math.isnan(choice.scores[1])


def test_tensors_are_accepted_and_float_ids_are_not(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="UDS")
        log.choice(1, torch.tensor([BIG]), torch.tensor([0.5]), torch.tensor([torch.nan]))
        log.step(step=1, seconds=torch.tensor(2.0), rows=1, candidates=1)
        with pytest.raises(TypeError):
            log.choice(2, [1.0], [1.0])
    run = read_run(tmp_path)
    assert (list(run.choices[0].ids), run.steps[0].seconds) == ([BIG], 2.0)
    assert len(run.choices) == 1


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.start(name="UDS")
    log.evaluation(step=0, seconds=0.0, rows=0, loss=3.0)
    assert read_run(tmp_path).evals[0].loss == 3.0
    log.close()


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_truncated_last_line_is_skipped_and_repaired_on_resume(tmp_path: Path, cut: int) -> None:
    write(tmp_path)
    file = tmp_path / "evals.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    whole = 3 if cut == 1 else 2  # without its newline alone, a line is still whole
    assert len(read_run(tmp_path).evals) == whole
    with RunLog(tmp_path, resume_step=3) as log:
        log.evaluation(step=4, seconds=2.0, rows=8, loss=0.5)
    assert [e.step for e in read_run(tmp_path).evals] == [*range(1, whole + 1), 4]


@pytest.mark.parametrize("broken", [b'{"step": 1, "sec\n', b"[]\n", b'{"step": 1}\n', b"\xff\n"])
def test_a_corrupt_middle_line_is_refused(tmp_path: Path, broken: bytes) -> None:
    write(tmp_path)
    file = tmp_path / "steps.jsonl"
    first, _, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + broken + b"".join(rest))
    with pytest.raises(ValueError, match=r"^read_run: every line of steps\.jsonl .* in line 2 of"):
        read_run(tmp_path)


def test_ids_that_were_written_as_floats_are_refused(tmp_path: Path) -> None:
    write(tmp_path, steps=1)
    (tmp_path / "choices.jsonl").write_text('{"step": 1, "ids": [1.0], "weights": [1]}\n')
    with pytest.raises(ValueError, match="every line of choices.jsonl must be a record"):
        read_run(tmp_path)


def test_resume_drops_later_steps_and_keeps_the_date(tmp_path: Path) -> None:
    write(tmp_path, steps=5, date="2026-01-01")
    with RunLog(tmp_path, resume_step=2) as log:
        log.start(name="UDS")
        log.step(step=3, seconds=9.0, rows=6, candidates=12)
    run = read_run(tmp_path)
    assert [(s.step, s.seconds) for s in run.steps] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [c.step for c in run.choices] == [e.step for e in run.evals] == [1, 2]
    assert run.date == "2026-01-01" and run.choices[1].ids[0] == BIG


def test_resume_from_zero_starts_afresh(tmp_path: Path) -> None:
    write(tmp_path)
    RunLog(tmp_path, resume_step=0).close()
    assert read_run(tmp_path).steps == ()


def test_designed_errors(tmp_path: Path) -> None:
    write(tmp_path / "run")
    with pytest.raises(ValueError, match="path must be a directory without steps, got .*resume_s"):
        RunLog(tmp_path / "run")
    with pytest.raises(ValueError, match="resume_step must be >= 0, got -1. Pass the number"):
        RunLog(tmp_path / "run", resume_step=-1)
    with pytest.raises(ValueError, match="name must be a non-empty string, got None. Name the arm"):
        RunLog(tmp_path / "new").start(seed=1)
    with pytest.raises(ValueError, match="weights must have one entry per id, got 1 for 2 ids"):
        RunLog(tmp_path / "new").choice(1, [1, 2], [1.0])
    with pytest.raises(ValueError, match=r"read_run: path must hold a run\.json, got .*new"):
        read_run(tmp_path / "new")
    with pytest.raises(ValueError, match="path must be a run or hold runs, got .*new, which"):
        find_runs([tmp_path / "new"])
    for read in (read_run, read_prompts, lambda path: find_runs([path])):
        with pytest.raises(ValueError, match="path must exist, got .*missing, which is not there"):
            read(tmp_path / "missing")
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="must have a name and format 1, got format 2"):
        read_run(tmp_path / "run")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json must be JSON, got .*Restore it"):
        read_run(tmp_path / "run")


def test_find_runs_looks_below_and_names_each_run_once(tmp_path: Path) -> None:
    for name in ("time/b", "time/a", "steps/a"):
        write(tmp_path / name, steps=1)
    found = find_runs([tmp_path / "time", tmp_path, tmp_path / "time" / "a"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["time/a", "time/b", "steps/a"]


def test_runlog_needs_no_extra_and_the_page_names_it() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['jinja2'] = None\n"
        "import onlinesel.report.runlog\n"
        "import onlinesel.report.page\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith(
        "ImportError: onlinesel.report needs matplotlib and jinja2: "
        'pip install "onlinesel[report]".'
    )
    assert "onlinesel/report/page.py" in done.stderr
