"""What the report says in words and cells: headline table, break-even table, verdicts, caveats.

Plain values, so that the page and the README's markdown table cannot disagree. The two tables are
about runs judged by their loss, verdicts and caveats about any runs that share a goal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from onlinesel.report import doubts, kept, summary
from onlinesel.report.goals import LOSS, scored
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm, Interval
from onlinesel.report.wording import (
    DASH,
    Table,
    axis_name,
    count,
    gap,
    held_out,
    listed,
    percent,
    percents,
    seconds,
    signed,
)

__all__ = ["break_even", "by_result", "caveats", "headline", "verdicts"]

_SOURCES = 4


def headline(runs: Iterable[Run]) -> Table:
    """Return one row per arm: cost, held-out loss against uniform, share of each source trained.

    Example:
        >>> from pathlib import Path
        >>> headline([Run(Path(), "UDS", seed=0)]).rows[0][:3]
        ('UDS', 'none', '1')
    """
    runs = list(runs)
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    pool = kept.pool_shares(runs)
    sources = kept.sources_of(runs)[:_SOURCES]
    columns = (
        "Arm", "Budget", "Seeds", "Steps", "Rows trained", axis_name(clock), "Held-out loss",
        "Minus uniform", "Time to uniform's loss",
        *(f"Trained: {source} (pool {percent(pool[source])})" for source in sources),
    )  # fmt: skip
    rows = []
    for arm in by_result(arms):
        base = summary.baseline(arms, arm.budget, arm)
        shares = kept.source_shares(arm) if sources else {}
        rows.append((
            arm.name, arm.budget or "none", str(len(arm.runs)),
            *(count(summary.ends(arm, axis)) for axis in ("step", "rows", clock)),
            held_out(summary.t_interval(summary.finals(arm)), arm.goal),
            DASH if base is None or base is arm else signed(summary.paired_difference(arm, base)),
            DASH if base is None else _reached(arm, base, clock),
            *(percents(shares.get(source)) for source in sources),
        ))  # fmt: skip
    return Table(columns, tuple(rows))


def break_even(arms: Sequence[Arm]) -> Table:
    """Return what a step of each arm costs, when that pays, and whether it did.

    Args:
        arms: Arms of one budget.

    Example:
        >>> break_even([]).rows
        ()
    """
    columns = (
        "Arm", "Scoring per step", "Training per step", "Relative step cost",
        "Pays below this share of uniform's steps", "Share needed", "Pays?",
    )  # fmt: skip
    rows = []
    for arm in arms:
        base = summary.baseline(arms, arm.budget, arm)
        base_cost = summary.step_cost(base) if base else None
        cost = summary.step_cost(arm)
        if cost is None:
            continue
        rest = (DASH,) * 4
        if base and base_cost and base_cost.step > 0:
            ratio = cost.step / base_cost.step
            needed = summary.relative_reach(arm, base, "step")
            rest = (
                f"{ratio:.2f} ×", percent(1 / ratio) if ratio else DASH,
                _reached(arm, base, "step"),
                _pays(arm, needed, ratio) if arm is not base and summary.improved(base) else DASH,
            )  # fmt: skip
        rows.append((arm.name, seconds(cost.score), seconds(cost.train), *rest))
    return Table(columns, tuple(rows))


def verdicts(runs: Iterable[Run]) -> list[str]:
    """Return one sentence per budget: who ends best, and whether the seeds can tell.

    Example:
        >>> verdicts([])
        []
    """
    arms = summary.group_arms(runs)
    said = []
    for budget in dict.fromkeys(arm.budget for arm in arms):
        ended = [arm for arm in arms if arm.budget == budget and _end(arm).n]
        if not ended:
            continue
        best = by_result(ended)[0]
        goal, base = best.goal, summary.baseline(arms, budget, best)
        lead = f"At equal {budget}" if budget else "Without a fixed budget"
        end = f"({goal.name} {held_out(_end(best), goal)})"
        first = f"{lead}, {best.name} ends {'highest' if goal.higher else 'lowest'} {end}"
        if best is base:
            said.append(f"{lead}, no arm ends {goal.side} {best.name} {end}.")
        elif base is None or not summary.finals(base):
            said.append(f"{first}; there is no uniform arm.")
        else:
            said.append(first + gap(summary.paired_difference(best, base), base.name))
    return said


def by_result(arms: Sequence[Arm]) -> list[Arm]:
    """Return `arms` by budget, and within a budget the best final loss or reward first.

    Example:
        >>> by_result([])
        []
    """
    budgets = list(dict.fromkeys(arm.budget for arm in arms))

    def key(arm: Arm) -> tuple[int, float]:
        mean = arm.goal.sign * _end(arm).mean
        return budgets.index(arm.budget), math.inf if math.isnan(mean) else mean

    return sorted(arms, key=key)


def caveats(runs: Iterable[Run]) -> list[str]:
    """Return what a reader must know before believing the numbers; empty if nothing is amiss.

    Example:
        >>> from pathlib import Path
        >>> caveats([Run(Path(), "UDS")])[-3]
        'No held-out loss in 1 of 1 runs: UDS.'
    """
    runs = list(runs)
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    goal = arms[0].goal if arms else LOSS
    notes = doubts.about_seeds(arms) + doubts.about_settings(arms)
    fewest = min((len(arm.runs) for arm in arms), default=0)
    if fewest == 1:
        notes.append("Some arms have one seed, and so no interval.")
    elif 1 < fewest < 5:
        notes.append(f"Intervals rest on as few as {fewest} seeds; five or more are usual.")
    for arm in arms:
        base = summary.baseline(arms, arm.budget, arm)
        if base is None or base is arm or arm.budget is None:
            continue
        axis = {"time": clock, "steps": "step"}.get(arm.budget, arm.budget)
        mine, theirs = summary.ends(arm, axis), summary.ends(base, axis)
        if mine and theirs and abs(fmean(mine) / (fmean(theirs) or math.nan) - 1) > 0.1:
            notes.append(
                f"Not an equal {arm.budget} comparison: {arm.name} used {count(mine)} "
                f"{axis_name(axis).lower()}, {base.name} {count(theirs)}."
            )
    for budget in dict.fromkeys(arm.budget for arm in arms):
        base = summary.baseline(arms, budget)
        if base is not None and summary.finals(base) and not summary.improved(base):
            notes.append(
                f"{base.name} does not {'get' if goal.higher else 'end'} {goal.side} its start at "
                f"budget {budget or 'none'}: how much of its way the others need has no meaning "
                "there."
            )
    diverged = [a.name for a in arms if not all(map(math.isfinite, summary.finals(a)))]
    if diverged:
        notes.append(
            f"Runs whose last {goal.field} is not finite are left out of the means: "
            f"{listed(diverged)}."
        )
    logged = ("generations",) if goal.higher else ("steps", "choices")
    for what in (*logged, goal.name):
        lacking = [r for r in runs if not (scored(r) if what == goal.name else getattr(r, what))]
        if lacking:
            names = listed(run.name for run in lacking)
            notes.append(f"No {what} in {len(lacking)} of {len(runs)} runs: {names}.")
    return notes + doubts.about_runs(runs)


def _end(arm: Arm) -> Interval:
    return summary.t_interval(summary.finals(arm))


def _pays(arm: Arm, needed: Interval, ratio: float) -> str:
    if needed.n < len(arm.runs):
        return (
            "no" if not needed.n else f"not in {len(arm.runs) - needed.n} of {len(arm.runs)} runs"
        )
    if needed.n == 1:
        return ("yes" if needed.mean < 1 / ratio else "no") + ", one seed"
    if abs(needed.mean - 1 / ratio) <= needed.half:
        return "within noise"
    return "yes" if needed.mean < 1 / ratio else "no"


def _reached(arm: Arm, base: Arm, axis: str) -> str:
    if arm is base:
        return "100 %"
    ratio = summary.relative_reach(arm, base, axis)
    if not ratio.n:
        return "not reached" if summary.finals(arm) and summary.improved(base) else DASH
    part = "" if ratio.n == len(arm.runs) else f" ({ratio.n} of {len(arm.runs)})"
    return percents(ratio, 0) + part
