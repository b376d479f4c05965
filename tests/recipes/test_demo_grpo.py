"""The GRPO demo end to end, on small budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinesel.recipes import demo_grpo
from onlinesel.recipes._rl_arms import ARMS, Job, run_job
from onlinesel.recipes._rl_warm import RLWarmSettings, prepare_rl
from onlinesel.recipes.demo_grpo import GRPODemo, jobs_of, main, run_demo
from onlinesel.report import read_run

# A model that has practised for an instant may solve nothing for as long as these runs last.
pytestmark = pytest.mark.filterwarnings("ignore:RolloutSelection. .* batches in a row:UserWarning")


def test_every_arm_runs_every_task_with_every_seed() -> None:
    demo = GRPODemo(Path("out"), seeds=2)
    jobs = jobs_of(demo, {task: Path(task) for task in demo.tasks})
    assert len(jobs) == len({job.folder for job in jobs}) == 2 * 2 * len(ARMS)
    assert next(iter(ARMS)).startswith("uniform")  # the report measures the others against it


@pytest.mark.slow
@pytest.mark.parametrize("arm", list(ARMS))
def test_an_arm_leaves_its_record(tmp_path: Path, arm: str) -> None:
    start, _ = prepare_rl(RLWarmSettings("mixed", limit=2), tmp_path / "start")
    job = Job(arm, "mixed", 1.0, 3, str(tmp_path / "run"), str(start.folder), looks=2)
    shares: list[float] = []
    result = run_job(job, shares.append)
    run = read_run(tmp_path / "run")
    assert run.seed == 3 and run.name == arm and run.extra["task"] == "mixed"
    assert run.generations[-1].rollouts == result.rollouts
    first, last = run.evals[0], run.evals[-1]
    assert first.metrics["rollouts"] == 0 and last.metrics["rollouts"] == result.rollouts
    assert last.metrics["reward"] == pytest.approx(result.reward)
    assert last.cpu_seconds == pytest.approx(result.cpu_seconds) and result.cpu_seconds >= 1.0
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_the_demo_ends_with_pages_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = (next(iter(ARMS)), list(ARMS)[-1])
    pages = run_demo(GRPODemo(tmp_path, seconds=1.0, tasks=("mixed",), arms=arms, practice=2))
    assert pages == [tmp_path / "mixed" / "report.html"]
    assert "svg" in pages[0].read_text()
    assert (tmp_path / "mixed" / "headline.png").stat().st_size > 10_000
    table = (tmp_path / "mixed" / "table.md").read_text()
    assert all(arm in table for arm in arms) and "prompts a step" in table
    printed = capsys.readouterr().out
    assert "[2/2]" in printed and table.strip() in printed


def test_a_sweep_sets_prompts_and_rate() -> None:
    demo = GRPODemo(Path("out"), arms=("DAPO's filter",), prompts=4, rate=1e-3)
    arm = ARMS["DAPO's filter"]["mixed"]
    settings = jobs_of(demo, {task: Path(task) for task in demo.tasks})[0].settings()
    assert (settings.prompts, settings.rate, settings.parts) == (4, 1e-3, arm.parts)
    own = jobs_of(GRPODemo(Path("out")), {task: Path(task) for task in demo.tasks})
    assert all(job.settings() == ARMS[job.arm][job.task] for job in own)


def test_an_interrupt_is_a_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(demo: GRPODemo) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_grpo, "run_demo", interrupted)
    assert main(["--seconds", "1"]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seeds", "seconds", "workers", "prompts", "rate"])
def test_budgets_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"onlinesel demo-grpo: {name} must be above 0, got 0"):
        GRPODemo(Path("out"), **{name: 0})
