"""What the report says about runs that generate: two tables, and what a reward costs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from onlinesel.report import rollouts, summary
from onlinesel.report.findings import by_result
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm, Interval
from onlinesel.report.wording import (
    DASH,
    Table,
    axis_name,
    count,
    held_out,
    percents,
    signed,
    within,
)

__all__ = ["costs", "headline", "spent"]


def headline(runs: Iterable[Run]) -> Table:
    """Return one row per arm: cost, held-out reward, and the way to uniform's best.

    Example:
        >>> from pathlib import Path
        >>> headline([Run(Path(), "band", seed=0)]).rows[0][:3]
        ('band', 'none', '1')
    """
    runs = list(runs)
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    columns = (
        "Arm", "Budget", "Seeds", "Steps", "Rollouts", axis_name(clock), "Held-out reward",
        "Minus uniform", "Rollouts to uniform's best", f"{axis_name(clock)} to uniform's best",
    )  # fmt: skip
    rows = []
    for arm in by_result(arms):
        base = summary.baseline(arms, arm.budget, arm)
        rows.append((
            arm.name, arm.budget or "none", str(len(arm.runs)),
            *(count(summary.ends(arm, axis)) for axis in ("step", "rollouts", clock)),
            held_out(summary.t_interval(summary.finals(arm)), arm.goal),
            DASH if base is None or base is arm else signed(summary.paired_difference(arm, base)),
            *(DASH if base is None else _way(arm, base, axis) for axis in ("rollouts", clock)),
        ))  # fmt: skip
    return Table(columns, tuple(rows))


def spent(runs: Iterable[Run]) -> Table:
    """Return one row per arm: what its rollouts gave, and what was spent on rejected groups.

    Example:
        >>> from pathlib import Path
        >>> spent([Run(Path(), "band", seed=0)]).rows[0]
        ('band', 'none', '–', '–', '–', '–', '–')
    """
    columns = (
        "Arm", "Budget", "Groups kept", "Mixed groups", "Rollouts per kept group",
        "Tokens on rejected groups", "Share of all tokens",
    )  # fmt: skip
    rows = []
    for arm in by_result(summary.group_arms(runs)):
        gave = rollouts.yields(arm)
        rows.append((
            arm.name, arm.budget or "none", percents(gave.kept), percents(gave.mixed),
            gave.per_kept.text(1), count(gave.tokens), percents(gave.rejected),
        ))  # fmt: skip
    return Table(columns, tuple(rows))


def costs(runs: Iterable[Run]) -> list[str]:
    """Return one sentence per arm: what it needs to get to uniform's best held-out reward.

    Example:
        >>> costs([])
        []
    """
    runs = list(runs)
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    said = []
    for arm in arms:
        base = summary.baseline(arms, arm.budget, arm)
        if base is None or base is arm or not summary.finals(arm) or not summary.improved(base):
            continue
        lead = f"At equal {arm.budget}, {arm.name}" if arm.budget else arm.name
        shares = {axis: summary.relative_reach(arm, base, axis) for axis in ("rollouts", clock)}
        tried = max(len(summary.ways(arm, base, axis)) for axis in shares)
        most = max(share.n for share in shares.values())
        if not most:
            said.append(f"{lead} never gets to {base.name}'s best held-out reward.")
            continue
        needs = " and ".join(
            f"{percents(share, 0)} of the {within(axis_name(axis))}{_judged(share, tried)}"
            for axis, share in shares.items()
            if share.n
        )
        some = "" if most == tried else f", in the {most} of {tried} runs that get there"
        said.append(f"{lead} needs {needs} that {base.name} takes to its best reward{some}.")
    return said


def _judged(share: Interval, tried: int) -> str:
    """Say what the seeds tell about a share of the baseline's way; nothing if some got nowhere."""
    if share.n < tried:
        return ""
    if share.n == 1:
        return " (one run)"
    if abs(share.mean - 1) <= share.half:
        return " (the seeds do not separate the two)"
    return " (less)" if share.mean < 1 else " (more)"


def _way(arm: Arm, base: Arm, axis: str) -> str:
    pairs = summary.ways(arm, base, axis)
    reached = [needed for needed, _ in pairs if math.isfinite(needed)]
    if not pairs or not summary.finals(arm):
        return DASH
    if not reached:
        return "not reached"
    share = "100 %" if arm is base else percents(summary.relative_reach(arm, base, axis), 0)
    part = "" if len(reached) == len(pairs) else f", {len(reached)} of {len(pairs)} runs"
    return f"{count(reached)} ({share}){part}"
