"""Sorted runs: tables of rows by ascending id, their merging, and finding ids in them.

A :class:`onlinesel.Ledger` is a few of these, each much larger than the next, of which the newer
ones win: O'Neil et al., "The Log-Structured Merge-Tree" (Acta Informatica 33, 1996). Nothing is
changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RATIO", "Run", "SMALL", "find", "merged", "settled", "size", "surplus"]

Run = dict[str, Tensor]
"""``ids`` (n,) int64, ascending without repetition, and columns of the same length."""

RATIO = 8
"""A run is merged into the one before it unless that one is so many times larger: more of them
are rewritten less often, and have to be searched one by one."""

SMALL = 4096
"""A run below this size takes the next one in whatever its size: that costs less than a search."""


def size(run: Run) -> int:
    """Return the number of rows of a run."""
    return run["ids"].shape[0]


def _place(run: Run, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many ids of a run, which is not empty, are below each id, and whether it has it.

    Args:
        run: The run.
        ids: ``(N,)`` int64 in any order.
    """
    known, rows = run["ids"], size(run)
    first, last = int(known[0]), int(known[-1])
    if last - first + 1 == rows:
        # Ids without a gap, as row numbers are, tell their place themselves.
        inside = ids.clamp(first, last)
        return inside - first + (ids > last), inside == ids
    at = torch.searchsorted(known, ids.contiguous())
    return at, known[at.clamp(max=rows - 1)] == ids


def find(run: Run, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where ids stand in a run, and which are there.

    Args:
        run: The run; may be empty.
        ids: ``(N,)`` int64 in any order.

    Returns:
        ``(N,)`` int64 positions, which mean nothing where an id is not there, and ``(N,)`` bool.
    """
    if not size(run):
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    at, here = _place(run, ids)
    return at.clamp(max=size(run) - 1), here


def merged(older: Run, newer: Run) -> Run:
    """Return the rows of two runs; where both have an id, the newer row."""
    if not size(older) or not size(newer):
        return newer if size(newer) else older
    at, here = _place(older, newer["ids"])
    if bool(here.all()):
        changed = {n: v.index_copy(0, at, newer[n]) for n, v in older.items() if n != "ids"}
        return {"ids": older["ids"], **changed}
    fresh = ~here
    before = fresh.cumsum(0)
    at += before - fresh.long()
    old = torch.ones(size(older) + int(before[-1]), dtype=torch.bool)
    old[at[fresh]] = False
    columns = {}
    for name, value in older.items():
        column = value.new_empty(old.shape[0]).masked_scatter_(old, value)
        columns[name] = column.index_copy_(0, at, newer[name])
    return columns


def surplus(sizes: Sequence[int]) -> bool:
    """Return whether the last of some runs, given by their sizes, belongs into the one before."""
    return len(sizes) > 1 and sizes[-2] < max(RATIO * sizes[-1], SMALL)


def settled(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Merge runs, oldest first, until each is much larger than the next.

    A row is rewritten a number of times that grows with the logarithm of the rows, so an update
    costs that many times its own size on average; now and then one rewrites everything.
    """
    kept = list(runs)
    while surplus([size(run) for run in kept]):
        newer = kept.pop()
        kept[-1] = merged(kept[-1], newer)
    return tuple(kept)
