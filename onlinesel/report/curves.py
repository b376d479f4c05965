"""Curves over time, steps, rows and rollouts: for the page, and as the README's PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from onlinesel.report import drawing, summary
from onlinesel.report.drawing import Canvas, Style, Tip
from onlinesel.report.goals import scored, trained, value_of
from onlinesel.report.records import Evaluation, Generation, Run
from onlinesel.report.summary import Arm
from onlinesel.report.wording import within

try:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = ["AXES", "BUDGETS", "headline_png", "held_out_curves", "own_axis", "training_curves"]

AXES: Mapping[str, str] = {
    "cpu_seconds": "CPU seconds",
    "seconds": "Training seconds (wall clock)",
    "step": "Optimizer steps",
    "rows": "Rows trained",
    "rollouts": "Rollouts",
}
"""What loss or reward is drawn against: number of an evaluation and its name."""

BUDGETS: Mapping[str | None, str] = {
    "time": "equal time",
    "steps": "equal steps",
    "rollouts": "equal rollouts",
    None: "no fixed budget",
}
"""Names of the budgets under which arms are compared."""

_CUT = 0.2
_TIPS = 40  # points of a curve that say their value
_Floats = npt.NDArray[np.float64]
_Points = Callable[[Run], Sequence[tuple[Evaluation | Generation, float]]]


def own_axis(budget: str | None, clock: str) -> str:
    """Return what runs of `budget` are drawn over first: what they have equally much of.

    Example:
        >>> own_axis("steps", "seconds"), own_axis("time", "seconds"), own_axis(None, "seconds")
        ('step', 'seconds', 'seconds')
    """
    return {"steps": "step", "rollouts": "rollouts"}.get(budget or "", clock)


def held_out_curves(
    arms: Sequence[Arm], axis: str, styles: Mapping[str, Style], key: str
) -> str | None:
    """Draw held-out loss or reward of every arm against `axis`: mean over seeds and 95 % band.

    Example:
        >>> held_out_curves([], "step", {}, "f1") is None
        True
    """
    return _curves(arms, axis, styles, key, scored)


def training_curves(
    arms: Sequence[Arm], axis: str, styles: Mapping[str, Style], key: str
) -> str | None:
    """Draw the loss or reward that was logged while training, as `held_out_curves` does.

    Example:
        >>> training_curves([], "step", {}, "f1") is None
        True
    """
    return _curves(arms, axis, styles, key, trained)


def headline_png(
    runs: Iterable[Run], path: str | os.PathLike[str], *, axis: str | None = None
) -> Path:
    """Write one PNG of about 1200 x 600: held-out loss (or reward), a panel per budget.

    Args:
        runs: Runs of all arms, judged by the same goal.
        path: File to write.
        axis: What to draw against, a key of `AXES`; None for what each budget fixes, see
            `own_axis`: equal time over the runs' clock, equal steps over steps.

    Example:
        >>> import tempfile
        >>> run = Run(Path(), "UDS", evals=(Evaluation(0, 0.0, 0, 4.0),))
        >>> headline_png([run], Path(tempfile.mkdtemp()) / "headline.png").name
        'headline.png'
    """
    runs = list(runs)
    clock, arms = summary.clock_of(runs), summary.group_arms(runs)
    axes_of = {a.budget: axis or own_axis(a.budget, clock) for a in arms}
    budgets = [b for b, x in axes_of.items() if _drawable([a for a in arms if a.budget == b], x)]
    if not budgets:
        named = ", ".join(within(AXES.get(x, x)) for x in dict.fromkeys(axes_of.values()))
        raise ValueError(
            f"headline_png: runs must hold a held-out loss or reward, got {len(runs)} runs without "
            f"one against {named or 'anything'}. Log it with RunLog.evaluation."
        )
    canvas, styles = Canvas(svg=False), drawing.styles_of(arms)
    with canvas.axes(8, 4, len(budgets)) as panels:
        for axes, budget in zip(panels, budgets, strict=True):
            shown = [a for a in arms if a.budget == budget]
            _draw_curves(axes, canvas, shown, axes_of[budget], styles, scored)
            axes.set_title(BUDGETS.get(budget, str(budget)).capitalize())
        drawn = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
        for axes in panels[1:]:
            drawn |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        panels[0].figure.legend(
            list(drawn.values()), list(drawn), loc="outside upper center",
            ncols=min(len(drawn), 5), frameon=False,
        )  # fmt: skip
        return drawing.save_png(panels[0], path, dpi=150)


def _drawable(arms: Iterable[Arm], axis: str, points: _Points = scored) -> bool:
    return any(_curve(arm, axis, points)[0].size for arm in arms)


def _curves(
    arms: Sequence[Arm], axis: str, styles: Mapping[str, Style], key: str, points: _Points
) -> str | None:
    if not _drawable(arms, axis, points):
        return None
    canvas = Canvas()
    with canvas.axes() as (axes,):
        tips = _draw_curves(axes, canvas, arms, axis, styles, points)
        label = f"{_name(arms[0], points)} against {within(AXES[axis])}. "
        ends = (
            (arm.name, summary.t_interval(p[-1][1] for r in arm.runs if (p := points(r))))
            for arm in arms
        )
        label += "Final: " + ", ".join(f"{name} {end.text()}" for name, end in ends if end.n) + "."
        return drawing.to_svg(axes, label, key, tips)


def _name(arm: Arm, points: _Points) -> str:
    return arm.goal.name.capitalize() if points is scored else f"Training {arm.goal.field}"


def _curve(arm: Arm, axis: str, points: _Points = scored) -> tuple[_Floats, _Floats, _Floats]:
    """Return a grid on `axis`, the mean loss or reward of the seeds there, and its half-width.

    What was evaluated is on the grid, see `_evaluated`.
    """
    lines = []
    for run in arm.runs:
        found = {
            place: value
            for record, value in points(run)
            if math.isfinite(value) and math.isfinite(place := value_of(record, axis))
        }
        if found:
            lines.append((np.array(sorted(found)), np.array([found[x] for x in sorted(found)])))
    if not lines:
        return np.empty(0), np.empty(0), np.empty(0)
    # Only where every seed has been evaluated: the mean of fewer seeds would jump at the ends.
    start, stop = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if start > stop:
        return np.empty(0), np.empty(0), np.empty(0)
    places = [place for place in _evaluated([x for x, _ in lines], axis) if start <= place <= stop]
    grid = np.union1d(np.linspace(start, stop, 80 if stop > start else 1), places)
    values = np.array([np.interp(grid, x, y) for x, y in lines])
    measured = [summary.t_interval(column) for column in values.T.tolist()]
    return grid, np.array([f.mean for f in measured]), np.array([f.half for f in measured])


def _evaluated(seeds: Sequence[_Floats], axis: str) -> _Floats:
    """Return where all seeds were evaluated; in seconds, where each evaluation was on average."""
    if axis.endswith("seconds") and len({len(places) for places in seeds}) == 1:
        mean: _Floats = np.mean(seeds, axis=0)
        return mean
    shared = seeds[0]
    for places in seeds[1:]:
        shared = np.intersect1d(shared, places)
    return shared


def _marks(
    arm: Arm, axis: str, grid: _Floats, points: _Points = scored, most: int = 8
) -> list[int]:
    """Return the points of the grid that were evaluated; of many, about `most` and the last."""
    places = [
        np.array(sorted({p for e, v in points(run) if math.isfinite(p := value_of(e, axis))
                         and math.isfinite(v)}))
        for run in arm.runs
    ]  # fmt: skip
    found: list[int] = (
        np.isin(grid, _evaluated([each for each in places if each.size], axis))
        .nonzero()[0]
        .tolist()
    )
    return found[:: -max(1, -(-len(found) // most))] if found else []


def _draw_curves(
    axes: Axes,
    canvas: Canvas,
    arms: Iterable[Arm],
    axis: str,
    styles: Mapping[str, Style],
    points: _Points,
) -> list[Tip]:
    """Draw the curves, and return what their points say."""
    curves = [(arm, *_curve(arm, axis, points)) for arm in arms]
    curves = [curve for curve in curves if curve[1].size]
    tips = []
    for arm, x, mean, half in curves:
        style = styles[arm.name]
        if np.isfinite(half).all():
            axes.fill_between(
                x, mean - half, mean + half, color=canvas.colour(style.role), alpha=0.15, lw=0
            )
        drawing.line(axes, canvas, x, mean, style, arm.name, _marks(arm, axis, x, points))
        for place in _marks(arm, axis, x, points, _TIPS):
            value = summary.Interval(float(mean[place]), float(half[place]), len(arm.runs)).text()
            where = f"{within(AXES[axis])} {drawing.compact(float(x[place]))}"
            tips.append(Tip(float(x[place]), float(mean[place]), f"{arm.name}, {where}: {value}"))
    goal = curves[0][0].goal
    # The first steep descent of a loss would flatten the differences that matter: it may leave the
    # frame. A reward rises slowly, and where it starts is worth seeing.
    end = 0.0 if goal.higher else _CUT * max(float(x[-1]) for _, x, *_ in curves)
    shown = [mean[x >= end] for _, x, mean, _ in curves]
    top = max(float(part.max()) for part in shown if part.size)
    low = min(float(mean.min()) for _, _, mean, _ in curves)
    room = 0.06 * (top - low) or 0.05 * (abs(top) or 1)
    axes.set_ylim(low - room, top + room)
    axes.set(xlabel=AXES[axis], ylabel=_name(curves[0][0], points))
    return tips
