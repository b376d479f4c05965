"""Figures about generated completions: what became of the groups, how the pass rates moved.

Each function returns None where the runs lack what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from onlinesel.report import drawing
from onlinesel.report.drawing import Canvas

try:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

from onlinesel.report import rollouts

__all__ = ["FATE_ROLES", "LEVELS", "fates", "pass_rates"]

FATE_ROLES: Sequence[str] = ("s5", "s3", "c2", "c5", "s1", "s0")
"""Colour of each of `rollouts.FATES`: blue trains, orange and yellow were rejected."""

LEVELS: Sequence[tuple[str, str]] = (
    ("s0", "none succeeded"),
    ("s2", "up to a third"),
    ("s3", "up to two thirds"),
    ("s4", "more"),
    ("s5", "all succeeded"),
)
"""Colour and name of each level of pass rates, from the lowest."""


def fates(found: rollouts.Groups, name: str, key: str) -> str | None:
    """Draw what became of the groups of an arm over optimizer steps, as stacked shares.

    Example:
        >>> from onlinesel.report.summary import Arm
        >>> fates(rollouts.groups(Arm("band", None, ())), "band", "f1") is None
        True
    """
    edges, shares = rollouts.fates_over_steps(found)
    if not shares.size:
        return None
    canvas = Canvas()
    with canvas.axes(height=2.6) as (axes,):
        tops = np.cumsum(shares, axis=0)
        for role, bottom, top in zip(FATE_ROLES, tops - shares, tops, strict=True):
            axes.stairs(top, edges, baseline=bottom, fill=True, color=canvas.colour(role))
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
        axes.set(xlabel="Optimizer steps", ylabel="Share of the groups")
        axes.grid(False)
        drawing.percents(axes, "y")
        counts = np.bincount(found.fates, minlength=len(rollouts.FATES)) / found.fates.size
        label = f"{name}: what became of {found.fates.size} groups. " + ", ".join(
            f"{fate} {share:.0%}" for fate, share in zip(rollouts.FATES, counts, strict=True)
        )
        return drawing.to_svg(axes, label + ".", key)


def pass_rates(found: rollouts.Groups, name: str, key: str) -> str | None:
    """Draw the mean measured pass rates of the prompts of an arm over optimizer steps.

    Example:
        >>> from onlinesel.report.summary import Arm
        >>> pass_rates(rollouts.groups(Arm("band", None, ())), "band", "f1") is None
        True
    """
    rates = rollouts.pass_rates(found)
    if rates is None:
        return None
    canvas = Canvas()
    with canvas.axes(height=3.4) as (axes,):
        # Levels begin above 0, 1/3 and 2/3, and at 1; a blank cell (NaN) would be the highest.
        levels = np.digitize(rates.rates, [1e-9, 1 / 3, 2 / 3, 1 - 1e-9])
        levels[np.isnan(rates.rates)] = -1
        for level, (role, _) in enumerate(LEVELS):
            shape = _cells(levels == level, rates.x, rates.y)
            if shape is not None:
                axes.add_patch(PathPatch(shape, color=canvas.colour(role), linewidth=0))
        axes.set(xlim=(rates.x[0], rates.x[-1]), ylim=(0, rates.y[-1]))
        axes.set(xlabel="Optimizer steps", ylabel="Prompts seen, easiest on top")
        axes.yaxis.set_major_formatter(lambda value, _: drawing.compact(value))
        axes.grid(False)
        ends = ", ".join(
            f"{np.nanmean(column):.0%}"
            for column in (rates.rates[:, 0], rates.rates[:, -1])
            if np.isfinite(column).any()
        )
        label = f"{name}: pass rates of {rates.y[-1]} prompts, mean at start and end {ends}."
        return drawing.to_svg(axes, label, key)


def _cells(
    chosen: npt.NDArray[np.bool_], x: npt.NDArray[np.float64], y: npt.NDArray[np.int64]
) -> Path | None:
    """Return the outline of the chosen cells, neighbours in a row joined; None if none is."""
    boxes = []
    for row, cells in enumerate(chosen):
        turns = np.flatnonzero(np.diff(np.concatenate([[0], cells, [0]])))
        for left, right in turns.reshape(-1, 2):
            (a, b), (c, d) = (x[left], x[right]), (y[row], y[row + 1])
            boxes.append([(a, c), (b, c), (b, d), (a, d), (a, c)])
    if not boxes:
        return None
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(np.concatenate(boxes), codes * len(boxes))
