"""Collectives of the decision: gather what the ranks know, move the rows that change rank.

Every function here is called by all ranks at the same point, with the same number and shapes of
collectives whatever the data hold. Without a process group each is the identity. Ids travel as
int64 and scores as float32, separately: a float32 loses ids above 2**24.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onlinesel.batch import gather_rows, left_padded, token_width, widen
from onlinesel.types import Signals

__all__ = [
    "check_agreement",
    "exchange_rows",
    "gather_signals",
    "rank",
    "smallest_over_ranks",
    "stack_over_ranks",
    "sum_over_ranks",
    "world_size",
]


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def smallest_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    """Return the smallest of a number that every rank gives."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def stack_over_ranks(value: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the tensors of all ranks, of one shape, stacked in their order, on the CPU."""
    return torch.stack(_gather(value.to(device)) if world_size() > 1 else [value]).cpu()


def check_agreement(owner: str, *tensors: Tensor, device: torch.device | str = "cpu") -> None:
    """Raise on every rank if the ranks do not hold the same values.

    All ranks decide for themselves, which is exact as long as they compute the same bits; a
    processor of another make or a seed of its own would send rows astray without a word.

    Args:
        owner: Name used in the error.
        *tensors: What should be equal everywhere.
        device: Where the process group's tensors must live.

    Raises:
        ValueError: The values differ between ranks.
    """
    if world_size() == 1:
        return
    content = b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
    digests = torch.cat(_gather(torch.tensor([digest], device=device)))
    if not bool((digests == digest).all()):
        raise ValueError(
            f"{owner}: ranks must reach the same decision, got digests {digests.tolist()}. Give "
            "all ranks the same strategy, seed, checkpoint and kind of processor, or scope='rank'."
        )


def gather_signals(
    signals: Signals, device: torch.device | str = "cpu"
) -> tuple[Signals, list[int]]:
    """Concatenate the signals of all ranks, in the order of the ranks.

    Args:
        signals: This rank's candidates; ranks may hold different numbers of rows.
        device: Where the process group's tensors must live (the GPU for NCCL).

    Returns:
        The signals of all candidates, the same bits on every rank (on the CPU), and the number of
        rows of each rank.
    """
    if world_size() == 1:
        return signals.to("cpu"), [signals.size]
    counts = [int(c) for c in _gather(torch.tensor([signals.size], device=device))]
    padded = max(counts)
    columns: dict[str, Tensor] = {}
    for dtype in (torch.int64, torch.float32):
        named = {k: v for k, v in signals.present().items() if v.dtype == dtype}
        if not named:
            continue
        flat = torch.cat([v.reshape(signals.size, -1) for v in named.values()], dim=1).to(device)
        block = torch.zeros(padded, flat.shape[1], dtype=dtype, device=device)
        block[: signals.size] = flat
        whole = torch.cat([part[:n] for part, n in zip(_gather(block), counts, strict=True)]).cpu()
        widths = [v[0].numel() for v in named.values()]
        for (name, value), column in zip(named.items(), whole.split(widths, dim=1), strict=True):
            columns[name] = column.reshape(-1, *value.shape[1:])
    return Signals(**columns), counts


def exchange_rows(
    batches: Sequence[dict[str, Any]],
    local: Sequence[tuple[int, int]],
    owners: Tensor,
    targets: Tensor,
    *,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any] | None, list[int]]:
    """Send rows to the ranks that will train them.

    Args:
        batches: This rank's candidate batches, with the same keys on every rank.
        local: ``(batch, row)`` of each of this rank's rows among the ``K``, in their order.
        owners: ``(K,)`` rank that holds each row, the same on every rank.
        targets: ``(K,)`` rank that shall have it, the same on every rank.
        pad_id: Token that fills ``input_ids`` where rows of different widths meet.
        device: Where the process group's tensors must live.

    Returns:
        A batch of the rows that came to this rank (None if none did), and their positions among
        the ``K``, in the batch's order.
    """
    moved = (owners != targets).nonzero().flatten().tolist()
    if not moved:
        return None, []
    me = rank()
    mine = (owners == me).nonzero().flatten().tolist()
    leaving = [local[mine.index(k)] for k in moved if int(owners[k]) == me]
    # A rank that gives nothing still takes part, with a row of its own as the pattern.
    sample = gather_rows(batches, leaving or [(0, 0)], pad_id=pad_id)
    if world_size() == 1:
        raise ValueError(
            "exchange_rows: targets must be 0 without a process group, got "
            f"{targets.tolist()}. Start torch.distributed first."
        )
    sizes = [sum(int(owners[k]) == r for k in moved) for r in range(world_size())]
    width = torch.tensor([token_width(sample) or 0], device=device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    left = any(left_padded(batch) for batch in batches)
    sample = widen(sample, int(width), pad_id=pad_id, left=left)
    arrived: dict[str, Any] = {}
    for name in sorted(k for k, v in sample.items() if isinstance(v, Tensor) and v.dim()):
        value = sample[name].to(device)
        block = torch.zeros(max(sizes), *value.shape[1:], dtype=value.dtype, device=device)
        block[: len(leaving)] = value[: len(leaving)]
        whole = torch.cat([part[:n] for part, n in zip(_gather(block), sizes, strict=True)])
        arrived[name] = whole
    by_owner = sorted(moved, key=lambda k: int(owners[k]))
    picked = [i for i, k in enumerate(by_owner) if int(targets[k]) == me]
    if not picked:
        return None, []
    index = torch.tensor(picked, device=device)
    home = batches[0]
    batch = {
        name: arrived[name][index].to(home[name].device) if name in arrived else value
        for name, value in home.items()
    }
    return batch, [by_owner[i] for i in picked]
