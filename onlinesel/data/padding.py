"""The token dimensions of batches: which columns have one, how padding is cut and filled up.

A column has a token dimension if its name says so (``input_ids``, ``attention_mask``, ``labels``
and their like, with any prefix that they share), or if its size follows the width of the tokens
through batches of different widths. That a size happens to fit proves nothing: as long as nothing
else is known, such a column is left as it is, and so are the tokens beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "IGNORED_LABEL",
    "Filling",
    "TokenAxes",
    "are_labels",
    "cut",
    "filled",
    "fills",
    "is_array",
    "left_padded",
    "refuse_sizes",
    "token_axes",
    "token_width",
    "used",
]

IGNORED_LABEL = -100
"""The label of tokens that carry no loss, as in transformers."""

Batch = Mapping[str, Any]

_ANCHORS = ("input_ids", "inputs_embeds", "attention_mask")
_MASK = "attention_mask"
_NAMES = frozenset({
    *_ANCHORS, "labels", "shift_labels", "token_type_ids", "position_ids", "special_tokens_mask",
    "completion_mask", "assistant_masks", "loss_mask", "onlinesel_source",
})  # fmt: skip


def is_array(value: Any) -> bool:
    """Return whether a value is a numpy array of one entry a row; numpy is not imported for it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.ndim > 0


def _sizes(value: Any) -> tuple[int, ...]:
    """Return the shape of a column, ``()`` of what has none."""
    return tuple(value.shape) if isinstance(value, Tensor) or is_array(value) else ()


def are_labels(name: str, value: Any) -> bool:
    """Return whether a column holds labels of classes, of which -100 stands for none."""
    return name.endswith("labels") and not torch.as_tensor(value).is_floating_point()


@dataclass(frozen=True)
class TokenAxes:
    """Which columns of some batches have a token dimension, and of which tokens.

    Attributes:
        anchors: Name of the column that gives the width, by the prefix of its name: one for each
            kind of tokens, as ``""`` and ``"decoder_"``.
        columns: Prefix and dimensions of each column whose size is that width.
        fixed: Prefixes whose tokens are not cut, because a column may or may not belong to them.
    """

    anchors: dict[str, str]
    columns: dict[str, tuple[str, tuple[int, ...]]]
    fixed: frozenset[str]

    def widths(self, batch: Batch) -> dict[str, int]:
        """Return the width of each kind of tokens in one of the batches."""
        return {prefix: _sizes(batch[name])[-1 if _is_square(batch[name], name) else 1]
                for prefix, name in self.anchors.items()}  # fmt: skip


def _is_square(value: Any, name: str) -> bool:
    """Return whether a column is a mask of queries by keys: ``(N, T, T)`` or ``(N, H, T, T)``."""
    named = name.rpartition(".")[2] in (_MASK, f"decoder_{_MASK}")  # and not that of an image
    return named and len(_sizes(value)) in (3, 4)


def _anchors(batch: Batch) -> dict[str, str]:
    found: dict[str, str] = {}
    for anchor in _ANCHORS:
        for name, value in batch.items():
            flat = len(_sizes(value)) == (3 if anchor == "inputs_embeds" else 2)
            if name.endswith(anchor) and (flat or _is_square(value, name)):
                found.setdefault(name.removesuffix(anchor), name)
    if not found and len(_sizes(batch.get("labels"))) >= 2:
        found[""] = "labels"
    return found


def token_axes(batches: Sequence[Batch]) -> TokenAxes:
    """Find out which columns have a token dimension.

    Args:
        batches: With the same columns, before anything is cut off them. More of them tell more.

    Example:
        >>> import torch
        >>> from onlinesel.data.padding import token_axes
        >>> def batch(width):
        ...     return {"input_ids": torch.ones(2, width), "weight": torch.ones(2, width),
        ...             "pixels": torch.ones(2, 4)}
        >>> sorted(token_axes([batch(4), batch(5)]).columns)
        ['input_ids', 'weight']
        >>> token_axes([batch(4)]).fixed
        frozenset({''})
    """
    anchors = _anchors(batches[0])
    axes = TokenAxes(anchors, {}, frozenset())
    if not anchors:
        return axes
    widths = [axes.widths(batch) for batch in batches]
    columns: dict[str, tuple[str, tuple[int, ...]]] = {}
    fixed: set[str] = set()
    for name, first in batches[0].items():
        if isinstance(first, list | tuple):
            fixed |= {
                p
                for p in anchors
                if all(_all_long(b[name], w[p]) for b, w in zip(batches, widths, strict=True))
            }
            continue
        shapes = [_sizes(batch[name]) for batch in batches]
        if len(shapes[0]) < 2 or len({len(shape) for shape in shapes}) > 1:
            continue
        last = len(shapes[0]) - 1
        dims = (last - 1, last) if _is_square(first, name) else (1,)
        fitting = [
            p for p in anchors
            if all(s[d] == w[p] for s, w in zip(shapes, widths, strict=True) for d in dims)
        ]  # fmt: skip
        named = [p for p in fitting if name.startswith(p) and name.removeprefix(p) in _NAMES]
        proven = [p for p in fitting if len({w[p] for w in widths}) > 1]
        if fitting:
            columns[name] = ((named or proven or fitting)[0], dims)
        if not named and len(proven) != 1:
            fixed |= set(fitting)
    return TokenAxes(anchors, columns, frozenset(fixed))


def _all_long(rows: Any, width: int) -> bool:
    """Return whether each row's entry is a sequence of the width of the tokens."""
    return all((isinstance(row, list | tuple) or _sizes(row)) and len(row) == width for row in rows)


def token_width(batch: Batch) -> int | None:
    """Return the padded length ``T`` of a batch, None if it has no token dimension."""
    widths = TokenAxes(_anchors(batch), {}, frozenset()).widths(batch)
    return widths.get("", next(iter(widths.values()), None))


def left_padded(batch: Batch, prefix: str = "") -> bool:
    """Return whether any row of the batch is padded on the left."""
    mask = batch.get(prefix + _MASK)
    if mask is None or len(_sizes(mask)) != 2:
        return False
    mask = torch.as_tensor(mask)
    return bool(((mask[:, 0] == 0) & mask.any(dim=1)).any())  # and not padding from end to end


def used(batch: Batch, axes: TokenAxes) -> dict[str, slice]:
    """Return which columns are not padding in every row of a batch, where that is a part of them.

    Needs a 2-D mask of the tokens; without one nothing is known. There is one column at least.

    Args:
        batch: Rows of one of the batches that ``axes`` were found in; labels and masks are read.
        axes: What has a token dimension.

    Returns:
        By the prefix of the tokens.
    """
    found: dict[str, slice] = {}
    for prefix in axes.anchors:
        mask = batch.get(prefix + _MASK)
        if prefix in axes.fixed or mask is None or len(_sizes(mask)) != 2:
            continue
        places = torch.as_tensor(mask).ne(0).any(dim=0).nonzero().flatten()
        members = {n: dims for n, (p, dims) in axes.columns.items() if p == prefix}
        if not places.numel() or prefix + _MASK not in members:
            continue
        first, last = int(places[0]), int(places[-1]) + 1
        if first == 0 and last == mask.shape[1]:
            continue
        labels = (batch[n] for n in members if are_labels(n, batch[n]))
        if any(
            bool((part != IGNORED_LABEL).any())
            for v in labels
            for part in (v[:, :first], v[:, last:])
        ):
            continue  # not of these tokens, or a loss would be lost
        found[prefix] = slice(first, last)
    return found


def cut(batch: Batch, axes: TokenAxes, windows: Mapping[str, slice]) -> dict[str, Any]:
    """Cut token dimensions to the columns that :func:`used` named.

    Args:
        batch: Rows of one of the batches that ``axes`` were found in, or some columns of them.
        axes: What has a token dimension.
        windows: Columns that stay, by the prefix of the tokens.
    """
    result = dict(batch)
    for name, (prefix, dims) in axes.columns.items():
        if name in batch and prefix in windows:
            value = batch[name]
            result[name] = value[
                tuple(windows[prefix] if d in dims else slice(None) for d in range(value.ndim))
            ]
    return result


def fills(batches: Sequence[Batch], axes: TokenAxes, pad_id: int) -> dict[str, float | int | None]:
    """Return what padding holds in each column: what its name says, or what the padding shows.

    None stands for a mask of queries by keys, which is padded so that nothing sees the padding.

    Args:
        batches: As their collator made them.
        axes: What has a token dimension.
        pad_id: Token that fills ``input_ids``.
    """
    found: dict[str, float | int | None] = {}
    for name, (prefix, dims) in axes.columns.items():
        if len(dims) > 1:
            found[name] = None
        elif name.endswith("input_ids"):
            found[name] = pad_id
        elif are_labels(name, batches[0][name]):
            found[name] = IGNORED_LABEL
        elif name.removeprefix(prefix) in _NAMES:
            found[name] = 0
        else:
            found[name] = _shown(batches, name, prefix)
    return found


def _shown(batches: Sequence[Batch], name: str, prefix: str) -> float | int:
    """Return the one value that a column has wherever its tokens are padding; else 0."""
    values: set[float | int] = set()
    for batch in batches:
        mask = batch.get(prefix + _MASK)
        if mask is not None and len(_sizes(mask)) == 2:
            held = torch.as_tensor(batch[name])[torch.as_tensor(mask) == 0]
            values |= {v.item() for v in held.unique()} if held.numel() else set()
    return values.pop() if len(values) == 1 else 0


def filled(
    value: Any, dims: tuple[int, ...], width: int, *, fill: float | int | None, left: bool
) -> Any:
    """Fill up dimensions of a column to a width.

    Args:
        value: Tensor or array.
        dims: Which dimensions.
        width: Their new size.
        fill: What is put there; None for a mask of queries by keys.
        left: On which side.
    """
    missing = width - value.shape[dims[0]]
    if missing <= 0:
        return value
    tensor = torch.as_tensor(value)
    if fill is None:
        result = _widened_mask(tensor, missing)
    else:
        extra = (missing, 0) if left else (0, missing)
        result = pad(tensor, (*(0, 0) * (tensor.dim() - 1 - dims[0]), *extra), value=fill)
    return result if isinstance(value, Tensor) else result.numpy()


@dataclass(frozen=True)
class Filling:
    """How rows of several batches are filled up to one width.

    Attributes:
        axes: What has a token dimension.
        widest: Width by the prefix of the tokens; empty where all rows have it already.
        fills: What padding holds in each column.
        left: Whether padding goes on the left, by the prefix of the tokens.
    """

    axes: TokenAxes
    widest: dict[str, int]
    fills: dict[str, float | int | None]
    left: dict[str, bool]

    @classmethod
    def of(
        cls, pieces: Sequence[Batch], axes: TokenAxes, batches: Sequence[Batch], pad_id: int
    ) -> Filling:
        """Find it out.

        Args:
            pieces: The rows, of whose columns the shapes count.
            axes: What has a token dimension.
            batches: What they come from, whose values are read.
            pad_id: Token that fills ``input_ids``.
        """
        widths = [axes.widths(piece) for piece in pieces]
        widest = {prefix: max(w[prefix] for w in widths) for prefix in axes.anchors}
        if all(w == widest for w in widths):
            return cls(axes, {}, {}, {})
        left = {p: any(left_padded(batch, p) for batch in batches) for p in axes.anchors}
        return cls(axes, widest, fills(batches, axes, pad_id), left)

    def of_column(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Fill up one column of each piece."""
        prefix, dims = self.axes.columns.get(name, ("", ()))
        if not dims or not self.widest:
            return list(values)
        width, fill, left = self.widest[prefix], self.fills[name], self.left[prefix]
        return [filled(v, dims, width, fill=fill, left=left) for v in values]


def _widened_mask(mask: Tensor, missing: int) -> Tensor:
    """Widen ``(N, H, T, T)`` on the right: no old token sees a new one, and these see themselves.

    A query that may look at nothing would be no number, and poison what does not look at it. Masks
    that are added to the scores have nothing above 0.
    """
    added = mask.is_floating_point() and not bool((mask > 0).any())
    closed = torch.finfo(mask.dtype).min if added else 0
    wide = pad(mask, (0, missing, 0, missing), value=closed)
    new = torch.arange(wide.shape[-1] - missing, wide.shape[-1], device=mask.device)
    wide[..., new, new] = 0 if added else 1
    return wide


def refuse_sizes(owner: str, name: str, shapes: Sequence[Any]) -> NoReturn:
    """Refuse columns that cannot lie below each other."""
    raise ValueError(
        f"{owner}: rows of {name!r} must have one size, or follow the width of the tokens, where "
        f"batches are joined, got {sorted(set(shapes))}. Pad them to one size in the collator, or "
        "give the column as a list with one entry a row."
    )
