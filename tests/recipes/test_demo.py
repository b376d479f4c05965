"""The demo: its budgets, its order, what it keeps and wipes, and a whole one in miniature."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from onlinesel.recipes import _corpus  # noqa: E402
from onlinesel.recipes import demo as recipe  # noqa: E402
from onlinesel.recipes._arms import ARMS, Budget, Record  # noqa: E402
from onlinesel.recipes._corpus import CorpusSettings  # noqa: E402
from onlinesel.recipes._warm import WarmSettings, load_start, prepare  # noqa: E402
from onlinesel.report import RunLog, read_run  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CORPUS = CorpusSettings(vocab=300, length=32, intact=8, held_out=12, warm=64, pool=96)
TINY = WarmSettings(CORPUS, layers=1, width=16, steps=4, batch=8)


# Budgets ------------------------------------------------------------------------------------------


def spend(budget: Budget, costs: list[float]) -> list[tuple[bool, bool]]:
    """Let steps of these CPU seconds pass; return whether each was evaluated, and the last."""
    seen, spent = [], 0.0
    for step, cost in enumerate(costs, 1):
        spent += cost
        budget.record.step(step=step, seconds=spent, rows=1, candidates=1, cpu_seconds=spent)
        control = SimpleNamespace(should_evaluate=False, should_training_stop=False)
        budget.on_step_end(None, None, control)
        seen.append((control.should_evaluate, control.should_training_stop))
        if control.should_training_stop:
            break
    return seen


def test_a_budget_of_steps_ends_with_them_and_evaluates_every_quarter(tmp_path: Path) -> None:
    shares: list[float] = []
    with Record(tmp_path) as record:
        budget = Budget("steps", 8, record, shares.append)
        assert spend(budget, [1.0] * 20) == [
            (False, False), (True, False), (False, False), (True, False),
            (False, False), (True, False), (False, False), (True, True),
        ]  # fmt: skip
    assert shares == [step / 8 for step in range(1, 9)]


@pytest.mark.parametrize(("cost", "steps"), [(1.0, 10), (3.0, 3), (4.1, 2), (7.0, 1), (25.0, 1)])
def test_a_budget_of_time_ends_at_the_step_that_comes_closest(
    cost: float, steps: int, tmp_path: Path
) -> None:
    with Record(tmp_path) as record:
        seen = spend(Budget("time", 10.0, record, lambda share: None), [cost] * 20)
    assert len(seen) == steps and seen[-1] == (True, True)


def test_the_rate_rises_shortly_and_falls_to_zero_with_the_budget(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        budget = Budget("time", 100.0, record, lambda share: None)
        rates = []
        for spent in (0.0, 5.0, 9.0, 50.0, 99.0, 100.0, 140.0):
            record.cpu_seconds = spent
            rates.append(budget.rate(0))
    assert rates == pytest.approx([0.1, 0.6 * 0.95, 0.91, 0.5, 0.01, 0.0, 0.0])


# The plan -----------------------------------------------------------------------------------------


def test_every_arm_has_both_budgets_and_a_folder_of_its_own() -> None:
    demo = recipe.Demo(Path("out"), seeds=2, seconds=9.0, steps=7)
    jobs = recipe.jobs_of(demo, Path("start"))
    assert len(jobs) == 20 and len({job.folder for job in jobs}) == 20
    wanted = {(arm, budget, s) for arm in ARMS for budget in ("time", "steps") for s in (0, 1)}
    assert {(job.arm, job.budget, job.seed) for job in jobs} == wanted
    assert {(job.budget, job.amount) for job in jobs} == {("time", 9.0), ("steps", 7.0)}
    # Timed runs first: the last run of all, which may run alone, is not one of them.
    assert [job.budget for job in jobs] == ["time"] * 10 + ["steps"] * 10
    assert [job.arm for job in jobs[10:12]] == ["full batches"] * 2
    assert [job.arm for job in jobs[-2:]] == ["uniform"] * 2


def test_all_arms_look_at_32_rows_or_train_8() -> None:
    looked = {name: arm.rows * arm.candidates for name, arm in ARMS.items()}
    assert looked == {
        "uniform": 8, "full batches": 32, "UDS": 32, "RHO-Loss": 32, "top loss": 32
    }  # fmt: skip
    assert {arm.rows for name, arm in ARMS.items() if name != "full batches"} == {8}


@pytest.mark.parametrize("name", ["seeds", "seconds", "steps", "workers"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipe.Demo(Path("out"), **{name: 0})
    message = f"onlinesel demo: {name} must be above 0, got 0. Leave it out for the default."
    assert str(caught.value) == message


def test_seeds_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[recipe.Demo] = []
    monkeypatch.setattr(recipe, "run_demo", seen.append)
    monkeypatch.setenv("SEEDS", "3")
    assert recipe.main(["--out", "x", "--arms", "uniform", "top loss", "--fresh"]) == 0
    assert recipe.main(["--seeds", "2", "--seconds", "1.5"]) == 0
    first, second = seen
    assert (first.seeds, first.output, first.arms, first.fresh) == (
        3, Path("x"), ("uniform", "top loss"), True
    )  # fmt: skip
    assert (second.seeds, second.seconds, second.arms) == (2, 1.5, tuple(ARMS))


def test_an_interrupt_is_a_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(demo: recipe.Demo) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "run_demo", interrupted)
    assert recipe.main([]) == 130
    assert "stopped; the next demo begins its runs again" in capsys.readouterr().err


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a tenth of the library: reading it whole takes most of the time."""
    library = _corpus.library_files
    monkeypatch.setattr(_corpus, "library_files", lambda root=None: library(root)[::10])


# Whole --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_files")
def test_the_start_is_built_once_and_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, cached = prepare(TINY, tmp_path)
    assert not cached and "warming the model up: 4 steps of 8 rows" in capsys.readouterr().out
    again, cached = prepare(TINY, tmp_path)
    assert cached and capsys.readouterr().out == ""
    assert again.folder == first.folder and [p.name for p in tmp_path.iterdir()] == [TINY.key()]
    assert again.reference_loss.equal(first.reference_loss)
    assert first.reference_loss.shape == (96,) and 3 < first.facts["held_out_loss"] < 7
    rebuilt, cached = prepare(TINY, tmp_path, fresh=True)
    assert not cached and rebuilt.pool.equal(first.pool)
    other = WarmSettings(CORPUS, layers=1, width=16, steps=5, batch=8)
    assert other.key() != TINY.key() and not prepare(other, tmp_path)[1]


@pytest.mark.usefixtures("few_files")
def test_an_interrupted_start_is_not_mistaken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onlinesel.recipes._warm.reference_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("few_files")
def test_a_whole_demo_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale, foreign = tmp_path / "runs" / "time" / "uniform-4", tmp_path / "runs" / "mine" / "a"
    with RunLog(stale) as log:
        log.start(name="uniform", seed=4, budget="time", recipe="demo")
    with RunLog(foreign) as log:
        log.start(name="mine", seed=0)
    arms = ("uniform", "RHO-Loss", "top loss")
    demo = recipe.Demo(tmp_path, seconds=0.4, steps=5, arms=arms, warm=TINY)
    page = recipe.run_demo(demo)
    told = capsys.readouterr().out
    assert not stale.exists() and foreign.exists()
    assert page == tmp_path / "report.html" and "<svg" in page.read_text("utf-8")
    assert (tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")

    runs = {
        (run.name, run.budget): run
        for run in map(read_run, (file.parent for file in tmp_path.glob("runs/*/*/run.json")))
        if run.name != "mine"
    }
    assert set(runs) == {(arm, budget) for arm in arms for budget in ("time", "steps")}
    for (arm, budget), run in runs.items():
        looked = 8 if arm == "uniform" else 32
        assert [s.rows for s in run.steps] == [8 * s.step for s in run.steps]
        assert [s.candidates for s in run.steps] == [looked * s.step for s in run.steps]
        assert len(run.steps) == 5 or budget == "time"
        assert run.evals[0].step == 0 and run.evals[-1].step == len(run.steps)
        assert all(math.isfinite(e.loss) for e in run.evals)
        assert run.seed == 0 and run.extra["clock"] == "cpu"
        assert [run.rows[i].source for i in range(4)] == ["clean", "corrupted"] * 2
        if budget == "time":
            # The first step after which another half a step would be over the budget.
            ends = [s.cpu_seconds * (1 + 0.5 / s.step) >= 0.4 - 1e-9 for s in run.steps]
            assert ends == [False] * (len(ends) - 1) + [True]
    # All start from the same model, and RHO-Loss compares with that model's own losses.
    assert len({run.evals[0].loss for run in runs.values()}) == 1
    reference = load_start(tmp_path / "start" / TINY.key()).reference_loss
    assert reference.isfinite().all()
    assert max(map(abs, runs["RHO-Loss", "steps"].choices[0].scores)) < 1e-5

    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.strip() in told and str(page) in told and "[6/6]" in told
    for arm in arms:
        assert table.count(f"| {arm} |") == 2
    assert "The reference losses of RHO-Loss (96 rows, one forward each) took " in table
    facts = json.loads((tmp_path / "start" / TINY.key() / "facts.json").read_text("utf-8"))
    # Each run of RHO-Loss pays for the reference losses of the rows that it looked at.
    paying = runs["RHO-Loss", "steps"]
    share = min(paying.steps[-1].candidates / 96, 1.0)
    assert paying.extra["reference_seconds"] == pytest.approx(
        share * facts["reference_cpu_seconds"]
    )
    assert "reference_seconds" not in runs["top loss", "steps"].extra
    verdicts = table.splitlines()[:2]
    assert [line.split(":")[0] for line in verdicts] == ["- RHO-Loss", "- top loss"]
    assert all(line.endswith("): cannot be told: one seed.") for line in verdicts)
    assert " before the run counted in" in verdicts[0]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("whom", ["all", "the demo"])
def test_a_stopped_demo_leaves_no_worker_behind(whom: str, tmp_path: Path) -> None:
    code = (
        # Whoever runs the tests in the background has Ctrl-C ignored, and so would the demo.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.recipes.test_demo import TINY, recipe\nfrom pathlib import Path\n"
        f"recipe.run_demo(recipe.Demo(Path({str(tmp_path)!r}), seconds=600.0, warm=TINY))"
    )
    demo = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert demo.stdout is not None
    while not list(tmp_path.glob("runs/*/*/steps.jsonl")) and demo.poll() is None:
        time.sleep(0.2)
    if whom == "all":  # as Ctrl-C does
        os.killpg(demo.pid, signal.SIGINT)
    else:
        demo.terminate()
    # The workers hold the other ends of the pipes: that these close is that all have ended.
    demo.communicate(timeout=300)  # a worker that was left behind would take 600 s of CPU
    assert demo.returncode == -(signal.SIGINT if whom == "all" else signal.SIGTERM)
