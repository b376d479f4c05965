"""Any batch as named columns and back: dicts, tuples, lists, dataclasses and nestings of them.

Rows are chosen, moved and joined column by column; a user's loop wants its own structure back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

__all__ = ["Columns", "as_columns"]

_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """A batch taken apart.

    Attributes:
        values: The leaves, by the path to them: ``"labels"``, ``"0"``, ``"inputs.pixels"``.
        rebuild: Puts leaves of the same names into the batch's own structure.
    """

    values: dict[str, Any]
    rebuild: Callable[[Mapping[str, Any]], Any]


def as_columns(batch: Any) -> Columns:
    """Take a batch apart into its leaves.

    Mappings become plain dicts when they are put together again; tuples, named tuples, lists and
    dataclasses keep their type. Leaves that are missing then are left out, or None in named tuples
    and dataclasses, whose places are fixed.

    Args:
        batch: Nested mappings, tuples, lists and dataclasses of tensors and other values.

    Example:
        >>> columns = as_columns(({"pixels": [1, 2]}, 3))
        >>> columns.values
        {'0.pixels.0': 1, '0.pixels.1': 2, '1': 3}
        >>> columns.rebuild({**columns.values, "1": 4})
        ({'pixels': [1, 2]}, 4)
    """
    values: dict[str, Any] = {}
    build = _take_apart(batch, "", values)
    return Columns(values, build)


def _take_apart(part: Any, path: str, found: dict[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    items = _children(part)
    if items is None:
        found[path or "batch"] = part
        return lambda values: values.get(path or "batch", _MISSING)
    start = f"{path}." if path else ""
    builders = {name: _take_apart(child, f"{start}{name}", found) for name, child in items.items()}
    kind = dict if isinstance(part, Mapping) else type(part)  # and not the part, with all its rows
    return lambda values: _assemble(kind, {n: build(values) for n, build in builders.items()})


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
