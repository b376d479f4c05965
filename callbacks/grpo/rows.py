"""The rows of GRPO generation batches: take, join, mute, and move them between ranks.

A generation batch is a dictionary of tensors with one row a completion: prompts padded on the
left, completions on the right, and a few columns without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "ENTROPY",
    "ROWS",
    "TEMPERATURE",
    "TRAINS",
    "check_text",
    "join",
    "loss_mask",
    "move",
    "mute",
    "rows_of",
    "take",
    "trim",
]

ENTROPY = "onlinesel_entropy"
TEMPERATURE = "onlinesel_temperature"
TRAINS = "onlinesel_trains"
"""``(B,)`` which rows train, of a batch that muted rows fill up."""
ROWS = "onlinesel_rows"
"""How many rows of the whole batch train, over all ranks; in the same batches."""

Rows = dict[str, Tensor]

# What fills up a column; None is the tokenizer's padding.
_LEFT: dict[str, float | None] = {"prompt_ids": None, "prompt_mask": 0}
_RIGHT: dict[str, float | None] = {
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "old_per_token_logps": 0.0,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "importance_sampling_ratio": 1.0,
    ENTROPY: 0.0,
    TEMPERATURE: 1.0,
}
_PLAIN = ("advantages",)


def check_text(batch: Mapping[str, Any]) -> None:
    """Refuse batches with columns whose rows cannot be told apart here, as those of images."""
    known = (*_LEFT, *_RIGHT, *_PLAIN, "num_items_in_batch")
    other = sorted(name for name, value in batch.items() if name not in known and value is not None)
    if other:
        raise ValueError(
            f"RolloutSelection: generation batch must hold text rows only, got {', '.join(other)}. "
            "Use no gate, refill or rollout selection where prompts, tools or environments bring "
            "images."
        )


def rows_of(batch: Mapping[str, Any]) -> Rows:
    """Return the columns of a batch that have one entry a row."""
    known = (*_LEFT, *_RIGHT, *_PLAIN)
    return {name: batch[name] for name in known if batch.get(name) is not None}


def loss_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return which tokens of the completions carry loss: ``(B, T)``."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if batch.get("tool_mask") is not None else mask


def take(batch: Rows, rows: Sequence[int] | Tensor) -> Rows:
    """Return rows of a batch, in the given order."""
    index = torch.as_tensor(rows, dtype=torch.long, device=batch["prompt_ids"].device)
    return {name: value[index] for name, value in batch.items()}


def _widened(value: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - value.shape[1]
    return pad(value, (missing, 0) if left else (0, missing), value=fill) if missing > 0 else value


def join(batches: Iterable[Rows], pad_id: int) -> Rows:
    """Put batches below each other, padded to a common width.

    Raises:
        ValueError: They do not have the same columns.
    """
    parts = list(batches)
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        if part.keys() != parts[0].keys():
            raise ValueError(
                "RolloutSelection: generation batches must have the same columns, got "
                f"{sorted(part.keys() ^ parts[0].keys())} in some only. Let the trainer compute "
                "the same log-probabilities for every batch."
            )
    joined: Rows = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        left, table = name in _LEFT, {**_LEFT, **_RIGHT}
        whole = name == "importance_sampling_ratio" and all(v.shape[1] == 1 for v in values)
        if name in table and not whole:  # a ratio of whole sequences has no width to fill
            own = table[name]
            fill = pad_id if own is None else own
            width = max(value.shape[1] for value in values)
            values = [_widened(value, width, fill, left) for value in values]
        joined[name] = torch.cat(values)
    return joined


def trim(batch: Rows, multiple: int | None = None, pad_id: int = 0) -> Rows:
    """Cut columns that are padding in every row, to widths that are multiples of ``multiple``."""
    result = dict(batch)
    for names, mask, left in ((_LEFT, "prompt_mask", True), (_RIGHT, "completion_mask", False)):
        used = batch[mask].bool().any(dim=0)
        used = used.flip(0) if left else used
        width = max(int(used.nonzero().max()) + 1 if bool(used.any()) else 0, 1)
        width = -(-width // multiple) * multiple if multiple else width
        for name in names:
            if name in batch and batch[name].shape[1] == used.shape[0]:
                value, fill = batch[name], names[name]
                value = _widened(value, width, pad_id if fill is None else fill, left)
                result[name] = value[:, value.shape[1] - width :] if left else value[:, :width]
    return result


def mute(batch: Rows, rows: Sequence[int]) -> Rows:
    """Take the loss off some rows: they keep their place in the batch and train nothing."""
    result = dict(batch)
    for name in ("completion_mask", "tool_mask", "advantages"):
        if name in batch:
            result[name] = batch[name].clone()
            result[name][list(rows)] = 0
    return result


def move(leaving: Sequence[tuple[int, Rows]]) -> dict[int, Rows]:
    """Hand rows to all ranks; called by every rank, also by one with nothing to give.

    Args:
        leaving: Position in the final batch and the row (a batch of one).

    Returns:
        The rows that any rank handed in, by position, on the CPU.
    """
    cpu = [(at, {n: v.cpu() for n, v in trim(row).items()}) for at, row in leaving]
    return dict(gather_object(cpu))
