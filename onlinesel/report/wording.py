"""How the report writes numbers: tables of cells, counts, shares, intervals, differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from onlinesel.report.goals import Goal
from onlinesel.report.summary import Interval

__all__ = [
    "DASH",
    "Table",
    "axis_name",
    "count",
    "gap",
    "held_out",
    "listed",
    "markdown",
    "percent",
    "percents",
    "seconds",
    "signed",
    "within",
]

DASH = "–"
"""What stands for a number that is not known."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the arm.

    Example:
        >>> Table(("Arm",), (("UDS",),)).rows[0]
        ('UDS',)
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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


def percent(share: float) -> str:
    """Return a share of 1 as a short percentage.

    Example:
        >>> percent(0.25)
        '25\\xa0%'
    """
    return f"{100 * share:.3g}\u00a0%"


def percents(share: Interval | None, digits: int = 1) -> str:
    """Return a share of 1 over seeds as a percentage with its interval.

    Example:
        >>> percents(Interval(0.25, 0.01, 3)), percents(None)
        ('25.0 ± 1.0 %', '–')
    """
    if share is None or not share.n:
        return DASH
    return Interval(100 * share.mean, 100 * share.half, share.n).text(digits) + " %"


def held_out(value: Interval, goal: Goal) -> str:
    """Return a held-out loss or reward; a small loss gets more digits.

    Example:
        >>> held_out(Interval(2.5, 0.1, 3), Goal("loss"))
        '2.500 ± 0.100'
    """
    return value.text(3 if goal.higher or not value.mean < 0.1 else 5)


def signed(value: Interval) -> str:
    """Return a difference with its sign.

    Example:
        >>> signed(Interval(0.5, 0.1, 3))
        '+0.500 ± 0.100'
    """
    return ("+" if value.mean > 0 else "") + value.text(3)


def count(values: Sequence[float]) -> str:
    """Return the mean of `values` as a whole number.

    Example:
        >>> count([1000, 2000]), count([])
        ('1\\u202f500', '–')
    """
    return f"{fmean(values):,.0f}".replace(",", "\u202f") if values else DASH


def seconds(value: float) -> str:
    """Return a duration.

    Example:
        >>> seconds(1.5), seconds(0.02)
        ('1.50 s', '20 ms')
    """
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def axis_name(axis: str) -> str:
    """Return the name of what runs are measured along.

    Example:
        >>> axis_name("cpu_seconds")
        'CPU seconds'
    """
    names = {"cpu_seconds": "CPU seconds", "seconds": "Training seconds"}
    return names.get(axis, axis.capitalize() + "s" * (axis == "step"))


def within(name: str) -> str:
    """Return the name of an axis as it is written within a sentence.

    Example:
        >>> within("Rows trained"), within("CPU seconds")
        ('rows trained', 'CPU seconds')
    """
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def listed(names: Iterable[str]) -> str:
    """Return the distinct `names`, six at most.

    Example:
        >>> listed("abcdefgha")
        'a, b, c, d, e, f and 2 more'
    """
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - 6} more" if len(distinct) > 6 else ""
    return ", ".join(distinct[:6]) + more


def gap(difference: Interval, name: str) -> str:
    """Return the end of a sentence about a difference to `name`, and what the seeds say of it.

    Example:
        >>> gap(Interval(-0.5, 0.1, 3), "uniform")
        ', 0.500 below uniform (± 0.100, paired by seed).'
    """
    if not difference.n:
        return f"; it shares no seed with {name}."
    size = f", {abs(difference.mean):.3f} {'below' if difference.mean < 0 else 'above'} {name}"
    if difference.n == 1:
        return f"{size} on one shared seed, which says nothing about other seeds."
    half = f" (± {difference.half:.3f}, paired by seed)"
    if abs(difference.mean) <= difference.half:
        return f"{size}{half}: the seeds do not separate the two."
    return f"{size}{half}."
