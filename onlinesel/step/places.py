"""Where the rows of a step lie: in which micro-batch, and at which place of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from onlinesel.types import Signals

__all__ = ["Place", "join", "picked", "split_evenly"]

Place = tuple[int, int]
"""(micro-batch, row) of a candidate."""


def join(signals: Sequence[Signals]) -> Signals:
    """Return the signals of several micro-batches as one."""
    if len(signals) == 1:
        return signals[0]
    names = signals[0].present()
    return Signals(**{name: torch.cat([s.present()[name] for s in signals]) for name in names})


def split_evenly(rows: list[Place], signals: Sequence[Signals]) -> list[list[Place]]:
    """Split rows over the micro-batches; where all candidates train, leave each in its own."""
    whole = [[(m, r) for r in range(s.size)] for m, s in enumerate(signals)]
    if rows == [place for part in whole for place in part]:
        return whole
    parts = len(signals)
    sizes = [len(rows) // parts + (j < len(rows) % parts) for j in range(parts)]
    bounds = [sum(sizes[:j]) for j in range(parts + 1)]
    return [rows[bounds[j] : bounds[j + 1]] for j in range(parts)]


def picked(columns: Sequence[Tensor], rows: list[Place]) -> Tensor:
    """Return the entries of some rows of several columns, in their order."""
    starts = [0, *accumulate(column.shape[0] for column in columns)]
    return torch.cat(list(columns))[[starts[m] + r for m, r in rows]]
