"""Tables of rows and of prompts that a reader of the page can sort and search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from unicodedata import category

from onlinesel.report import kept, rollouts
from onlinesel.report.records import Row
from onlinesel.report.summary import Arm
from onlinesel.report.wording import DASH

try:
    import numpy as np
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = ["TEXT", "Cell", "Listing", "prompts", "rows", "shown"]

TEXT = 320
"""Characters of an example that the page shows."""

_MOST = 500
_SCORED = 3  # arms whose mean scores have a column


@dataclass(frozen=True)
class Cell:
    """What is printed, and the number to sort by; NaN where it sorts as text or is not known.

    Example:
        >>> Cell("3 of 5", 0.6).value
        0.6
    """

    text: str
    value: float = math.nan


@dataclass(frozen=True)
class Listing:
    """A table: the columns that hold numbers, its rows, and how many there are in all.

    Example:
        >>> Listing(("Row",), frozenset(), (), 0).rows
        ()
    """

    columns: tuple[str, ...]
    numbers: frozenset[int]
    rows: tuple[tuple[Cell, ...], ...]
    total: int


def rows(arms: Iterable[Arm], most: int = _MOST) -> Listing | None:
    """Return the rows that were looked at, and how often each arm trained them.

    Args:
        arms: Arms that chose rows; of one name only the first.
        most: Rows at most: those that were looked at most often.

    Example:
        >>> rows([]) is None
        True
    """
    chosen = {arm.name: arm for arm in reversed([*arms]) if any(run.choices for run in arm.runs)}
    named = dict(reversed(chosen.items()))
    columns: dict[str, dict[int, Cell]] = {}
    seen: dict[int, int] = {}
    for name, arm in named.items():
        flat = kept.decisions(arm)
        ids, trained, looked_at = kept.times_trained(flat)
        for each, n in zip(ids.tolist(), looked_at.tolist(), strict=True):
            seen[each] = seen.get(each, 0) + n
        columns[f"{name}: trained, of times looked at"] = _shares(ids, trained, looked_at)
        if len(named) <= _SCORED and np.isfinite(flat.scores).any():
            columns[f"{name}: mean score"] = _means(flat.ids, flat.scores)
    return _listing("Row", columns, seen, _pool(named.values()), most)


def prompts(arms: Iterable[Arm], most: int = _MOST) -> Listing | None:
    """Return the prompts that were generated for, their pass rates and how often they trained.

    Args:
        arms: Arms that generate; of one name only the first.
        most: Prompts at most: those generated for most often.

    Example:
        >>> prompts([]) is None
        True
    """
    columns: dict[str, dict[int, Cell]] = {}
    seen: dict[int, int] = {}
    named: dict[str, Arm] = {}
    for arm in arms:
        found = rollouts.groups(arm)
        known = found.prompts != -1
        if arm.name in named or not known.any():
            continue
        named[arm.name] = arm
        ids, place, groups = np.unique(
            found.prompts[known], return_inverse=True, return_counts=True
        )
        for each, n in zip(ids.tolist(), groups.tolist(), strict=True):
            seen[each] = seen.get(each, 0) + n
        columns[f"{arm.name}: pass rate"] = _means(found.prompts[known], found.rates[known])
        kept_groups = np.bincount(place, weights=found.kept[known], minlength=ids.size)
        columns[f"{arm.name}: groups trained, of those generated"] = _shares(
            ids, kept_groups.astype(np.int64), groups
        )
    return _listing("Prompt", columns, seen, _pool(named.values()), most)


def shown(text: str, most: int = TEXT) -> tuple[str, int]:
    """Return `text` as it is printed, and how many characters are left out.

    Control characters other than line breaks and tabs have no place in HTML, nor half characters.

    Example:
        >>> shown("one two three", 9)
        ('one two', 6)
    """
    text = "".join(c for c in text if c in "\n\t" or category(c) not in ("Cc", "Cs")).strip()
    head = text[:most]
    if len(text) > most and " " in head[most // 2 :]:
        head = head[: head.rindex(" ")].rstrip(" .,;:")
    return head, len(text) - len(head)


def _listing(
    what: str,
    columns: Mapping[str, Mapping[int, Cell]],
    seen: Mapping[int, int],
    pool: Mapping[int, Row],
    most: int,
) -> Listing | None:
    if not seen:
        return None
    ids = sorted(seen, key=lambda each: (-seen[each], each))[:most]
    sources = any(pool[each].source for each in ids if each in pool)
    texts = any(pool[each].text for each in ids if each in pool)
    head = [what, *["Source"] * sources, *columns, *["Text"] * texts]
    numbers = {0, *range(1 + sources, 1 + sources + len(columns))}
    table = []
    for each in ids:
        row = pool.get(each, Row(each, None, ""))
        text, rest = shown(row.text)
        cells = [Cell(str(each), float(each)), *[Cell(row.source or DASH)] * sources]
        cells += [column.get(each, Cell(DASH)) for column in columns.values()]
        table.append((*cells, *[Cell(text + "…" * bool(rest))] * texts))
    return Listing(tuple(head), frozenset(numbers), tuple(table), len(seen))


def _pool(arms: Iterable[Arm]) -> dict[int, Row]:
    return {each: row for arm in arms for run in arm.runs for each, row in run.rows.items()}


def _shares(
    ids: Sequence[int] | np.ndarray, part: np.ndarray, whole: np.ndarray
) -> dict[int, Cell]:
    listed = zip(np.asarray(ids).tolist(), part.tolist(), whole.tolist(), strict=True)
    return {each: Cell(f"{a} of {b}", a / b) for each, a, b in listed}


def _means(ids: np.ndarray, values: np.ndarray) -> dict[int, Cell]:
    """Return the mean of the finite values of each id."""
    finite = np.isfinite(values)
    distinct, place = np.unique(ids[finite], return_inverse=True)
    means = np.bincount(place, values[finite], distinct.size) / np.maximum(np.bincount(place), 1)
    pairs = zip(distinct.tolist(), means.tolist(), strict=True)
    return {each: Cell(f"{mean:.3g}".replace("-", "−"), mean) for each, mean in pairs}
