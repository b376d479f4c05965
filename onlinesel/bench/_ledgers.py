"""Ledgers as they are in the middle of a long run, and what keeping them costs in the long run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from onlinesel.bench._settings import clock
from onlinesel.ledger import Ledger
from onlinesel.ledger.runs import Run, merged, size, surplus
from onlinesel.types import State

__all__ = ["AgedLedger", "Turnover", "aged_ledger", "spread_ids", "turnover"]


@dataclass(frozen=True)
class Turnover:
    """What updates of one size do to a ledger all of whose ids are known, until it is whole again.

    Attributes:
        steps: Updates from one rewriting of everything to the next.
        rewritten: Rows rewritten by merging, per update.
        sizes: Rows of the runs in the middle of that time.
    """

    steps: int
    rewritten: float
    sizes: list[int]


def turnover(known: int, rows: int) -> Turnover:
    """Follow the sizes of the runs through updates of ``rows`` of ``known`` ids, in epochs.

    Example:
        >>> turnover(1_000_000, 5_000)
        Turnover(steps=29, rewritten=71379.31034482758, sizes=[1000000, 70000, 5000])
    """
    steps = rewritten = 0
    for _, written in _sizes(known, min(rows, known)):
        steps, rewritten = steps + 1, rewritten + written
    middle = next(islice(_sizes(known, min(rows, known)), steps // 2, None))
    return Turnover(steps, rewritten / steps, middle[0])


def _sizes(known: int, rows: int) -> Iterator[tuple[list[int], int]]:
    """Yield the sizes of the runs after each update, and the rows that it rewrote."""
    sizes = [known]
    while True:
        sizes, written = [*sizes, rows], 0
        while surplus(sizes):
            last = sizes.pop()
            # An epoch visits each id once, so that only the oldest run has them already.
            sizes[-1] = sizes[-1] + last if len(sizes) > 1 else known
            written += sizes[-1]
        yield sizes, written
        if len(sizes) == 1:
            return


def spread_ids(rows: Tensor, known: int, dense: bool) -> Tensor:
    """Return the ids of rows by their number: the number itself, or spread out as hashes are."""
    return rows if dense else rows * (2**62 // known)


@dataclass(frozen=True)
class AgedLedger:
    """A ledger of losses and visits.

    Attributes:
        state: Its state.
        nbytes: Bytes of the state.
        merge: Seconds that merging its two oldest runs took; 0 if there is only one.
        merged_rows: Rows that this merge wrote.
    """

    state: State
    nbytes: int
    merge: float
    merged_rows: int


def aged_ledger(sizes: list[int], dense: bool) -> AgedLedger:
    """Build a ledger with runs of these sizes, the oldest of which knows all ids."""
    known, generator = sizes[0], torch.Generator().manual_seed(0)
    loss = torch.rand(known, generator=generator)

    def run(rows: int, visits: int) -> Run:
        at = torch.arange(rows) * known // rows
        counts = torch.full((rows,), visits, dtype=torch.int32)
        return {"ids": spread_ids(at, known, dense), "loss": loss[at], "visits": counts}

    runs = [run(rows, 1 + i) for i, rows in enumerate(sizes)]
    whole = Ledger.from_state({f"ledger.{name}": value for name, value in runs[0].items()})
    state = whole.to_state()
    for i, part in enumerate(runs):
        state |= {f"ledger.{name}.{i}": value for name, value in part.items()}
    state["ledger.sizes"] = torch.tensor(sizes)
    nbytes = sum(value.nbytes for value in state.values())
    if len(runs) == 1:
        return AgedLedger(state, nbytes, 0.0, 0)
    rows, taken = 0, []
    for _ in range(3):
        start = clock()
        rows = size(merged(runs[0], runs[1]))
        taken.append(clock() - start)
    return AgedLedger(state, nbytes, min(taken), rows)
