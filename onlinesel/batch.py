"""Rows of batches: take some, join them across micro-batches, trim padding, deal them out.

A batch is a mapping of names to tensors, as collators make it. Rows are moved as they are, with
every tensor that belongs to them; a batch whose rows cannot be told apart is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "IGNORED_LABEL",
    "count_labels",
    "deal",
    "gather_rows",
    "is_causal",
    "label_width",
    "left_padded",
    "mute_rows",
    "rows_in",
    "take_rows",
    "token_width",
    "trim",
    "widen",
]

IGNORED_LABEL = -100
"""The label of tokens that carry no loss, as in transformers."""

Batch = Mapping[str, Any]


def rows_in(batch: Batch, owner: str = "batch") -> int:
    """Return the number of rows of a batch, having checked that every tensor has that many.

    Args:
        batch: Tensors whose first dimension is the row; other values are left alone.
        owner: Name used in the error.

    Raises:
        ValueError: No tensor, or tensors that disagree, as in padding-free batches.

    Example:
        >>> import torch
        >>> from onlinesel.batch import rows_in
        >>> rows_in({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(3, 5)})
        3
    """
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    if not sizes or len(set(sizes.values())) != 1:
        raise ValueError(
            f"{owner}: tensors must all have one entry per row in their first dimension, got "
            f"{sizes or sorted(batch)}. Collate rows side by side: packed, padding-free and "
            "flattened image batches cannot be selected by row."
        )
    return next(iter(sizes.values()))


def take_rows(batch: Batch, rows: Tensor | Sequence[int]) -> dict[str, Any]:
    """Return the given rows of a batch, in the given order.

    Example:
        >>> import torch
        >>> from onlinesel.batch import take_rows
        >>> take_rows({"labels": torch.tensor([[1], [2], [3]])}, [2, 0])["labels"].tolist()
        [[3], [1]]
    """
    rows_in(batch)
    index = torch.as_tensor(rows, dtype=torch.int64)
    return {
        k: v[index.to(v.device)] if isinstance(v, Tensor) and v.dim() else v
        for k, v in batch.items()
    }


def token_width(batch: Batch) -> int | None:
    """Return the padded length ``T`` of a batch, None if it has no token dimension."""
    for name in ("input_ids", "labels", "attention_mask"):
        if name in batch and batch[name].dim() >= 2:
            return batch[name].shape[1]
    return None


def left_padded(batch: Batch) -> bool:
    """Return whether any row of the batch is padded on the left."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.dim() == 2 and bool((mask[:, :1] == 0).any())


def trim(batch: Batch) -> dict[str, Any]:
    """Cut the columns, at either end, that are padding in every row of the batch.

    Needs a 2-D ``attention_mask``; without one nothing is cut. At least one column stays.

    Example:
        >>> import torch
        >>> from onlinesel.batch import trim
        >>> row, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> trim({"input_ids": row, "attention_mask": mask})["input_ids"].tolist()
        [[5, 6]]
    """
    mask, width = batch.get("attention_mask"), token_width(batch)
    if mask is None or mask.dim() != 2:
        return dict(batch)
    used = mask.ne(0).any(dim=0).nonzero().flatten()
    if not used.numel() or (int(used[0]) == 0 and int(used[-1]) == mask.shape[1] - 1):
        return dict(batch)
    window = slice(int(used[0]), int(used[-1]) + 1)
    return {
        k: v[:, window] if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[1] == width else v
        for k, v in batch.items()
    }


def widen(batch: Batch, width: int, *, pad_id: int = 0, left: bool = False) -> dict[str, Any]:
    """Pad the token dimension of a batch to ``width``: labels with -100, masks with 0."""
    old = token_width(batch)
    if old is None or old == width:
        return dict(batch)
    fill = {"labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL, "input_ids": pad_id}
    result = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == old:
            extra = (width - old, 0) if left else (0, width - old)
            trailing = (0, 0) * (value.dim() - 2)
            value = pad(value, (*trailing, *extra), value=fill.get(name, 0))
        result[name] = value
    return result


def gather_rows(
    batches: Sequence[Batch], rows: Sequence[tuple[int, int]], *, pad_id: int = 0
) -> dict[str, Any]:
    """Build one batch from rows of several batches, padded to their common width.

    Args:
        batches: Batches with the same keys; widths may differ.
        rows: ``(batch, row)`` pairs, in the order of the new batch; at least one.
        pad_id: Token that fills ``input_ids``.

    Returns:
        The new batch. Padding goes on the side on which the batches already have it, and columns
        that are padding in every row are cut.

    Example:
        >>> import torch
        >>> from onlinesel.batch import gather_rows
        >>> one = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> two = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.tensor([[1]])}
        >>> gather_rows([one, two], [(1, 0), (0, 0)])["input_ids"].tolist()
        [[3, 0], [1, 2]]
    """
    runs: list[tuple[int, list[int]]] = []
    for source, row in rows:
        if not runs or runs[-1][0] != source:
            runs.append((source, []))
        runs[-1][1].append(row)
    left = any(left_padded(batch) for batch in batches)
    pieces = [trim(take_rows(batches[source], picked)) for source, picked in runs]
    if len(pieces) == 1:
        return pieces[0]
    width = max(token_width(piece) or 0 for piece in pieces)
    pieces = [widen(piece, width, pad_id=pad_id, left=left) for piece in pieces]
    return {
        name: torch.cat([piece[name] for piece in pieces])
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in pieces[0].items()
    }


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
            result[name] = value.masked_fill(rows.to(value.device).view(shape), IGNORED_LABEL)
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
        >>> from onlinesel.batch import deal
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
