"""Figures about rows and steps: one panel each, as inline SVG for the page.

Each function returns None where the runs lack what it shows. Curves are in
`onlinesel.report.curves`, what is about generated completions in `rollout_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onlinesel.report import drawing, summary
from onlinesel.report.drawing import Canvas, Style
from onlinesel.report.summary import Arm

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

from onlinesel.report import kept

__all__ = [
    "Styles",
    "repeats",
    "score_histogram",
    "source_share",
    "step_time",
    "swatch",
    "token_lengths",
]

_Floats = npt.NDArray[np.float64]
Styles = Mapping[str, Style]


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
