"""What the report says in words and cells: headline table, break-even table, verdicts, caveats.

Plain values, so that the page and the README's markdown table cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from onlinesel.report import kept, summary
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm, Interval

__all__ = ["Table", "break_even", "caveats", "headline", "markdown", "verdicts"]

_SOURCES = 4
_DASH = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the arm.

    Example:
        >>> Table(("Arm",), (("UDS",),)).rows[0]
        ('UDS',)
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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
        "Arm", "Budget", "Seeds", "Steps", "Rows trained", _clock_name(clock), "Held-out loss",
        "Minus uniform", "Time to uniform's loss",
        *(f"Trained: {source} (pool {_percent(pool[source])})" for source in sources),
    )  # fmt: skip
    rows = []
    for arm in sorted(arms, key=_by_loss(arms)):
        base = summary.baseline(arms, arm.budget)
        shares = kept.source_shares(arm) if sources else {}
        rows.append((
            arm.name, arm.budget or "none", str(len(arm.runs)),
            _count(_ends(arm, "step")), _count(_ends(arm, "rows")), _count(_ends(arm, clock)),
            _loss(summary.t_interval(summary.final_losses(arm))),
            _DASH if base is None or base is arm else _signed(summary.paired_difference(arm, base)),
            _DASH if base is None else _reached(arm, base, clock),
            *(_share(shares.get(source)) for source in sources),
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
    base = next((arm for arm in arms if arm.is_baseline), None)
    base_cost = summary.step_cost(base) if base else None
    rows = []
    for arm in arms:
        cost = summary.step_cost(arm)
        if cost is None:
            continue
        rest = (_DASH,) * 4
        if base and base_cost and base_cost.step > 0:
            ratio = cost.step / base_cost.step
            needed = summary.relative_reach(arm, base, "step")
            rest = (
                f"{ratio:.2f} ×", _percent(1 / ratio) if ratio else _DASH,
                _reached(arm, base, "step"),
                _pays(arm, needed, ratio) if arm is not base and _improved(base) else _DASH,
            )  # fmt: skip
        rows.append((arm.name, _seconds(cost.score), _seconds(cost.train), *rest))
    return Table(columns, tuple(rows))


def markdown(table: Table) -> str:
    """Return `table` as GitHub markdown, numbers to the right.

    Example:
        >>> print(markdown(Table(("Arm", "Loss"), (("a|b", "2.0"),))))
        | Arm | Loss |
        | :-- | --: |
        | a\\|b | 2.0 |
    """
    lines = [table.columns, (":--",) + ("--:",) * (len(table.columns) - 1)]
    cells = [[" ".join(c.split()).replace("|", "\\|") for c in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *cells])


def verdicts(runs: Iterable[Run]) -> list[str]:
    """Return one sentence per budget: who ends lowest, and whether the seeds can tell.

    Example:
        >>> verdicts([])
        []
    """
    arms = summary.group_arms(runs)
    said = []
    for budget in dict.fromkeys(arm.budget for arm in arms):
        ended = [
            (ended_at.mean, place, ended_at, arm)
            for place, arm in enumerate(arms)
            if arm.budget == budget
            and (ended_at := summary.t_interval(summary.final_losses(arm))).n
        ]
        if not ended:
            continue
        _, _, lowest, best = min(ended)
        base = summary.baseline(arms, budget)
        lead = f"At equal {budget}" if budget else "Without a fixed budget"
        end = f"held-out loss {_loss(lowest)}"
        if best is base:
            said.append(f"{lead}, no arm ends below {best.name} ({end}).")
        elif base is None or not summary.final_losses(base):
            said.append(f"{lead}, {best.name} ends lowest ({end}); there is no uniform arm.")
        else:
            gap = summary.paired_difference(best, base)
            said.append(f"{lead}, {best.name} ends lowest ({end}){_gap(gap, base.name)}")
    return said


def caveats(runs: Iterable[Run]) -> list[str]:
    """Return what a reader must know before believing the numbers; empty if nothing is amiss.

    Example:
        >>> from pathlib import Path
        >>> caveats([Run(Path(), "UDS")])[-1]
        'No held-out loss in 1 of 1 runs: UDS.'
    """
    runs = list(runs)
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    notes = []
    fewest = min((len(arm.runs) for arm in arms), default=0)
    if fewest == 1:
        notes.append("Some arms have one seed, and so no interval.")
    elif 1 < fewest < 5:
        notes.append(f"Intervals rest on as few as {fewest} seeds; five or more are usual.")
    for arm in arms:
        base = summary.baseline(arms, arm.budget)
        axis = {"time": clock, "steps": "step"}.get(arm.budget or "")
        if base is None or base is arm or axis is None:
            continue
        mine, theirs = _ends(arm, axis), _ends(base, axis)
        if mine and theirs and abs(fmean(mine) / (fmean(theirs) or math.nan) - 1) > 0.1:
            notes.append(
                f"Not an equal {arm.budget} comparison: {arm.name} used {_count(mine)} "
                f"{_clock_name(axis).lower()}, {base.name} {_count(theirs)}."
            )
    for budget in dict.fromkeys(arm.budget for arm in arms):
        base = summary.baseline(arms, budget)
        if base is not None and summary.final_losses(base) and not _improved(base):
            notes.append(
                f"{base.name} does not end below its start at budget {budget or 'none'}: how much "
                "of its way the others need has no meaning there."
            )
    diverged = [a.name for a in arms if not all(map(math.isfinite, summary.final_losses(a)))]
    if diverged:
        notes.append(
            f"Runs whose last loss is not finite are left out of the means: {_list(diverged)}."
        )
    for what, lacking in (
        ("steps", [run for run in runs if not run.steps]),
        ("choices", [run for run in runs if not run.choices]),
        ("held-out loss", [run for run in runs if not run.evals]),
    ):
        if lacking:
            names = _list(run.name for run in lacking)
            notes.append(f"No {what} in {len(lacking)} of {len(runs)} runs: {names}.")
    return notes


def _by_loss(arms: Sequence[Arm]) -> Callable[[Arm], tuple[int, float]]:
    budgets = list(dict.fromkeys(arm.budget for arm in arms))

    def key(arm: Arm) -> tuple[int, float]:
        mean = summary.t_interval(summary.final_losses(arm)).mean
        return budgets.index(arm.budget), math.inf if math.isnan(mean) else mean

    return key


def _ends(arm: Arm, axis: str) -> list[float]:
    ends = [
        float(getattr((run.steps or run.evals)[-1], axis))
        for run in arm.runs
        if run.steps or run.evals
    ]
    return [end for end in ends if math.isfinite(end)]


def _gap(gap: Interval, name: str) -> str:
    if not gap.n:
        return f"; it shares no seed with {name}."
    size = f", {abs(gap.mean):.3f} {'below' if gap.mean < 0 else 'above'} {name}"
    if gap.n == 1:
        return f"{size} on one shared seed, which says nothing about other seeds."
    if abs(gap.mean) <= gap.half:
        return f"{size} (± {gap.half:.3f}, paired by seed): the seeds do not separate the two."
    return f"{size} (± {gap.half:.3f}, paired by seed)."


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
        return "not reached" if summary.final_losses(arm) and _improved(base) else _DASH
    part = "" if ratio.n == len(arm.runs) else f" ({ratio.n} of {len(arm.runs)})"
    return f"{Interval(100 * ratio.mean, 100 * ratio.half, ratio.n).text(0)} %{part}"


def _improved(base: Arm) -> bool:
    """Return whether the baseline ends below its start, so that there is a way to compare with."""
    return any(summary.reach(r, r.evals[-1].loss, "step") > 0 for r in base.runs if r.evals)


def _share(share: Interval | None) -> str:
    if share is None:
        return _DASH
    return Interval(100 * share.mean, 100 * share.half, share.n).text(1) + " %"


def _loss(value: Interval) -> str:
    return value.text(3 if not value.mean < 0.1 else 5)


def _signed(value: Interval) -> str:
    return ("+" if value.mean > 0 else "") + value.text(3)


def _count(values: Sequence[float]) -> str:
    return f"{fmean(values):,.0f}".replace(",", "\u202f") if values else _DASH


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"


def _clock_name(axis: str) -> str:
    names = {"cpu_seconds": "CPU seconds", "seconds": "Training seconds", "step": "Steps"}
    return names[axis]


def _list(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - 6} more" if len(distinct) > 6 else ""
    return ", ".join(distinct[:6]) + more
