"""What a run that generates completions writes down, and what is left of it after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from onlinesel.report.runlog import Prompt, RunLog, read_run
from tests.report.test_rollouts import generate


def test_a_generation_is_read_as_it_was_written(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="band")
        log.generation(
            step=3, seconds=2.5, cpu_seconds=None, rollouts=24, tokens=70, rejected_tokens=30,
            rounds=2, prompts=torch.tensor([2**60, -1]), successes=torch.tensor([3.0, torch.nan]),
            trials=torch.tensor([8, 0]), kept=torch.tensor([True, False]),
        )  # fmt: skip
        log.evaluation(step=3, seconds=2.5, rows=0, reward=0.25, rollouts=24)
    line = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert line == {
        "step": 3, "seconds": 2.5, "cpu_seconds": None, "rollouts": 24, "tokens": 70,
        "rejected_tokens": 30, "rounds": 2, "prompts": [2**60, -1], "successes": [3.0, None],
        "trials": [8, 0], "kept": [True, False],
    }  # fmt: skip
    run = read_run(tmp_path)
    (found,) = run.generations
    assert (found.step, found.seconds, found.rollouts, found.tokens) == (3, 2.5, 24, 70)
    assert (found.rejected_tokens, found.rounds) == (30, 2) and math.isnan(found.cpu_seconds)
    assert (list(found.prompts), list(found.trials)) == ([2**60, -1], [8, 0])
    assert found.successes[0] == 3.0 and math.isnan(found.successes[1])
    assert list(found.kept) == [1, 0]
    assert run.evals[0].metrics == {"reward": 0.25, "rollouts": 24}
    assert math.isnan(run.evals[0].loss)


def test_a_group_needs_all_four_facts(tmp_path: Path) -> None:
    with (
        RunLog(tmp_path) as log,
        pytest.raises(
            ValueError,
            match=r"RunLog\.generation: kept must have one entry per prompt, got 1 for 2 prompts\. "
            "Pass every scored group, kept or not",
        ),
    ):
        log.generation(
            step=0, seconds=0.0, cpu_seconds=0.0, rollouts=2, tokens=2, rejected_tokens=0,
            rounds=1, prompts=[1, 2], successes=[1, 0], trials=[1, 1], kept=[True],
        )  # fmt: skip
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_a_run_resumed_at_a_step_generates_from_that_step(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="band")
        for k in range(5):
            generate(log, k, [(k, 1, 2, True)])
            log.evaluation(step=k, seconds=0.0, rows=0, reward=0.1 * k)
        log.prompt_table([Prompt(1, 0.5, 0.1, 2, 4)])
    with pytest.raises(ValueError, match=r"must be a directory without steps, got .* with evals"):
        RunLog(tmp_path)
    RunLog(tmp_path, resume_step=3).close()
    run = read_run(tmp_path)
    assert [g.step for g in run.generations] == [0, 1, 2] and len(run.prompts) == 1
    assert [e.step for e in run.evals] == [0, 1, 2, 3]
    (tmp_path / "evals.jsonl").unlink()
    with pytest.raises(ValueError, match="without steps, got .* with rollouts.jsonl"):
        RunLog(tmp_path)
    RunLog(tmp_path, resume_step=0).close()
    assert read_run(tmp_path).generations == () and read_run(tmp_path).prompts == {}


def test_a_truncated_last_line_is_skipped_and_another_broken_one_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="band")
        for k in range(3):
            generate(log, k, [(k, 1, 2, True)])
        log.prompt_table([Prompt(i, 0.5, 0.1, 0, None) for i in range(3)])
    for name in ("rollouts.jsonl", "prompts.jsonl"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-9])
    run = read_run(tmp_path)
    assert [g.step for g in run.generations] == [0, 1] and list(run.prompts) == [0, 1]
    file = tmp_path / "rollouts.jsonl"
    file.write_text(file.read_text().replace('"kept": [true]', '"kept": []', 1))
    with pytest.raises(ValueError, match=r"every line of rollouts\.jsonl .* in line 1 of .*differ"):
        read_run(tmp_path)
