"""The verdict: what pays, what does not, what cannot be told; page and command say it first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.report import paid
from onlinesel.report.page import main, render, write_report
from onlinesel.report.paid import NOT_TOLD, PAYS, PAYS_NOT
from onlinesel.report.records import Evaluation, Run, Step
from onlinesel.report.runlog import RunLog


def run(name: str, seed: int, losses: Sequence[float], pace: float = 1.0, **facts: Any) -> Run:
    """A run evaluated every 10 steps; a step takes `pace` seconds."""
    extra = {k: facts.pop(k) for k in list(facts) if k not in ("budget", "steps")}
    evals = tuple(Evaluation(10 * k, 10 * k * pace, 10 * k, loss) for k, loss in enumerate(losses))
    steps = facts.pop("steps", (Step(1, pace, 1, 4, step_seconds=pace),))
    return Run(Path(name), name, seed=seed, evals=evals, steps=steps, extra=extra, **facts)


def rewards(name: str, seed: int, values: Sequence[float], pace: float = 1.0) -> Run:
    evals = tuple(
        Evaluation(10 * k, 10 * k * pace, 0, math.nan, metrics={"reward": value})
        for k, value in enumerate(values)
    )
    # A run that generates writes no time of a single step.
    steps = (Step(1, pace, 8, 8), Step(20, 20 * pace, 8, 8))
    return Run(Path(name), name, seed=seed, budget="time", evals=evals, steps=steps)


UNIFORM = [run("Uniform", seed, [4.0, 3.0, 2.0 + 0.1 * seed]) for seed in range(3)]


def said(*runs: Run) -> list[str]:
    return [str(verdict) for verdict in paid.judged(runs)]


def test_what_pays() -> None:
    # A step takes 1.5 s: at 20 s the arm is between steps 10 and 20, a third of the way on.
    arm = [run("UDS", s, [4.0, 2.0 + 0.1 * s, 1.4 + 0.1 * s], 1.5) for s in range(3)]
    (verdict,) = paid.judged([*UNIFORM, *arm])
    assert verdict.difference.mean == pytest.approx(-0.2) and verdict.outcome == PAYS
    assert str(verdict) == (
        "UDS: 1.5 times a Uniform step, loss −0.200 ± 0.000 at equal time (3 seeds): pays."
    )


def test_what_does_not_pay() -> None:
    # Better by the step (1.9 against 2.0), and dearer: at 20 s of 38 it is behind.
    arm = [run("UDS", s, [4.0, 2.2 + 0.1 * s, 1.9 + 0.1 * s], 1.9) for s in range(3)]
    (verdict,) = paid.judged([*UNIFORM, *arm])
    assert verdict.outcome == PAYS_NOT and verdict.ratio == pytest.approx(1.9)
    # At 20 s, a nineteenth of the way from 19 s to 38 s, on which it falls by 0.3.
    assert verdict.difference.mean == pytest.approx(0.2 - 0.3 / 19)
    assert str(verdict) == (
        "UDS: 1.9 times a Uniform step, loss +0.184 ± 0.000 at equal time (3 seeds): "
        "does not pay here."
    )


def test_an_interval_that_holds_zero_tells_nothing() -> None:
    arm = [run("UDS", s, [4.0, 3.0, 2.0 + 0.1 * s + d]) for s, d in enumerate((-0.3, 0.1, -0.2))]
    (verdict,) = paid.judged([*UNIFORM, *arm])
    assert verdict.outcome == NOT_TOLD and verdict.difference.mean == pytest.approx(-0.4 / 3)
    assert str(verdict).endswith(": cannot be told: the seeds do not separate the two.")


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([run("UDS", 0, [4.0, 1.0])], "no uniform run"),
        ([UNIFORM[0], run("UDS", 0, [4.0, 3.0, 1.0])], "one seed"),
        ([*UNIFORM[:2], run("UDS", 7, [4.0, 1.0])], "no seed shared with Uniform"),
        ([UNIFORM[0], run("UDS", 0, [])], "no evaluation after the start (UDS)"),
        ([UNIFORM[0], run("UDS", 0, [4.0])], "no evaluation after the start (UDS)"),
        ([run("Uniform", 0, []), run("UDS", 0, [4.0, 1.0])],
         "no evaluation after the start (Uniform)"),
        (UNIFORM, "no run with a method to compare with"),
        ([*UNIFORM, *(run("UDS", s, [4.0, math.nan, math.nan]) for s in range(3))],
         "a loss or its time is not a finite number"),
        ([*UNIFORM, *(run("UDS", s, [4.0, 1.0, 1.0], shadow=True) for s in range(3))],
         "a shadow run trains on everything"),
        ([*UNIFORM, *(run("UDS", s, [4.0, 1.0, 1.0], steps=(Step(9, 1.0, 1, 1),))
                      for s in range(3))], "the record begins in the middle of the run (UDS)"),
    ],
)  # fmt: skip
def test_what_cannot_be_told(runs: list[Run], why: str) -> None:
    (verdict,) = paid.judged(runs)
    assert verdict.outcome == NOT_TOLD and verdict.why == why
    assert str(verdict).endswith(f"cannot be told: {why}.")


def test_no_runs_have_no_verdict() -> None:
    assert paid.judged([]) == [] and 'class="card paid"' not in render([])


def rho(seed: int, budget: str | None = None, **facts: Any) -> Run:
    return run("RHO", seed, [4.0, 2.5, 1.5 + 0.1 * seed], budget=budget, **facts)


def test_a_reference_is_paid_for() -> None:
    """At 20 s the arm has trained for 20 s less what its reference took."""
    free = [rho(seed, reference="adapter") for seed in range(3)]
    assert paid.judged([*UNIFORM, *free])[0].outcome == PAYS
    dear = paid.with_costs(free, {"RHO": 15.0})  # 5 s of training: 3.25, against 2.0 to 2.2
    (verdict,) = paid.judged([*UNIFORM, *dear])
    assert verdict.outcome == PAYS_NOT and verdict.difference.mean == pytest.approx(3.25 - 2.1)
    assert "(3 seeds, 15.00 s before the run counted in)" in str(verdict)
    unknown = [rho(seed, reference="column reference_loss") for seed in range(3)]
    (verdict,) = paid.judged([*UNIFORM, *unknown])
    assert (verdict.outcome, verdict.why) == (
        NOT_TOLD, "what its reference cost is not known (--before ARM=SECONDS)",
    )  # fmt: skip
    assert paid.judged([*UNIFORM, *paid.with_costs(unknown, {"RHO": 0.0})])[0].outcome == PAYS
    # What loses without its cost loses with it.
    worse = [run("RHO", s, [4.0, 3.5, 3.0 + 0.1 * s], reference="model X") for s in range(3)]
    assert paid.judged([*UNIFORM, *worse])[0].outcome == PAYS_NOT
    # Longer than uniform took altogether: the arm stands where it starts.
    late = paid.with_costs(free, {"RHO": 100.0})
    assert paid.judged([*UNIFORM, *late])[0].difference.mean == pytest.approx(4.0 - 2.1)
    with pytest.raises(ValueError, match=r"seconds from 0 on for an arm, got X=1.0. The arms are"):
        paid.with_costs(free, {"X": 1.0})
    with pytest.raises(ValueError, match=r"got RHO=-1.0"):
        paid.with_costs(free, {"RHO": -1.0})


def test_a_time_budget_is_taken_as_it_ended() -> None:
    """It ends with the step that comes closest: 20 s and 20.5 s are an equal time, 25 s is not."""
    base = [run("Uniform", s, [4.0, 3.0, 2.0], budget="time") for s in range(2)]
    near = [run("UDS", s, [4.0, 3.0, 1.0], 1.025, budget="time") for s in range(2)]
    assert paid.judged([*base, *near])[0].difference.mean == pytest.approx(-1.0)
    far = [run("UDS", s, [4.0, 3.0, 1.0], 1.25, budget="time") for s in range(2)]
    assert paid.judged([*base, *far])[0].difference.mean == pytest.approx(3.0 - 2 * 0.6 - 2.0)


def test_equal_time_decides_before_equal_steps() -> None:
    timed = [run("Uniform", s, [4.0, 3.0, 2.0], budget="time") for s in range(2)]
    timed += [run("UDS", s, [4.0, 3.0, 2.5], budget="time") for s in range(2)]
    stepped = [run("Uniform", s, [4.0, 3.0, 2.0], budget="steps") for s in range(2)]
    stepped += [run("UDS", s, [4.0, 2.0, 1.0], 1.5, budget="steps") for s in range(2)]
    (verdict,) = paid.judged([*stepped, *timed])
    assert verdict.outcome == PAYS_NOT and verdict.difference.mean == pytest.approx(0.5)
    # A budget that cannot tell leaves it to the next.
    (verdict,) = paid.judged([*stepped, timed[0], timed[2]])
    assert verdict.outcome == PAYS


def test_a_reward_pays_upwards_and_other_settings_are_named() -> None:
    base = [rewards("uniform", s, [0.2, 0.3, 0.4 + 0.1 * s]) for s in range(2)]
    arm = [rewards("band", s, [0.2, 0.4, 0.5 + 0.1 * s], 1.02) for s in range(2)]
    (verdict,) = paid.judged([*base, *arm])
    assert verdict.outcome == PAYS and verdict.ratio == pytest.approx(1.02)
    assert str(verdict).startswith("band: 1.0 times a uniform step, reward +0.100 ± 0.000 at")
    runs = [run("Uniform", s, [4.0, 3.0], settings={"lr": "1"}) for s in range(2)]
    runs += [run("UDS", s, [4.0, 2.0], settings={"lr": "2"}) for s in range(2)]
    assert said(*runs)[0].endswith(": pays; other settings differ too: lr.")


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.booleans())
def test_pays_is_an_interval_on_the_good_side(gaps: list[float], higher: bool) -> None:
    def pair(name: str, seed: int, end: float) -> Run:
        make = rewards if higher else run
        return make(name, seed, [0.5, 0.5, end])

    runs = [pair("Uniform", seed, 4.0) for seed in range(len(gaps))]
    runs += [pair("UDS", seed, 4.0 + gap) for seed, gap in enumerate(gaps)]
    (verdict,) = paid.judged(runs)
    mean, half = verdict.difference.mean, verdict.difference.half
    assert mean == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    good, bad = (mean - half > 0, mean + half < 0)[:: 1 if higher else -1]
    wanted = PAYS if good else PAYS_NOT if bad else NOT_TOLD
    assert verdict.outcome == wanted


def write(folder: Path, name: str, seed: int, last: float) -> None:
    with RunLog(folder / f"{len(name)}-{seed}") as log:
        log.start(name=name, seed=seed)
        for k, loss in enumerate((4.0, 3.0, last)):
            log.evaluation(step=k, seconds=1.0 * k, rows=k, loss=loss)


def test_page_and_command_line_say_it_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        write(tmp_path, "Uniform", seed, 2.0)
        write(tmp_path, "<b>UDS</b>", seed, 1.5)
        write(tmp_path, "top", seed, 2.5)
    out = tmp_path / "r.html"
    assert main([str(tmp_path), "-o", str(out), "--before", "top=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "<b>UDS</b>: loss −0.500 ± 0.000 at equal time (2 seeds): pays.",
        "top: loss +0.500 ± 0.000 at equal time (2 seeds): does not pay here.",
        str(out),
    ]
    body = out.read_text().split("<body>")[1]
    first, second = re.findall(r'<p class="(?:good|bad|open)">(.*?)</p>', body)
    assert first == "&lt;b&gt;UDS&lt;/b&gt;: " + lines[0].split(": ", 1)[1] and second == lines[1]
    assert '<p class="good">&lt;b&gt;UDS' in body and '<p class="bad">top' in body
    assert body.index('class="card paid"') < body.index("<main>")
    page = write_report([tmp_path], out, before={"<b>UDS</b>": 1.0}).read_text()
    assert "loss +1.000 ± 0.000 at equal time (2 seeds, 1.00 s before the run counted in)" in page
    for wrong in ("UDS", "nobody=3", "top=x"):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), "-o", str(out), "--before", wrong])
