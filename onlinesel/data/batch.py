"""Rows of batches: take some, join them across micro-batches, count labels, deal them out.

A batch is a flat mapping of names to columns, as collators make it; one that is nested is taken
apart by :func:`onlinesel.data.columns.as_columns`. Everything with one entry a row follows its row:
tensors of any rank, arrays, lists and tuples. A batch whose rows cannot be told apart is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from onlinesel._base.host import host_columns, upload
from onlinesel.data.padding import (
    IGNORED_LABEL,
    Filling,
    are_labels,
    cut,
    filled,
    is_array,
    refuse_sizes,
    token_axes,
    used,
)

__all__ = [
    "IGNORED_LABEL",
    "SINGLE",
    "count_labels",
    "deal",
    "gather_rows",
    "gather_twice",
    "has_rows",
    "is_causal",
    "join_columns",
    "label_width",
    "mute_rows",
    "rows_in",
    "same_value",
    "take_rows",
    "trim",
]

Batch = Mapping[str, Any]

SINGLE = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
"""What belongs to a batch as a whole, and can be compared."""


def has_rows(value: Any) -> bool:
    """Return whether a column has one entry a row: a tensor or array, a list or a tuple."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return isinstance(value, list | tuple) or is_array(value)


def rows_in(batch: Batch, owner: str = "batch") -> int:
    """Return the number of rows of a batch, having checked that every column has that many.

    Args:
        batch: Columns with one entry a row, one of them a tensor or array at least; single values
            and other objects that have no length belong to the batch as a whole.
        owner: Name used in the error.

    Raises:
        ValueError: No tensor, columns that disagree, as in padding-free batches, or a container
            of which nobody knows what its entries are.

    Example:
        >>> import torch
        >>> from onlinesel.data.batch import rows_in
        >>> rows_in({"input_ids": torch.zeros(3, 5), "texts": ["a", "b", "c"]})
        3
    """
    sizes = {k: len(v) for k, v in batch.items() if has_rows(v)}
    tensors = [k for k in sizes if not isinstance(batch[k], list | tuple)]
    if not tensors or len(set(sizes.values())) != 1:
        raise ValueError(
            f"{owner}: columns must all have one entry per row in their first dimension, got "
            f"{sizes or sorted(batch)}. Collate rows side by side: packed, padding-free and "
            "flattened image batches cannot be selected by row."
        )
    for name, value in batch.items():
        strided = not isinstance(value, Tensor) or (
            value.layout is torch.strided and not value.is_nested
        )
        single = isinstance(value, (Tensor, *SINGLE)) or getattr(value, "ndim", None) == 0
        if strided and (name in sizes or single):
            continue
        if not strided or hasattr(value, "__len__") or hasattr(value, "__iter__"):
            raise ValueError(
                f"{owner}: {name!r} must be a tensor, an array or a list with one entry per row, "
                f"or a single value, got {type(value).__name__}. Convert it in the collator, or "
                "leave it out of the batch."
            )
    return sizes[tensors[0]]


def take_rows(batch: Batch, rows: Tensor | Sequence[int]) -> dict[str, Any]:
    """Return the given rows of a batch, in the given order.

    Example:
        >>> import torch
        >>> from onlinesel.data.batch import take_rows
        >>> batch = {"labels": torch.tensor([[1], [2], [3]]), "texts": ["a", "b", "c"]}
        >>> taken = take_rows(batch, [2, 0])
        >>> taken["labels"].tolist(), taken["texts"]
        ([[3], [1]], ['c', 'a'])
    """
    rows_in(batch)
    return _taken(batch, torch.as_tensor(rows, dtype=torch.int64).cpu())


def _taken(batch: Batch, index: Tensor) -> dict[str, Any]:
    numbers = index.tolist()
    devices = {value.device for value in batch.values() if isinstance(value, Tensor)}
    places = {device: upload(index, device) for device in devices}

    def taken(value: Any) -> Any:
        if not has_rows(value):
            return value
        if isinstance(value, Tensor):
            return value.index_select(0, places[value.device])
        if isinstance(value, list | tuple):
            return _sequence(value, (value[row] for row in numbers))
        return value[numbers]

    return {name: taken(value) for name, value in batch.items()}


def _sequence(like: Any, entries: Any) -> Any:
    return list(entries) if isinstance(like, list) else tuple(entries)


def trim(batch: Batch) -> dict[str, Any]:
    """Cut the columns, at either end, that are padding in every row of the batch.

    Needs a 2-D ``attention_mask``; without one nothing is cut, nor if another column may or may
    not belong to the tokens. At least one column stays.

    Example:
        >>> import torch
        >>> from onlinesel.data.batch import trim
        >>> row, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> trim({"input_ids": row, "attention_mask": mask})["input_ids"].tolist()
        [[5, 6]]
    """
    axes, (hosted,) = token_axes([batch]), host_columns([batch])[0]
    return cut(batch, axes, used({**batch, **hosted}, axes))


def gather_rows(
    batches: Sequence[Batch], rows: Sequence[tuple[int, int]], *, pad_id: int = 0
) -> dict[str, Any]:
    """Build one batch from rows of several batches, padded to their common width.

    Args:
        batches: Batches with the same columns; widths may differ.
        rows: ``(batch, row)`` pairs, in the order of the new batch; at least one.
        pad_id: Token that fills ``input_ids``.

    Returns:
        The new batch, its tensors contiguous. Padding goes on the side on which the batches already
        have it, and columns that are padding in every row are cut. What has a token dimension is
        known by its name, or by its size if that follows the width of the tokens through all of
        ``batches``; it is padded with what its own padding holds, or with 0 if it has none.

    Raises:
        ValueError: Columns or single values that differ between the batches, or sizes that neither
            agree nor follow the width of the tokens.

    Example:
        >>> import torch
        >>> from onlinesel.data.batch import gather_rows
        >>> one = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> two = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.tensor([[1]])}
        >>> gather_rows([one, two], [(1, 0), (0, 0)])["input_ids"].tolist()
        [[3, 0], [1, 2]]
    """
    hosted, _ = host_columns(batches)
    return gather_twice(batches, hosted, rows, pad_id=pad_id)[0]


def gather_twice(
    batches: Sequence[Batch],
    hosted: Sequence[Batch],
    rows: Sequence[tuple[int, int]],
    *,
    pad_id: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build one batch as :func:`gather_rows` does, and what the host knows of it.

    Args:
        batches: Batches on any device.
        hosted: Their labels and masks on the host, as
            :func:`onlinesel._base.host.host_columns` gives them; only these are read.
        rows: ``(batch, row)`` pairs.
        pad_id: Token that fills ``input_ids``.
    """
    runs: list[tuple[int, list[int]]] = []
    for source, row in rows:
        if not runs or runs[-1][0] != source:
            runs.append((source, []))
        runs[-1][1].append(row)
    _check_columns(batches)
    axes = token_axes(batches)
    pieces, known = [], []
    for source, picked in runs:
        rows_in(batches[source])
        index = torch.tensor(picked)
        piece, part = _taken(batches[source], index), _taken(hosted[source], index)
        windows = used(piece | part, axes)
        pieces.append(cut(piece, axes, windows))
        known.append(cut(part, axes, windows))
    if len(pieces) > 1:
        read = [{**batch, **part} for batch, part in zip(batches, hosted, strict=True)]
        filling = Filling.of(pieces, axes, read, pad_id)
        pieces, known = [_joined(pieces, filling)], [_joined(known, filling)]
    whole, part = pieces[0], known[0]
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in whole.items()}, part


def _check_columns(batches: Sequence[Batch]) -> None:
    """Refuse batches that have other columns than the first."""
    kinds = [{name: _kind(value) for name, value in batch.items()} for batch in batches]
    for other in kinds[1:]:
        if other != kinds[0]:
            different = {n for n, _ in kinds[0].items() ^ other.items()}
            raise ValueError(
                "gather_rows: batches must have the same columns where their rows are joined, got "
                f"others in {', '.join(sorted(different))}. Let the collator give every batch the "
                "same."
            )


def _kind(value: Any) -> str:
    """Return what a column is, as far as columns below each other must be the same."""
    if isinstance(value, Tensor):
        return f"tensor of {value.dim()} dimensions"
    return "array" if is_array(value) else "rows" if has_rows(value) else "value"


def _joined(pieces: Sequence[Batch], filling: Filling) -> dict[str, Any]:
    return {
        name: join_columns(name, filling.of_column(name, [piece[name] for piece in pieces]))
        for name in pieces[0]
    }


def join_columns(name: str, values: Sequence[Any]) -> Any:
    """Put the columns of one name below each other.

    Args:
        name: Names the column in the error.
        values: Tensors, arrays or sequences with one entry a row, or one value for each batch.

    Raises:
        ValueError: Sizes that do not agree, or different values for whole batches.
    """
    first = values[0]
    if isinstance(first, list | tuple):
        return _sequence(first, chain.from_iterable(values))
    if not has_rows(first):
        if not all(same_value(first, other) for other in values):
            raise ValueError(
                f"gather_rows: {name!r} must be the same for all batches whose rows are joined, "
                f"got {first!r} and others. Give it one entry per row, or leave it out."
            )
        return first
    shapes = [tuple(value.shape[1:]) for value in values]
    if len(set(shapes)) > 1:
        if not are_labels(name, first) or len({shape[1:] for shape in shapes}) > 1:
            refuse_sizes("gather_rows", name, shapes)
        # Of another sequence than the one that is read, as in encoder-decoder models.
        size = max(shape[0] for shape in shapes)
        values = [filled(v, (1,), size, fill=IGNORED_LABEL, left=False) for v in values]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    return sys.modules["numpy"].concatenate(list(values))


def same_value(one: Any, other: Any) -> bool:
    """Return whether two values that belong to whole batches are the same."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, SINGLE) or hasattr(one, "__array__"):
        return bool(one == other)
    return type(one) is type(other)


def mute_rows(batch: Batch, rows: Tensor) -> dict[str, Any]:
    """Take the loss off some rows: their labels become -100, so their gradient is exactly zero.

    Args:
        batch: Must hold ``labels``.
        rows: ``(N,)`` bool.
    """
    result = dict(batch)
    for name in ("labels", "shift_labels"):
        if name in result:
            value = result[name]
            shape = (-1,) + (1,) * (value.dim() - 1)
            muted = upload(rows, value.device).view(shape)
            result[name] = value.masked_fill(muted, IGNORED_LABEL)
    return result


def is_causal(batch: Batch) -> bool:
    """Return whether a batch is that of a causal language model: one integer label a token."""
    if "shift_labels" in batch:
        return True
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 2:
        return False
    return tokens is None or tokens.shape == labels.shape


def label_width(batch: Batch) -> int:
    """Return for how many tokens of each row a causal batch may take a loss."""
    return (
        batch["shift_labels"].shape[1] if "shift_labels" in batch else batch["labels"].shape[1] - 1
    )


def count_labels(batch: Batch) -> Tensor:
    """Return the number of tokens with a loss in each row of a causal batch: ``(N,)`` int64.

    The first label of a row has nothing that predicts it and does not count, unless the batch
    holds ``shift_labels``, which are aligned already.

    Raises:
        ValueError: The batch has no labels.
    """
    if "labels" not in batch and "shift_labels" not in batch:
        raise ValueError(
            f"count_labels: batch must hold 'labels', got {sorted(batch)}. Let the collator "
            "give the labels of a causal language model, -100 where no loss is taken."
        )
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return labels.ne(IGNORED_LABEL).sum(dim=1)


def deal(owners: Tensor, ranks: int) -> Tensor:
    """Deal rows to ranks so that all train equally many, moving as few rows as possible.

    Args:
        owners: ``(K,)`` int64, the rank that holds each kept row; any order, the same everywhere.
        ranks: Number of ranks.

    Returns:
        ``(K,)`` int64, the rank that trains each row. Counts differ by at most one, the first
        ranks taking the remainder; a rank that holds too many gives its last rows.

    Example:
        >>> import torch
        >>> from onlinesel.data.batch import deal
        >>> deal(torch.tensor([0, 0, 0, 1]), 2).tolist()
        [0, 0, 1, 1]
    """
    total, device = owners.shape[0], owners.device
    quota = torch.full((ranks,), total // ranks, device=device)
    quota[: total % ranks] += 1
    held = torch.bincount(owners, minlength=ranks)
    order = owners.argsort(stable=True)
    holder = owners[order]
    place = torch.arange(total, device=device) - (held.cumsum(0) - held)[holder]
    missing = (quota - held).clamp(min=0)
    target = owners.clone()
    target[order[place >= quota[holder]]] = torch.repeat_interleave(missing)
    return target
