"""Figures of the report: one panel each, as inline SVG for the page, and the README's PNG.

Each function returns None where the runs lack what it shows. What is about generated completions is
in `onlinesel.report.rollout_figures`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from onlinesel.report import drawing, summary
from onlinesel.report.drawing import Canvas, Style
from onlinesel.report.goals import scored, value_of
from onlinesel.report.records import Run
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

from onlinesel.report import kept

__all__ = [
    "AXES",
    "BUDGETS",
    "Styles",
    "headline_png",
    "held_out_curves",
    "repeats",
    "score_histogram",
    "source_share",
    "step_time",
    "swatch",
    "token_lengths",
]

AXES: Mapping[str, str] = {
    "cpu_seconds": "CPU seconds",
    "seconds": "Training seconds (wall clock)",
    "step": "Optimizer steps",
    "rows": "Rows trained",
    "rollouts": "Rollouts",
}
"""What held-out loss or reward is drawn against: number of an evaluation and its name."""

BUDGETS: Mapping[str | None, str] = {
    "time": "equal time",
    "steps": "equal steps",
    "rollouts": "equal rollouts",
    None: "no fixed budget",
}
"""Names of the budgets under which arms are compared."""

_CUT = 0.2
_Floats = npt.NDArray[np.float64]
Styles = Mapping[str, Style]


def held_out_curves(arms: Sequence[Arm], axis: str, styles: Styles, key: str) -> str | None:
    """Draw held-out loss or reward of every arm against `axis`: mean over seeds and 95 % band.

    Example:
        >>> held_out_curves([], "step", {}, "f1") is None
        True
    """
    if not any(_curve(arm, axis)[0].size for arm in arms):
        return None
    canvas = Canvas()
    with canvas.axes() as (axes,):
        _draw_curves(axes, canvas, arms, axis, styles)
        name = arms[0].goal.name.capitalize()
        label = f"{name} against {within(AXES[axis])}. " + _ends(arms)
        return drawing.to_svg(axes, label, key)


def score_histogram(decisions: kept.Decisions, style: Style, name: str, key: str) -> str | None:
    """Draw the scores of kept and dropped candidates; None without scores or without drops.

    Example:
        >>> arm = Arm("UDS", None, ())
        >>> score_histogram(kept.decisions(arm), Style("c1", "o", "-"), "UDS", "f1") is None
        True
    """
    finite = np.isfinite(decisions.scores)
    if not (finite & decisions.trained).any() or not (finite & ~decisions.trained).any():
        return None
    low, high = np.percentile(decisions.scores[finite], (0.25, 99.75))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 41)
    canvas = Canvas()
    with canvas.axes(height=2.6) as (axes,):
        dropped, _ = np.histogram(decisions.scores[finite & ~decisions.trained], edges)
        chosen, _ = np.histogram(decisions.scores[finite & decisions.trained], edges)
        total = int(finite.sum())
        axes.stairs(
            dropped / total, edges, fill=True, color=canvas.colour("s0"), label="dropped", alpha=0.8
        )
        colour = canvas.colour(style.role)
        axes.stairs(chosen / total, edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(chosen / total, edges, color=colour, linewidth=1.8, label="kept")
        drawing.percents(axes, "y")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="Score", ylabel="Share of candidates")
        axes.legend(frameon=False, loc="best", handlelength=1.2)
        label = f"{name}: histogram of the scores of kept and of dropped candidates."
        return drawing.to_svg(axes, label, key)


def source_share(
    arms: Sequence[Arm],
    shares: Sequence[tuple[_Floats, Mapping[str, _Floats]]],
    source: str,
    pool: float,
    styles: Styles,
    key: str,
) -> str | None:
    """Draw the share of `source` among the rows that trained, over optimizer steps.

    Args:
        arms: Arms of one budget.
        shares: For each of them, `kept.share_over_steps`.
        source: Source to draw.
        pool: Its share in the pool, drawn as a dotted line.
        styles: Style of each arm name.
        key: Prefix of the ids in the SVG.

    Example:
        >>> source_share([], [], "wiki", 0.5, {}, "f1") is None
        True
    """
    pairs = zip(arms, shares, strict=True)
    drawn = [(a, x, lines[source]) for a, (x, lines) in pairs if x.size and source in lines]
    if not drawn:
        return None
    canvas = Canvas()
    with canvas.axes(height=2.9) as (axes,):
        axes.axhline(pool, color=canvas.colour("ink"), linewidth=1.2, linestyle=(0, (1, 2)))
        for arm, x, share in drawn:
            drawing.line(axes, canvas, x, share, styles[arm.name])
        top = max([pool, *(float(share.max()) for *_, share in drawn)])
        axes.set_ylim(0, min(1.02, top * 1.15))
        drawing.percents(axes, "y")
        axes.set(xlabel="Optimizer steps", ylabel="Share of rows trained")
        label = f"Share of {source} among the rows trained, over steps; {pool:.0%} of the pool."
        return drawing.to_svg(axes, label, key)


def token_lengths(
    arms: Sequence[Arm], decided: Sequence[kept.Decisions], styles: Styles, key: str
) -> str | None:
    """Draw the mean tokens of kept and of dropped candidates, one line per arm.

    Example:
        >>> token_lengths([], [], {}, "f1") is None
        True
    """
    means = []
    for arm, flat in zip(arms, decided, strict=True):
        known = np.isfinite(flat.tokens)
        chosen, dropped = flat.tokens[known & flat.trained], flat.tokens[known & ~flat.trained]
        if chosen.size and dropped.size:
            means.append((arm, float(chosen.mean()), float(dropped.mean())))
    if not means:
        return None
    canvas = Canvas()
    with canvas.axes(height=0.9 + 0.42 * len(means)) as (axes,):
        for place, (arm, chosen_mean, dropped_mean) in enumerate(means):
            colour = canvas.colour(styles[arm.name].role)
            axes.plot([dropped_mean, chosen_mean], [place, place], color=colour, linewidth=2.2)
            axes.plot(dropped_mean, place, "o", ms=8, mfc=canvas.colour("card"), mec=colour, mew=2)
            axes.plot(chosen_mean, place, "o", ms=8, color=colour)
        drawing.name_rows(axes, canvas, [arm.name for arm, *_ in means])
        axes.margins(x=0.12)
        axes.set_xlabel("Mean tokens of a row: filled = kept, hollow = dropped")
        label = "Mean tokens, kept against dropped. " + " ".join(
            f"{arm.name}: {a:.1f} against {b:.1f}." for arm, a, b in means
        )
        return drawing.to_svg(axes, label, key)


def repeats(arms: Sequence[Arm], key: str) -> str | None:
    """Draw how often the rows of the pool trained: one bar of shares per arm.

    Example:
        >>> repeats([], "f1") is None
        True
    """
    known = [(arm, shares) for arm in arms if (shares := kept.repeats(arm)).size]
    if not known:
        return None
    canvas = Canvas()
    with canvas.axes(height=0.9 + 0.42 * len(known)) as (axes,):
        for place, (_, shares) in enumerate(known):
            left = 0.0
            for number, share in enumerate(shares):
                colour = canvas.colour(f"s{number}")
                hatch = "////" if number == 0 else None
                axes.barh(
                    place, share, left=left, height=0.62, color=colour, hatch=hatch,
                    edgecolor=canvas.colour("card"), linewidth=0.8,
                )  # fmt: skip
                left += float(share)
        drawing.name_rows(axes, canvas, [arm.name for arm, _ in known])
        axes.set_xlim(0, 1)
        axes.grid(False)
        drawing.percents(axes, "x")
        axes.set_xlabel("Share of the pool, by how often a row trained")
        label = "How often rows trained. " + " ".join(
            f"{arm.name}: {s[0]:.0%} never a candidate, {s[1]:.0%} candidates that never trained."
            for arm, s in known
        )
        return drawing.to_svg(axes, label, key)


def step_time(arms: Sequence[Arm], styles: Styles, key: str) -> str | None:
    """Draw the seconds of one step, scoring and training stacked, against the uniform step.

    Example:
        >>> step_time([], {}, "f1") is None
        True
    """
    costs = [(arm, cost) for arm in arms if (cost := summary.step_cost(arm))]
    if not costs:
        return None
    canvas = Canvas()
    with canvas.axes(height=1.0 + 0.42 * len(costs)) as (axes,):
        for place, (arm, cost) in enumerate(costs):
            colour = canvas.colour(styles[arm.name].role)
            axes.barh(place, cost.train, height=0.58, color=colour)
            axes.barh(
                place, cost.score, left=cost.train, height=0.58, color="none", hatch="////",
                edgecolor=colour, linewidth=1,
            )  # fmt: skip
        base = next((cost for arm, cost in costs if arm.is_baseline), None)
        if base:
            axes.axvline(
                base.step, color=canvas.colour("ink"), linewidth=1.3, linestyle=(0, (1, 2))
            )
        drawing.name_rows(axes, canvas, [arm.name for arm, _ in costs])
        axes.set_xlabel("Seconds per step: solid = training, hatched = scoring")
        label = "Seconds of one optimizer step. " + " ".join(
            f"{arm.name}: {c.train:.3g} training and {c.score:.3g} scoring." for arm, c in costs
        )
        return drawing.to_svg(axes, label, key)


def swatch(style: Style, key: str) -> str:
    """Draw the line and marker of an arm, an SVG with id `key` for the page to use again.

    Example:
        >>> swatch(Style("c1", "o", "-"), "k1").startswith("<svg")
        True
    """
    canvas = Canvas()
    with canvas.axes(0.5, 0.2) as (axes,):
        axes.axis("off")
        drawing.line(axes, canvas, np.array([0.0, 1.0, 2.0]), np.zeros(3), style, marks=[1])
        axes.lines[0].set(clip_on=False, in_layout=False)
        svg = drawing.to_svg(axes, "", key)
        return svg.replace('role="img" aria-label=""', f'id="{key}"')


def headline_png(
    runs: Iterable[Run], path: str | os.PathLike[str], *, axis: str | None = None
) -> Path:
    """Write one PNG of about 1200 x 600: held-out loss (or reward), a panel per budget.

    Args:
        runs: Runs of all arms, judged by the same goal.
        path: File to write.
        axis: What to draw against, a key of `AXES`; None for the clock of the runs.

    Example:
        >>> import tempfile
        >>> from onlinesel.report.records import Evaluation
        >>> run = Run(Path(), "UDS", evals=(Evaluation(0, 0.0, 0, 4.0),))
        >>> headline_png([run], Path(tempfile.mkdtemp()) / "headline.png").name
        'headline.png'
    """
    runs = list(runs)
    axis, arms = axis or summary.clock_of(runs), summary.group_arms(runs)
    budgets = list(dict.fromkeys(a.budget for a in arms if _curve(a, axis)[0].size))
    if not budgets:
        raise ValueError(
            f"headline_png: runs must hold a held-out loss or reward, got {len(runs)} runs without "
            f"one against {within(AXES.get(axis, axis))}. Log it with RunLog.evaluation."
        )
    canvas, styles = Canvas(svg=False), drawing.styles_of(arms)
    with canvas.axes(8, 4, len(budgets)) as panels:
        for axes, budget in zip(panels, budgets, strict=True):
            _draw_curves(axes, canvas, [a for a in arms if a.budget == budget], axis, styles)
            axes.set_title(_title(budget))
        drawn = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
        for axes in panels[1:]:
            drawn |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        panels[0].figure.legend(
            list(drawn.values()), list(drawn), loc="outside upper center",
            ncols=min(len(drawn), 5), frameon=False,
        )  # fmt: skip
        return drawing.save_png(panels[0], path, dpi=150)


def _title(budget: str | None) -> str:
    return BUDGETS.get(budget, str(budget)).capitalize()


def _ends(arms: Iterable[Arm]) -> str:
    ends = ((arm.name, summary.t_interval(summary.finals(arm))) for arm in arms)
    return "Final: " + ", ".join(f"{name} {end.text()}" for name, end in ends if end.n) + "."


def _curve(arm: Arm, axis: str) -> tuple[_Floats, _Floats, _Floats]:
    """Return a grid on `axis`, the mean loss or reward of the seeds there, and its half-width.

    What was evaluated is on the grid, see `_evaluated`.
    """
    lines = []
    for run in arm.runs:
        points = {
            place: value
            for evaluation, value in scored(run)
            if math.isfinite(value) and math.isfinite(place := value_of(evaluation, axis))
        }
        if points:
            lines.append((np.array(sorted(points)), np.array([points[x] for x in sorted(points)])))
    if not lines:
        return np.empty(0), np.empty(0), np.empty(0)
    # Only where every seed has been evaluated: the mean of fewer seeds would jump at the ends.
    start, stop = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if start > stop:
        return np.empty(0), np.empty(0), np.empty(0)
    places = [place for place in _evaluated([x for x, _ in lines], axis) if start <= place <= stop]
    grid = np.union1d(np.linspace(start, stop, 80 if stop > start else 1), places)
    values = np.array([np.interp(grid, x, y) for x, y in lines])
    found = [summary.t_interval(column) for column in values.T.tolist()]
    return grid, np.array([f.mean for f in found]), np.array([f.half for f in found])


def _evaluated(seeds: Sequence[_Floats], axis: str) -> _Floats:
    """Return where all seeds were evaluated; in seconds, where each evaluation was on average."""
    if axis.endswith("seconds") and len({len(places) for places in seeds}) == 1:
        mean: _Floats = np.mean(seeds, axis=0)
        return mean
    shared = seeds[0]
    for places in seeds[1:]:
        shared = np.intersect1d(shared, places)
    return shared


def _marks(arm: Arm, axis: str, grid: _Floats) -> list[int]:
    """Return the points of the grid that were evaluated; of many, about eight."""
    places = [
        np.array(sorted({p for e, v in scored(run) if math.isfinite(p := value_of(e, axis))
                         and math.isfinite(v)}))
        for run in arm.runs
    ]  # fmt: skip
    found = (
        np.isin(grid, _evaluated([each for each in places if each.size], axis))
        .nonzero()[0]
        .tolist()
    )
    return found[:: -(-len(found) // 8)] if found else []


def _draw_curves(
    axes: Axes, canvas: Canvas, arms: Iterable[Arm], axis: str, styles: Styles
) -> None:
    curves = [(arm, *_curve(arm, axis)) for arm in arms]
    curves = [curve for curve in curves if curve[1].size]
    for arm, x, mean, half in curves:
        style = styles[arm.name]
        if np.isfinite(half).all():
            axes.fill_between(
                x, mean - half, mean + half, color=canvas.colour(style.role), alpha=0.15, lw=0
            )
        drawing.line(axes, canvas, x, mean, style, arm.name, _marks(arm, axis, x))
    goal = curves[0][0].goal
    # The first steep descent of a loss would flatten the differences that matter: it may leave the
    # frame. A reward rises slowly, and where it starts is worth seeing.
    end = 0.0 if goal.higher else _CUT * max(float(x[-1]) for _, x, *_ in curves)
    shown = [mean[x >= end] for _, x, mean, _ in curves]
    top = max(float(part.max()) for part in shown if part.size)
    low = min(float(mean.min()) for _, _, mean, _ in curves)
    room = 0.06 * (top - low) or 0.05 * (abs(top) or 1)
    axes.set_ylim(low - room, top + room)
    axes.set(xlabel=AXES[axis], ylabel=goal.name.capitalize())
