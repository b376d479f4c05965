from __future__ import annotations

import math
from array import array
from pathlib import Path

import numpy as np
import pytest

from onlinesel.report import findings, kept, summary, wording
from onlinesel.report.records import Choice, Evaluation, Row, Run, Step
from onlinesel.report.summary import Arm


def run(name: str, seed: int, losses: list[float], *, speed: float = 1.0, **extra: object) -> Run:
    """A run evaluated every 10 steps; a step takes `speed` seconds and trains one row."""
    evals = tuple(
        Evaluation(10 * k, 10 * k * speed, 10 * k, loss, 20 * k * speed)
        for k, loss in enumerate(losses)
    )
    last = 10 * (len(losses) - 1)
    steps = (Step(last, last * speed, last, 4 * last, 2 * last * speed, speed - 1, speed),)
    return Run(Path(name), name, seed=seed, budget="steps", evals=evals, steps=steps, **extra)  # type: ignore[arg-type]


UNIFORM = [run("Uniform", 0, [4.0, 3.0, 2.0]), run("Uniform", 1, [4.0, 3.0, 2.2])]
FAST = [
    run("UDS", 0, [4.0, 2.0, 1.5], speed=1.5),  # reaches 2.0 at step 10
    run("UDS", 1, [4.2, 2.2, 1.6], speed=1.5),  # reaches 2.2 at step 10
]


def test_t_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, t(2) = 4.30265: half = 4.30265 / sqrt(3).
    found = summary.t_interval([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(2.48414, abs=1e-4)
    # Values 1 and 3: standard deviation sqrt(2), over sqrt(2) seeds: the half-width is t(1).
    assert summary.t_interval([1.0, 3.0]).half == pytest.approx(12.7062, abs=1e-4)
    assert math.isnan(summary.t_interval([5.0]).half) and math.isnan(summary.t_interval([]).mean)


@pytest.mark.parametrize(
    "freedom, value", [(1, 12.7062), (4, 2.7764), (30, 2.0423), (40, 2.0211), (100, 1.9840)]
)
def test_t_quantile_against_tables(freedom: int, value: float) -> None:
    assert summary.t_quantile(freedom) == pytest.approx(value, abs=1e-4)


def test_t_quantile_refuses_one_value() -> None:
    with pytest.raises(ValueError, match="t_quantile: freedom must be >= 1, got 0. Use two"):
        summary.t_quantile(0)


def test_arms_are_grouped_by_budget_and_name() -> None:
    other = Run(Path(), "UDS", budget="time")
    arms = summary.group_arms([*FAST, *UNIFORM, other])
    assert [(a.budget, a.name, len(a.runs)) for a in arms] == [
        ("time", "UDS", 1), ("steps", "Uniform", 2), ("steps", "UDS", 2),
    ]  # fmt: skip
    assert summary.baseline(arms, "steps") is arms[1] and summary.baseline(arms, "time") is None


def test_reach_is_a_straight_line_between_evaluations() -> None:
    # 3.5 lies half way from 4.0 at step 0 to 3.0 at step 10, and 2.2 needs 8/10 of the next ten.
    assert summary.reach(UNIFORM[0], 3.5, "step") == 5.0
    assert summary.reach(UNIFORM[0], 2.2, "step") == pytest.approx(18.0)
    assert summary.reach(UNIFORM[0], 2.2, "cpu_seconds") == pytest.approx(36.0)
    assert summary.reach(UNIFORM[0], 5.0, "step") == 0.0
    assert math.isnan(summary.reach(UNIFORM[0], 1.0, "step"))


def test_relative_reach_and_difference_are_paired_by_seed() -> None:
    uds, uniform = Arm("UDS", "steps", tuple(FAST)), Arm("Uniform", "steps", tuple(UNIFORM))
    assert summary.relative_reach(uds, uniform, "step").mean == pytest.approx(0.5)
    assert summary.relative_reach(uds, uniform, "step").half == pytest.approx(0.0)
    assert summary.relative_reach(uds, uniform, "seconds").mean == pytest.approx(0.75)
    # 1.5 - 2.0 and 1.6 - 2.2; exchanged seeds would give the same mean but a half-width of 4.4.
    gap = summary.paired_difference(uds, uniform)
    assert gap.mean == pytest.approx(-0.55) and gap.half == pytest.approx(12.7062 * 0.05, abs=1e-4)


def test_clock() -> None:
    assert summary.clock_of(UNIFORM) == "cpu_seconds"
    assert summary.clock_of([run("UDS", 0, [2.0], extra={"clock": "wall"})]) == "seconds"
    untimed = Run(Path(), "UDS", evals=(Evaluation(0, 0.0, 0, 1.0),))
    assert summary.clock_of([*UNIFORM, untimed]) == "seconds"


POOL = {i: Row(i, "bad" if i < 2 else "good", f"row {i}") for i in range(5)}
CHOICES = (
    Choice(1, array("q", [0, 2]), array("d", [0, 1]), array("d", [0.1, 0.9]), array("q", [8, 4])),
    Choice(2, array("q", [0, 2]), array("d", [0, 2]), array("d", [0.2, 0.8]), array("q", [8, 4])),
    Choice(3, array("q", [1, 3]), array("d", [1, 0]), array("d", [0.7, 0.3]), array("q", [6, 2])),
)
CHOSEN = run("UDS", 0, [4.0, 2.0, 1.5], speed=1.5, choices=CHOICES, rows=POOL)


def test_what_was_kept() -> None:
    arm = Arm("UDS", "steps", (CHOSEN,))
    assert kept.source_shares(arm)["bad"].mean == pytest.approx(1 / 3)
    assert kept.pool_shares([CHOSEN]) == {"bad": 0.4, "good": 0.6}
    middle, shares = kept.share_over_steps(arm)
    assert middle.tolist() == [0.5, 1.5, 2.5] and shares["bad"].tolist() == [0, 0, 1]
    # Row 4 is never a candidate, 0 and 3 never train, 1 trains once, 2 twice.
    assert kept.repeats(arm) == pytest.approx(np.array([1, 2, 1, 1, 0, 0]) / 5)
    most, least = kept.examples(arm, 2)
    assert [(e.row.id, e.trained, e.candidate) for e in most] == [(2, 2, 2), (1, 1, 1)]
    assert [(e.row.id, e.trained, e.candidate) for e in least] == [(0, 0, 2), (3, 0, 1)]


def test_headline_values_and_markdown() -> None:
    table = findings.headline([*UNIFORM, CHOSEN, FAST[1]])
    uds, uniform = table.rows
    assert uds == (
        "UDS", "steps", "2", "20", "20", "60", "1.550 ± 0.635", "−0.550 ± 0.635", "75 ± 0 %",
        "33.3 %", "66.7 %",
    )  # fmt: skip
    assert uniform[6:] == ("2.100 ± 1.271", "–", "100 %", "–", "–")
    assert table.columns[-2:] == ("Trained: bad (pool 40\u00a0%)", "Trained: good (pool 60\u00a0%)")
    lines = wording.markdown(table).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| UDS | steps | 2 | 20 | 20 | 60 | 1.550 ±")


def test_break_even_says_whether_selection_pays() -> None:
    slow = [run("Top loss", s, [4.0, 2.5, 1.9], speed=1.5) for s in (0, 1)]
    rows = findings.break_even(summary.group_arms([*UNIFORM, *FAST, *slow])).rows
    assert rows[0][1:] == ("0 ms", "1.00 s", "1.00 ×", "100\u00a0%", "100 %", "–")
    # Seeds reach 2.5 to 1.9 after 18.3 and 15 of 20 steps: 83 % on average, above 1 / 1.5.
    assert rows[1][:6] == ("Top loss", "500 ms", "1.00 s", "1.50 ×", "66.7\u00a0%", "83 ± 106 %")
    assert rows[1][6] == "within noise"
    assert rows[2][5:] == ("50 ± 0 %", "yes")
    never = [run("Top loss", s, [4.0, 3.9]) for s in (0, 1)]
    assert findings.break_even(summary.group_arms([*UNIFORM, *never])).rows[1][5:] == (
        "not reached", "no",
    )  # fmt: skip


def test_a_baseline_that_gets_worse_is_no_way_to_compare_with() -> None:
    worse = [run("Uniform", s, [4.0, 4.5, 4.2], speed=1.0) for s in (0, 1)]
    better = [run("UDS", s, [4.0, 3.5, 3.2], speed=1.5) for s in (0, 1)]
    rows = findings.break_even(summary.group_arms([*worse, *better])).rows
    assert rows[1][5:] == ("–", "–")
    assert findings.headline([*worse, *better]).rows[0][8] == "–"
    note = (
        "Uniform does not end below its start at budget steps: how much of its way the others "
        "need has no meaning there."
    )
    assert note in findings.caveats([*worse, *better])
    assert note not in findings.caveats([*UNIFORM, *better])


def test_verdicts_do_not_claim_what_the_seeds_do_not_show() -> None:
    said = findings.verdicts([*UNIFORM, *FAST])
    assert said == [
        "At equal steps, UDS ends lowest (held-out loss 1.550 ± 0.635), 0.550 below Uniform "
        "(± 0.635, paired by seed): the seeds do not separate the two."
    ]
    assert "no arm ends below Uniform" in findings.verdicts(UNIFORM)[0]
    assert "there is no uniform arm" in findings.verdicts(FAST)[0]
    assert "says nothing about other seeds" in findings.verdicts([UNIFORM[0], FAST[0]])[0]


def test_caveats() -> None:
    short = run("UDS", 0, [4.0, 2.0])
    notes = findings.caveats([*UNIFORM, short])
    assert "Some arms have one seed, and so no interval." in notes
    assert "Not an equal steps comparison: UDS used 10 steps, Uniform 20." in notes
    assert "No choices in 3 of 3 runs: Uniform, UDS." in notes
    bad = run("UDS", 0, [4.0, math.nan])
    assert any("last loss is not finite" in note for note in findings.caveats([bad]))
