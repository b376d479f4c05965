"""Drawing base of the report's figures: palette, axes, and SVG that follows the page's colours.

An SVG is drawn in marker colours, which are then replaced by CSS variables, so that one drawing
serves the light and the dark page. Everything uses matplotlib's object interface: no global state.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

from onlinesel.report.summary import Arm

try:
    import jinja2  # noqa: F401
    import matplotlib
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = [
    "PALETTE",
    "Canvas",
    "Style",
    "Tip",
    "compact",
    "line",
    "name_rows",
    "percents",
    "save_png",
    "short",
    "styles_of",
    "to_svg",
]

PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#57606a", "#a3adb8"),
    "grid": ("#e3e6ea", "#30363d"),
    "card": ("#ffffff", "#171b21"),
    "base": ("#5b6470", "#b4bcc6"),
    "c1": ("#1f5fc4", "#74aaff"),
    "c2": ("#c8500c", "#ff9a57"),
    "c3": ("#0a7f62", "#40d2a6"),
    "c4": ("#9a2a93", "#e391ea"),
    "c5": ("#94690a", "#edc04a"),
    "c6": ("#0a7a99", "#5bd0ef"),
    "c7": ("#8a4b2c", "#d3a585"),
    "c8": ("#c2255c", "#ff8db4"),
    "s0": ("#c3c9d1", "#59636e"),
    "s1": ("#dfe3e8", "#39414b"),
    "s2": ("#b7d3f2", "#23405f"),
    "s3": ("#7fb0e8", "#2f6299"),
    "s4": ("#3f82d0", "#4b8edb"),
    "s5": ("#174f94", "#9cc8ff"),
}
"""Colours of the page and its figures by role: (on a light page, on a dark page)."""

# Colours that no figure uses otherwise, one per role, to be found again in the SVG text.
_MARKERS = {role: f"#0101{place:02x}" for place, role in enumerate(PALETTE, 16)}
_CYCLE = 8
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_NOISE = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>"
    r"""|\s(?:xmlns(?::\w+)?|version)="[^"]*"|;?\s*font-family: [^;"]*""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Style:
    """How an arm looks in every figure: role of its colour, marker and dashes.

    Example:
        >>> Style("c1", "o", "-").role
        'c1'
    """

    role: str
    marker: str
    dashes: str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Tip:
    """What a point of a figure says when it is pointed at; `x` and `y` are data.

    Example:
        >>> Tip(10, 2.5, "UDS, optimizer steps 10: 2.500").text
        'UDS, optimizer steps 10: 2.500'
    """

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Canvas:
    """Where a figure is drawn: an SVG of the page, or a light PNG.

    Example:
        >>> Canvas(svg=False).colour("card")
        '#ffffff'
    """

    svg: bool = True

    def colour(self, role: str) -> str:
        """Return the colour to draw `role` in."""
        return _MARKERS[role] if self.svg else PALETTE[role][0]

    @contextmanager
    def axes(
        self, width: float = 5.0, height: float = 3.1, columns: int = 1
    ) -> Iterator[list[Axes]]:
        """Yield the axes of a new figure of `width` by `height` inches."""
        ink, muted = self.colour("ink"), self.colour("muted")
        settings = {
            "svg.fonttype": "none", "svg.hashsalt": "onlinesel", "font.size": 10,
            "text.color": ink, "axes.labelcolor": muted, "axes.edgecolor": muted,
            "axes.facecolor": "none", "axes.titlesize": 11, "axes.titlelocation": "left",
            "xtick.color": muted, "ytick.color": muted, "grid.color": self.colour("grid"),
            "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            "figure.facecolor": "none" if self.svg else self.colour("card"),
        }  # fmt: skip
        with matplotlib.rc_context(settings):  # type: ignore[arg-type]
            figure = Figure(figsize=(width, height), layout="constrained")
            (FigureCanvasSVG if self.svg else FigureCanvasAgg)(figure)
            grid = figure.subplots(1, columns, squeeze=False)[0]
            for axes in grid:
                axes.grid(True, linewidth=0.8)
                axes.tick_params(length=0)
                axes.xaxis.set_major_locator(MaxNLocator(6))
                axes.xaxis.set_major_formatter(FuncFormatter(compact))
            yield list(grid)


def styles_of(arms: Iterable[Arm]) -> dict[str, Style]:
    """Return one style per arm name: grey dashes for the baseline, the same in every budget.

    Example:
        >>> styles_of([Arm("UDS", None, ()), Arm("Uniform", None, ())])["Uniform"].role
        'base'
    """
    names = {arm.name: arm.is_baseline for arm in arms}
    styles = {n: Style("base", "o", (0, (4, 2))) for n, is_base in names.items() if is_base}
    for place, name in enumerate(n for n, is_base in names.items() if not is_base):
        dashes = _DASHES[place // _CYCLE % len(_DASHES)]
        styles[name] = Style(f"c{place % _CYCLE + 1}", _SHAPES[place % _CYCLE], dashes)
    return styles


def compact(value: float, _position: int | None = None) -> str:
    """Return `value` as a short tick label.

    Example:
        >>> compact(20000), compact(1500000), compact(0.25), compact(400)
        ('20k', '1.5M', '0.25', '400')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}".replace("-", "−")


def short(text: str, length: int = 18) -> str:
    """Return `text`, cut to `length` characters for a tick label.

    Example:
        >>> short("a name that is far too long")
        'a name that is fa…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def line(
    axes: Axes,
    canvas: Canvas,
    x: Sequence[float] | npt.NDArray[np.float64],
    y: Sequence[float] | npt.NDArray[np.float64],
    style: Style,
    name: str = "",
    marks: Sequence[int] | None = None,
) -> None:
    """Draw the line of an arm, with a marker here and there, or at the points `marks`.

    Example:
        >>> canvas = Canvas()
        >>> with canvas.axes() as (axes,):
        ...     line(axes, canvas, [0.0, 1.0], [2.0, 1.0], Style("c1", "o", "-"))
    """
    if marks is None:
        marks = [*range(len(x) // 8, len(x) - len(x) // 8, max(1, len(x) // 4)), len(x) - 1]
    axes.plot(
        x, y, color=canvas.colour(style.role), marker=style.marker, markevery=sorted({*marks}),
        linestyle=style.dashes, linewidth=1.9, markersize=5.5, label=name or "_",
    )  # fmt: skip


def name_rows(axes: Axes, canvas: Canvas, names: Sequence[str]) -> None:
    """Name the rows of `axes`, which lie at 0, 1, ..., from the top.

    Example:
        >>> canvas = Canvas()
        >>> with canvas.axes() as (axes,):
        ...     name_rows(axes, canvas, ["UDS"])
    """
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.tick_params(axis="y", labelcolor=canvas.colour("ink"))
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(False, axis="y")


def percents(axes: Axes, which: str) -> None:
    """Label the ticks of one axis ("x" or "y") as shares of 1.

    Example:
        >>> with Canvas().axes() as (axes,):
        ...     percents(axes, "y")
    """
    getattr(axes, which + "axis").set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def to_svg(axes: Axes, label: str, key: str, tips: Sequence[Tip] = ()) -> str:
    """Return the figure of `axes` as inline SVG with accessible name `label`.

    Args:
        axes: Axes of an SVG `Canvas`.
        label: What the figure shows, for readers who cannot see it.
        key: Prefix of the ids inside, unique in the page.
        tips: What points say when they are pointed at; those outside the frame are left out.

    Example:
        >>> with Canvas().axes() as (axes,):
        ...     svg = to_svg(axes, "Loss", "f1")
        >>> "http" in svg, 'aria-label="Loss"' in svg
        (False, True)
    """
    text = io.StringIO()
    with warnings.catch_warnings():
        # The reader's own font draws the text, so a glyph that matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        _figure(axes).savefig(text, format="svg", metadata={"Date": None})
    svg = _NOISE.sub("", text.getvalue()).replace("xlink:href", "href").strip()
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for role, marker in _MARKERS.items():
        svg = svg.replace(marker, f"var(--{role})")
    svg = re.sub(r">\s+<", "><", svg)
    svg = svg.removesuffix("</svg>") + "".join(_spots(axes, tips)) + "</svg>"
    name = f'<svg role="img" aria-label="{escape(label, quote=True)}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: name, svg, count=1)


def _spots(axes: Axes, tips: Sequence[Tip]) -> Iterator[str]:
    """Yield an unseen circle over each point, with its text as the title a browser shows."""
    figure, box = _figure(axes), axes.get_position()
    width, height = 72 * figure.get_size_inches()  # an SVG has 72 units an inch
    for tip in tips:
        x, y = axes.transAxes.inverted().transform(axes.transData.transform((tip.x, tip.y)))
        if 0 <= x <= 1 and 0 <= y <= 1:
            left, top = (box.x0 + x * box.width) * width, (1 - box.y0 - y * box.height) * height
            yield (
                f'<circle class="tip" cx="{left:.1f}" cy="{top:.1f}" r="8" fill="transparent">'
                f"<title>{escape(tip.text)}</title></circle>"
            )


def save_png(axes: Axes, path: str | os.PathLike[str], dpi: int = 100) -> Path:
    """Write the figure of `axes` as PNG and return its path.

    Example:
        >>> import tempfile
        >>> with Canvas(svg=False).axes() as (axes,):
        ...     save_png(axes, Path(tempfile.mkdtemp()) / "a.png").name
        'a.png'
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        _figure(axes).savefig(Path(path), format="png", dpi=dpi)
    return Path(path)


def _figure(axes: Axes) -> Figure:
    assert isinstance(axes.figure, Figure)  # `Canvas` makes no subfigures
    return axes.figure
