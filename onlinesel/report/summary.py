"""Numbers of the report: arms over seeds, intervals, the way to a mark, the cost of a step.

Standard library only. An arm is the set of runs that share a budget, a name and all settings, and
differ by seed; every number of an arm is the mean over its seeds with a 95 % t-interval. What runs
are judged by is in `onlinesel.report.goals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from onlinesel.report.arms import Key, by_seed, differing, pair_key, settings_of
from onlinesel.report.goals import LOSS, Goal, goal_of, mark_of, reach, scored, value_of
from onlinesel.report.records import Run

__all__ = [
    "Arm",
    "Cost",
    "Interval",
    "baseline",
    "clock_of",
    "ends",
    "finals",
    "group_arms",
    "improved",
    "paired_difference",
    "reach",
    "relative_reach",
    "step_cost",
    "t_interval",
    "t_quantile",
    "ways",
]

_T975 = (
    12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814,
    2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596,
    2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227,
)  # fmt: skip
_Z975 = 1.959963984540054
_BUDGETS = ("time", "steps", "rollouts", None)


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and the half-width of its 95 % t-interval, NaN below two values.

    Example:
        >>> Interval(2.5, 0.1, 3).text(2)
        '2.50 ± 0.10'
    """

    mean: float
    half: float
    n: int

    def text(self, digits: int = 3) -> str:
        """Return "mean ± half", or the mean alone below two values.

        Example:
            >>> Interval(2.5, float("nan"), 1).text(1)
            '2.5'
        """
        if math.isnan(self.mean):
            return "–"
        spread = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}".replace("-", "−")


@dataclass(frozen=True)
class Arm:
    """The runs that share a budget, a name and all settings.

    Where several arms of a budget have one name, it is followed by the settings that differ.

    Example:
        >>> Arm("UDS", "time", ()).is_baseline
        False
    """

    name: str
    budget: str | None
    runs: tuple[Run, ...]

    @property
    def goal(self) -> Goal:
        """What its runs are judged by."""
        return goal_of(self.runs[0]) if self.runs else LOSS

    @property
    def settings(self) -> dict[str, str]:
        """What all its runs share, see `onlinesel.report.arms.settings_of`."""
        return settings_of(self.runs[0]) if self.runs else {}

    @property
    def is_baseline(self) -> bool:
        """Whether the arm chooses nothing: its name is "uniform" or begins with it."""
        return self.name.casefold().startswith("uniform")


@dataclass(frozen=True)
class Cost:
    """Mean seconds of one optimizer step, split into scoring and the rest.

    Example:
        >>> Cost(0.25, 0.75).step
        1.0
    """

    score: float
    train: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.score + self.train


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: Degrees of freedom, at least 1.

    Example:
        >>> round(t_quantile(2), 3), round(t_quantile(60), 3)
        (4.303, 2.0)
    """
    if freedom < 1:
        raise ValueError(
            f"t_quantile: freedom must be >= 1, got {freedom}. Use two values or more."
        )
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    # Cornish-Fisher expansion around the normal quantile: exact to 1e-5 above 30 degrees.
    z = _Z975
    first = (z**3 + z) / (4 * freedom)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def t_interval(values: Iterable[float]) -> Interval:
    """Return the mean and 95 % t-interval of the finite `values`.

    Example:
        >>> t_interval([1.0, 2.0, 3.0]).text(2)
        '2.00 ± 2.48'
    """
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return Interval(finite[0] if finite else math.nan, math.nan, len(finite))
    half = t_quantile(len(finite) - 1) * stdev(finite) / math.sqrt(len(finite))
    return Interval(fmean(finite), half, len(finite))


def group_arms(runs: Iterable[Run]) -> list[Arm]:
    """Return the arms of `runs`: by budget (time first, none last), then baseline first, then name.

    Example:
        >>> from pathlib import Path
        >>> [arm.name for arm in group_arms([Run(Path(), "UDS"), Run(Path(), "Uniform")])]
        ['Uniform', 'UDS']
    """
    named: dict[tuple[str | None, str], list[Run]] = {}
    for run in runs:
        named.setdefault((run.budget, run.name), []).append(run)
    arms: list[Arm] = []
    for (budget, name), members in named.items():
        groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
        for run in members:
            groups.setdefault(tuple(sorted(settings_of(run).items())), []).append(run)
        varied = differing([dict(key) for key in groups])
        for key, same in groups.items():
            told = ", ".join(f"{what}={dict(key).get(what, '-')}" for what in varied)
            arms.append(Arm(f"{name} ({told})" if told else name, budget, tuple(same)))
    known = {budget: place for place, budget in enumerate(_BUDGETS)}
    return sorted(
        arms,
        key=lambda a: (
            known.get(a.budget, len(known)),
            str(a.budget),
            not a.is_baseline,
            a.name.casefold(),
        ),
    )


def baseline(arms: Iterable[Arm], budget: str | None, to: Arm | None = None) -> Arm | None:
    """Return the uniform arm of `budget`, or None.

    Args:
        arms: Arms of all budgets.
        budget: Of the comparison.
        to: Arm that is to be compared: of several uniform arms, the one with most of its settings
            is taken, then the one with the shortest name. A uniform arm is its own.

    Example:
        >>> baseline([Arm("UDS", None, ()), Arm("Uniform", None, ())], None).name
        'Uniform'
    """
    found = [arm for arm in arms if arm.budget == budget and arm.is_baseline]
    if to in found:
        return to
    mine = {} if to is None else to.settings
    return min(
        found,
        key=lambda arm: (len(differing([mine, arm.settings])) if mine else 0, len(arm.name)),
        default=None,
    )


def clock_of(runs: Sequence[Run]) -> str:
    """Return the field that times the runs: "cpu_seconds" or "seconds".

    The runs' own `clock` decides. Without one, CPU seconds are used if every evaluation has them:
    on a shared machine they do not grow while another process runs.

    Example:
        >>> from pathlib import Path
        >>> clock_of([Run(Path(), "UDS", extra={"clock": "wall"})])
        'seconds'
    """
    named = {run.extra["clock"] for run in runs if "clock" in run.extra}
    if named:
        return "cpu_seconds" if named == {"cpu"} else "seconds"
    evals = [e for run in runs for e in run.evals]
    timed = bool(evals) and all(math.isfinite(e.cpu_seconds) for e in evals)
    return "cpu_seconds" if timed else "seconds"


def ends(arm: Arm, axis: str) -> list[float]:
    """Return how far every run of `arm` went along `axis`, where that is known.

    Example:
        >>> ends(Arm("UDS", None, ()), "step")
        []
    """
    reached: list[float] = []
    for run in arm.runs:
        generated = axis == "rollouts"
        records = run.generations if generated else run.steps or run.evals or run.generations
        reached.extend(value_of(record, axis) for record in records[-1:])
    return [end for end in reached if math.isfinite(end)]


def finals(arm: Arm) -> list[float]:
    """Return the last held-out loss or reward of every run that has one.

    Example:
        >>> finals(Arm("UDS", None, ()))
        []
    """
    return [points[-1][1] for run in arm.runs if (points := scored(run))]


def paired_difference(arm: Arm, base: Arm) -> Interval:
    """Return the final held-out loss or reward of `arm` minus that of `base`, paired by seed.

    Example:
        >>> paired_difference(Arm("UDS", None, ()), Arm("Uniform", None, ())).n
        0
    """
    loosely = pair_key(arm.runs, base.runs)
    mine, theirs = (
        {seed: _mean_end(runs) for seed, runs in by_seed(a.runs, trainer_only=loosely).items()}
        for a in (arm, base)
    )
    return t_interval(end - theirs[seed] for seed, end in mine.items() if seed in theirs)


def _mean_end(runs: Iterable[Run]) -> float:
    """Return the mean of the runs' last values; NaN if one of them has none."""
    ends = [points[-1][1] if (points := scored(run)) else math.nan for run in runs]
    return fmean(ends)


def ways(arm: Arm, base: Arm, axis: str) -> list[tuple[float, float]]:
    """Return, for each run of `arm`, how far it and the baseline go to the baseline's mark.

    The mark is the last held-out loss of the baseline, or its best held-out reward. Runs are paired
    by seed; a run whose seed the baseline lacks is compared with the baseline's mean. The first
    number is NaN if the run never gets there; a baseline that starts at its mark gives no pair.

    Example:
        >>> ways(Arm("UDS", None, ()), Arm("Uniform", None, ()), "step")
        []
    """
    loosely = pair_key(arm.runs, base.runs)
    ends: dict[Key, tuple[float, float]] = {}
    for seed, runs in by_seed(base.runs, trainer_only=loosely).items():
        marks = [(mark_of(run), reach(run, mark_of(run), axis)) for run in runs if scored(run)]
        if marks:
            ends[seed] = fmean(mark for mark, _ in marks), fmean(length for _, length in marks)
    usable = [end for end in ends.values() if all(map(math.isfinite, end))]
    if not usable:
        return []
    mean = (fmean(mark for mark, _ in usable), fmean(length for _, length in usable))
    pairs: list[tuple[float, float]] = []
    for seed, runs in by_seed(arm.runs, trainer_only=loosely).items():
        mark, length = ends.get(seed, mean)
        if length > 0:
            pairs.extend((reach(run, mark, axis), length) for run in runs)
    return pairs


def relative_reach(arm: Arm, base: Arm, axis: str) -> Interval:
    """Return how much of the baseline's way `arm` needs to the baseline's mark, see `ways`.

    Below 1 the arm is faster. `n` counts the runs that get there.

    Example:
        >>> relative_reach(Arm("UDS", None, ()), Arm("Uniform", None, ()), "step").n
        0
    """
    return t_interval(needed / length for needed, length in ways(arm, base, axis))


def improved(base: Arm) -> bool:
    """Return whether the baseline gets beyond its start, so that there is a way to compare with.

    Example:
        >>> improved(Arm("Uniform", None, ()))
        False
    """
    return any(reach(run, mark_of(run), "step") > 0 for run in base.runs)


def step_cost(arm: Arm) -> Cost | None:
    """Return the mean cost of one optimizer step of `arm`, or None if no step was timed.

    Example:
        >>> step_cost(Arm("UDS", None, ())) is None
        True
    """
    costs = []
    for run in arm.runs:
        timed = [s for s in run.steps if math.isfinite(s.step_seconds)]
        if timed:
            scoring = [s.score_seconds if s.score_seconds > 0 else 0.0 for s in timed]
            score = fmean(scoring)
            costs.append((score, fmean(s.step_seconds for s in timed) - score))
    if not costs:
        return None
    return Cost(fmean(score for score, _ in costs), fmean(train for _, train in costs))
