"""Sums over the rows of a head's weight, of which no rank needs more than a chunk at a time.

Base, adapters and bias are columns of one matrix ``C = [W, B, b]``, and the weight that they
stand for is ``C T`` with ``T`` made of ones and the ``A`` of the adapters. What is linear in the
weight is summed over ``C`` and multiplied by ``T`` at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onlinesel.kernels._shards import local_rows, whole
from onlinesel.kernels.head import LMHead

__all__ = ["merge_columns", "sum_over_vocabulary"]


def sum_over_vocabulary(
    head: LMHead, part: Callable[[slice, Tensor], Tensor], chunk: int, dtype: torch.dtype
) -> Tensor:
    """Sum a function of the weight's rows, chunk by chunk; over the ranks if it is sharded.

    Args:
        head: Each rank works on the rows of its base that it holds.
        part: ``(entries, columns) -> Tensor`` of one fixed shape, float64: the vocabulary entries
            of a chunk, and their rows ``(n, d + k)`` of ``C``: base, each adapter's b, bias.
        chunk: Rows handed over at a time.
        dtype: Of the columns.

    Returns:
        The sum, the same on every rank.
    """
    base = head.base
    held = local_rows(base) if isinstance(base, Tensor) else None
    first, count = (0, head.vocab_size) if held is None else (held.first, len(held.values))
    extra = [low.b for low in head.low_rank]
    if head.bias is not None:
        extra.append(whole(head.bias).unsqueeze(1))
    total = None
    # An empty chunk gives zeros of the right shape, for a rank that holds no row.
    for start in range(0, max(count, 1), chunk):
        stop = min(start + chunk, count)
        rows = head.base_rows(start, stop) if held is None else held.values[start:stop]
        entries = slice(first + start, first + stop)
        columns = rows.to(dtype)
        if extra:
            columns = torch.cat([columns, *(x[entries].to(dtype) for x in extra)], 1)
        found = part(entries, columns)
        total = found if total is None else total + found
    assert total is not None
    return total if held is None else held.total(total)


def merge_columns(head: LMHead, total: Tensor) -> Tensor:
    """Multiply by ``T^T``: turn a sum over base, adapters and bias into that over the weight.

    Args:
        head: The head.
        total: ``(d + k, m)``, columns of ``C`` times something.

    Returns:
        ``(d, m)``, or ``(d + 1, m)`` with a bias, whose row is the last.
    """
    at = head.hidden_size
    merged = total[:at]
    for low in head.low_rank:
        rank = low.a.shape[0]
        merged = merged + low.a.to(total).T @ (low.scale * total[at : at + rank])
        at += rank
    return merged if head.bias is None else torch.cat((merged, total[at:]))
