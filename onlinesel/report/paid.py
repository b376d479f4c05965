"""Whether choosing paid: one sentence an arm, which page and command line say first.

An arm pays if, at equal time, it ends better than uniform in the mean over seeds and the 95 %
interval of the paired difference lies wholly on that side. Everything is in the time: scoring,
choosing, and what a reference cost before the run. Whatever of this is not known is said instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from onlinesel.report import summary
from onlinesel.report.arms import by_seed, pair_key
from onlinesel.report.doubts import other_settings
from onlinesel.report.goals import LOSS, Goal, scored, value_of
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm, Interval
from onlinesel.report.wording import listed, seconds, signed

__all__ = ["NOT_TOLD", "PAYS", "PAYS_NOT", "Verdict", "judge", "judged", "with_costs"]

PAYS = "pays"
"""Better than uniform at equal time, and the interval excludes zero."""
PAYS_NOT = "does not pay here"
"""Worse than uniform at equal time, and the interval excludes zero."""
NOT_TOLD = "cannot be told"
"""Something is missing, which the verdict names, or the seeds do not separate the two."""
_SAME = 0.05  # share of the time by which runs of an equal time may end apart


@dataclass(frozen=True)
class Verdict:
    """What an arm costs and gains against uniform, and whether that paid.

    Attributes:
        name: Of the arm.
        outcome: `PAYS`, `PAYS_NOT` or `NOT_TOLD`.
        why: What is missing, where it cannot be told.
        base: Name of the uniform arm.
        ratio: Seconds of a step, as a multiple of a uniform step; NaN if unknown.
        difference: Final loss or reward minus that of uniform at equal time, paired by seed.
        goal: What the arm is judged by.
        before: Seconds that it spent before its runs, counted in.
        apart: Settings beside the choice of rows that differ too.

    Example:
        >>> str(Verdict("UDS", NOT_TOLD, "no uniform run"))
        'UDS: cannot be told: no uniform run.'
    """

    name: str
    outcome: str
    why: str = ""
    base: str = "uniform"
    ratio: float = math.nan
    difference: Interval = Interval(math.nan, math.nan, 0)
    goal: Goal = LOSS
    before: float = 0.0
    apart: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = []
        if math.isfinite(self.ratio):
            size = f"{self.ratio:.1f}" if self.ratio < 10 else f"{self.ratio:.0f}"
            facts.append(f"{size} times a {self.base} step")
        if self.difference.n:
            counted = f"{self.difference.n} seed{'s' * (self.difference.n > 1)}"
            if self.before:
                counted += f", {seconds(self.before)} before the run counted in"
            gap = f"{self.goal.field} {signed(self.difference)}"
            facts.append(f"{gap} at equal time ({counted})")
        said = [", ".join(facts), self.outcome, self.why]
        end = f"; other settings differ too: {listed(self.apart)}" if self.apart else ""
        return f"{self.name}: {': '.join(part for part in said if part)}{end}."


def with_costs(runs: Iterable[Run], before: Mapping[str, float]) -> list[Run]:
    """Return `runs` with the seconds that arms cost before they began.

    Args:
        runs: Any runs.
        before: Seconds by name of an arm, for a reference that was trained or scored beforehand.

    Raises:
        ValueError: A name is that of no run, or its seconds are no number from 0 on.

    Example:
        >>> from pathlib import Path
        >>> with_costs([Run(Path(), "RHOLoss")], {"RHOLoss": 60.0})[0].extra
        {'reference_seconds': 60.0}
    """
    runs = list(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    for name, spent in before.items():
        if name not in names or not spent >= 0 or not math.isfinite(spent):
            raise ValueError(
                f"report: before must be seconds from 0 on for an arm, got {name}={spent}. "
                f"The arms are {listed(names) or 'none'}."
            )
    return [
        replace(run, extra={**run.extra, "reference_seconds": before[run.name]})
        if run.name in before
        else run
        for run in runs
    ]


def judged(runs: Iterable[Run]) -> list[Verdict]:
    """Return the verdict on every arm but uniform, once each, by the budget that can tell it.

    Example:
        >>> from pathlib import Path
        >>> [str(v) for v in judged([Run(Path(), "UDS")])]
        ['UDS: cannot be told: no uniform run.']
    """
    runs = list(runs)
    arms = summary.group_arms(runs)  # equal time first
    found: dict[str, Verdict] = {}
    for arm in arms:
        if arm.is_baseline or (arm.name in found and found[arm.name].outcome != NOT_TOLD):
            continue
        verdict = judge(arm, summary.baseline(arms, arm.budget, arm))
        if arm.name not in found or verdict.outcome != NOT_TOLD:
            found[arm.name] = verdict
    if arms and not found:
        return [Verdict(arms[0].name, NOT_TOLD, "no run with a method to compare with")]
    return list(found.values())


def judge(arm: Arm, base: Arm | None) -> Verdict:
    """Return the verdict on `arm` against the uniform arm `base`.

    Example:
        >>> judge(Arm("UDS", None, ()), None).outcome
        'cannot be told'
    """
    if base is None:
        return Verdict(arm.name, NOT_TOLD, "no uniform run")
    found = Verdict(
        arm.name, NOT_TOLD, base=base.name, goal=arm.goal, ratio=_ratio(arm, base),
        apart=tuple(other_settings(arm, base)),
    )  # fmt: skip
    if any(run.extra.get("shadow") for run in arm.runs):
        return replace(found, why="a shadow run trains on everything")
    lacking = [each.name for each in (arm, base) if not all(map(_evaluated, each.runs))]
    if lacking:
        return replace(found, why=f"no evaluation after the start ({listed(lacking)})")
    late = [r.name for r in (*arm.runs, *base.runs) if r.steps and r.steps[0].step > 1]
    if late:
        return replace(found, why=f"the record begins in the middle of the run ({listed(late)})")
    clock = summary.clock_of([*arm.runs, *base.runs])
    before = [_before(run) for run in arm.runs]
    gaps = _gaps(arm, base, clock)
    found = replace(
        found, difference=summary.t_interval(gaps), before=fmean(b or 0.0 for b in before)
    )
    if not gaps:
        return replace(found, why=f"no seed shared with {base.name}")
    if not all(map(math.isfinite, gaps)):
        found = replace(found, difference=Verdict.difference)
        return replace(found, why=f"a {arm.goal.field} or its time is not a finite number")
    if found.difference.n == 1:
        return replace(found, why="one seed")
    if abs(found.difference.mean) <= found.difference.half:
        return replace(found, why="the seeds do not separate the two")
    if found.difference.mean * arm.goal.sign > 0:
        return replace(found, outcome=PAYS_NOT)
    if None in before:
        return replace(found, why="what its reference cost is not known (--before ARM=SECONDS)")
    return replace(found, outcome=PAYS)


def _evaluated(run: Run) -> bool:
    return any(record.step > 0 for record, _ in scored(run))


def _before(run: Run) -> float | None:
    """Return the seconds spent before the run; None if there was something, of unknown cost.

    The model itself with its adapter off is a reference that costs nothing beforehand.
    """
    told = run.extra.get("reference_seconds")
    if isinstance(told, (int, float)):
        return float(told)
    return 0.0 if run.extra.get("reference") in (None, "", "adapter") else None


def _ratio(arm: Arm, base: Arm) -> float:
    costs = [summary.step_cost(each) for each in (arm, base)]
    steps = [cost.step for cost in costs if cost is not None]
    if len(steps) < 2:  # a run that generates times its steps by their sum alone
        steps = [_seconds_a_step(each) for each in (arm, base)]
    return steps[0] / steps[1] if steps[1] > 0 else math.nan


def _seconds_a_step(arm: Arm) -> float:
    ends = [run.steps[-1] for run in arm.runs if run.steps and run.steps[-1].step > 0]
    return fmean(end.seconds / end.step for end in ends) if ends else math.nan


def _gaps(arm: Arm, base: Arm, clock: str) -> list[float]:
    """Return the difference of each shared seed, at the time that both have spent."""
    loosely = pair_key(arm.runs, base.runs)
    theirs = by_seed(base.runs, trainer_only=loosely)
    gaps = []
    for seed, runs in by_seed(arm.runs, trainer_only=loosely).items():
        if seed in theirs:
            time = min(_end(run, clock) for run in (*runs, *theirs[seed]))
            mine = fmean(_at(run, time, clock) for run in runs)
            gaps.append(mine - fmean(_at(run, time, clock) for run in theirs[seed]))
    return gaps


def _end(run: Run, clock: str) -> float:
    return value_of(scored(run)[-1][0], clock) + (_before(run) or 0.0)


def _at(run: Run, time: float, clock: str) -> float:
    """Return the loss or reward of `run` once `time` is spent, NaN before its first evaluation.

    Between two evaluations it is taken as a straight line. A run of a time budget that ends a step
    early or late is taken as it ended: its schedule was over.
    """
    points: Sequence[tuple[float, float]] = [
        (value_of(record, clock) + (_before(run) or 0.0), value) for record, value in scored(run)
    ]
    if not all(map(math.isfinite, (time, *(place for place, _ in points)))):
        return math.nan
    end, last = points[-1]
    if time >= end or (run.budget == "time" and end - time <= _SAME * end):
        return last
    if time < points[0][0]:
        # Uniform was through before this arm had begun: it stands where it started.
        return points[0][1] if scored(run)[0][0].step == 0 else math.nan
    for (start, first), (stop, second) in zip(points, points[1:], strict=False):
        if start <= time <= stop:
            share = (time - start) / (stop - start) if stop > start else 1.0
            return first + share * (second - first)
    return math.nan
