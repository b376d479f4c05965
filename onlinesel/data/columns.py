"""Any batch as named columns and back: dicts, tuples, lists, dataclasses and nestings of them.

Rows are chosen, moved and joined column by column; a user's loop wants its own structure back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from onlinesel.data.batch import has_rows

__all__ = ["Columns", "as_columns", "map_tensors"]

_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """A batch taken apart.

    Attributes:
        values: The leaves, by the path to them: ``"labels"``, ``"0"``, ``"inputs.pixels"``. A list
            or tuple among them has one entry a row.
        rebuild: Puts leaves of the same names into the batch's own structure.
    """

    values: dict[str, Any]
    rebuild: Callable[[Mapping[str, Any]], Any]


def as_columns(
    batch: Any, rows: int | None = None, layout: dict[str, bool] | None = None
) -> Columns:
    """Take a batch apart into its leaves.

    Mappings become plain dicts when they are put together again; tuples, named tuples, lists and
    dataclasses keep their type. Leaves that are missing then are left out, or None in named tuples
    and dataclasses, whose places are fixed.

    The batch itself is a container, and so are mappings, dataclasses and named tuples in it. A list
    or tuple further down is a container of columns if the tensors in it all have as many rows as
    the batch, and else one entry a row if it has that length.

    Args:
        batch: Nested mappings, tuples, lists and dataclasses of tensors and other values.
        rows: Rows of the batch, if they are known; else its tensors outside of lists tell.
        layout: Whether the lists at these paths have one entry a row. What a batch shows is noted,
            and decides where a later one could be read in both ways.

    Raises:
        ValueError: Two leaves of one name; or a list or tuple that is neither of the two, or both.

    Example:
        >>> import torch
        >>> columns = as_columns(({"pixels": torch.ones(2, 3), "texts": ["a", "b"]}, 3))
        >>> list(columns.values), columns.values["0.texts"]
        (['0.pixels', '0.texts', '1'], ['a', 'b'])
        >>> columns.rebuild({**columns.values, "1": 4})[1]
        4
    """
    sizes = (len(t) for t in _tensors(batch, top=True)) if rows is None else iter((rows,))
    values: dict[str, Any] = {}
    build = _take_apart(batch, "", values, next(sizes, None), {} if layout is None else layout)
    return Columns(values, build)


def _tensors(part: Any, *, top: bool = False, lists: bool = False) -> Iterator[Any]:
    """Yield the tensors and arrays with rows, also of lists if these are wanted."""
    if has_rows(part) and not isinstance(part, list | tuple):
        yield part
    elif top or lists or not _is_list(part):
        for child in (_children(part) or {}).values():
            yield from _tensors(child, lists=lists)


def _is_list(part: Any) -> bool:
    """Return whether a part may have one entry a row; the places of named tuples have names."""
    return isinstance(part, list | tuple) and not hasattr(part, "_fields")


def _take_apart(
    part: Any, path: str, found: dict[str, Any], rows: int | None, layout: dict[str, bool]
) -> Callable[[Mapping[str, Any]], Any]:
    items = _children(part)
    if items is None or (path and rows and _has_entry_a_row(part, path, rows, layout)):
        name = path or "batch"
        if name in found:
            raise ValueError(
                f"as_columns: names of a batch's parts must be different, got {name!r} twice. "
                "Rename one of them in the collator."
            )
        found[name] = part
        return lambda values: values.get(name, _MISSING)
    start = f"{path}." if path else ""
    builders = {n: _take_apart(c, f"{start}{n}", found, rows, layout) for n, c in items.items()}
    kind = dict if isinstance(part, Mapping) else type(part)  # and not the part, with all its rows
    return lambda values: _assemble(kind, {n: build(values) for n, build in builders.items()})


def _has_entry_a_row(part: Any, path: str, rows: int, layout: dict[str, bool]) -> bool:
    """Return whether a list or tuple has one entry a row, and is no container of columns."""
    if not _is_list(part) or not part:
        return False
    sizes = [len(tensor) for tensor in _tensors(part, lists=True)]
    columns, entries = bool(sizes) and set(sizes) == {rows}, len(part) == rows
    if columns and entries and path in layout:
        return layout[path]
    if columns == entries:
        got = "something that is both" if columns else f"a length of {len(part)}"
        raise ValueError(
            f"as_columns: {path!r} must have one entry per row ({rows}) or hold tensors of as many "
            f"rows, got {got}. Stack its entries to a tensor in the collator, or leave it out of "
            "the batch."
        )
    layout[path] = entries
    return entries


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a value with a function applied to every tensor in it, however deep it lies.

    Example:
        >>> import torch
        >>> from onlinesel.data.columns import map_tensors
        >>> map_tensors(torch.neg, [{"box": torch.ones(1)}, "no tensor"])
        [{'box': tensor([-1.])}, 'no tensor']
    """
    if isinstance(value, Tensor):
        return function(value)
    if _children(value) is None:
        return value
    columns = as_columns(value)
    return columns.rebuild({n: map_tensors(function, v) for n, v in columns.values.items()})


def _children(part: Any) -> dict[Any, Any] | None:
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, tuple | list):
        return dict(enumerate(part))
    if is_dataclass(part) and not isinstance(part, type):
        return {f.name: getattr(part, f.name) for f in fields(part)}
    return None


def _assemble(kind: Any, children: dict[Any, Any]) -> Any:
    make: Callable[..., Any] = kind
    if is_dataclass(kind):
        return make(**{k: _or_none(v) for k, v in children.items()})
    if hasattr(kind, "_fields"):
        return make(*map(_or_none, children.values()))
    present = {k: v for k, v in children.items() if v is not _MISSING}
    if kind is dict:
        return present
    return list(present.values()) if issubclass(kind, list) else tuple(present.values())


def _or_none(value: Any) -> Any:
    return None if value is _MISSING else value
