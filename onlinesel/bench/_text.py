"""Tables of results, and the frame of their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Column", "bars", "headline", "new_figure", "remarks", "speed_of", "table", "unmeasured"]

Entry = Mapping[str, Any]
Column = tuple[str, Callable[[Entry], float | None], str]
"""Heading, value of an entry (None leaves the cell empty), and format."""

_WIDTH = 11


def headline(result: Mapping[str, Any]) -> str:
    """Return where a result was measured, in one line."""
    where = result.get("gpu") or f"{result['processor']}, {result['threads']} thread(s)"
    return f"{result['dtype']} on {where}, torch {result['torch']}"


def table(title: str, entries: Sequence[Entry], columns: Sequence[Column]) -> str:
    """Return one line an entry; what has no numbers says why instead.

    Args:
        title: First line.
        entries: With ``label``, and maybe ``absent`` or ``failed``.
        columns: What is said about each.

    Example:
        >>> entries = [{"label": "a", "x": 0.5}, {"label": "b", "absent": "not installed"}]
        >>> print(table("T", entries, [("ms", lambda entry: entry["x"] * 1e3, ".1f")]))
        T
                  ms
        a      500.0
        b  not installed
    """
    left = max(len(entry["label"]) for entry in entries)
    lines = [title, " " * left + "".join(f"{heading:>{_WIDTH}}" for heading, *_ in columns)]
    for entry in entries:
        line = f"{entry['label']:{left}}"
        if "absent" in entry:
            line += f"  {entry['absent']}"
        elif "failed" in entry:
            line += f"  failed: {' '.join(entry['failed'].split())[:90]}"
        else:
            line += "".join(_cell(value(entry), form) for _, value, form in columns)
        lines.append(line.rstrip())
    return "\n".join(lines)


def speed_of(roof: Entry) -> Column:
    """Return the column of speeds, that of the bare product being 1."""
    seconds = roof.get("seconds")
    return "of GEMM", lambda entry: seconds / entry["seconds"] if seconds else None, ".2f"


def _cell(value: float | None, form: str) -> str:
    return " " * _WIDTH if value is None else f"{value:>{_WIDTH}{form}}"


def unmeasured(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for everything that gave no numbers.

    Example:
        >>> unmeasured([{"label": "Liger", "absent": "not installed"}, {"label": "x"}])
        ['Liger: not installed']
    """
    reasons = [(e["label"], e.get("absent") or e.get("failed")) for e in entries]
    return list(dict.fromkeys(f"{label.strip()}: {why}" for label, why in reasons if why))


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Return the notes of a result as lines below its table."""
    return [
        *(f"Note: {note}" for note in result["notes"]),
        *(f"Not measured: {note}" for note in result["not_measured"]),
    ]


def new_figure(name: str, panels: int, height: float) -> Any:
    """Return an empty figure of panels side by side.

    Args:
        name: Of the benchmark, for the error.
        panels: How many.
        height: In inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'onlinesel bench {name} --figure needs matplotlib: pip install "onlinesel[report]".'
        ) from error
    figure = Figure(figsize=(4.6 * panels, height), layout="constrained")
    figure.subplots(1, panels, squeeze=False)
    return figure


def bars(
    axes: Any, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str
) -> None:
    """Draw groups of horizontal bars with their numbers.

    A value of None is left out, and so is a group that has no other.

    Args:
        axes: Where.
        labels: Of the groups, the first on top.
        series: Values of each group, by the name of their series.
        unit: Label of the axis.
    """
    groups = enumerate(zip(*series.values(), strict=True))
    kept = [i for i, values in groups if any(value is not None for value in values)]
    labels = [labels[i] for i in kept]
    series = {name: [values[i] for i in kept] for name, values in series.items()}
    height = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        known = [(i, v) for i, v in enumerate(values) if v is not None]
        at = [i + (place - (len(series) - 1) / 2) * height for i, _ in known]
        drawn = axes.barh(at, [v for _, v in known], height, label=name)
        axes.bar_label(drawn, fmt="{:.4g}", padding=2, fontsize=6)
    axes.set_yticks(range(len(labels)), [label.strip() for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    if len(series) > 1:
        axes.legend(
            frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0),
            ncols=len(series), columnspacing=1, handlelength=1,
        )  # fmt: skip
