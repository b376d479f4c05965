"""RS2: every epoch trains on another random part of the data.

Idea: many short epochs over fresh subsets, with the learning rate schedule compressed to the
steps that are left. The baseline that a method which scores rows must beat at equal time.

Paper: Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning"
(arXiv:2305.18424).

Formula: an epoch has ``k = max(floor(fraction * rows), 1)`` rows. Without replacement, one shuffle
serves ``floor(1 / fraction)`` epochs, which take consecutive chunks of ``k``; the rest of the
shuffle is left out. With replacement, each epoch is the first ``k`` rows of a shuffle of its own
(no row twice in an epoch). Both follow from the seed and the number of the epoch alone, so a run
resumes anywhere. Every candidate of a step has weight 1.

Cost: nothing a step; one permutation an epoch.

When it loses: without replacement it is the full data in another order: it equals fewer epochs of
uniform training, and gains only what the shorter schedule gains. A few useful rows among many
useless ones are seen too rarely.

If nothing qualifies: cannot happen; an epoch has at least one row.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["RS2", "epoch_rows"]


def epoch_rows(
    rows: int, fraction: float, *, epoch: int, seed: int, replacement: bool = False
) -> Tensor:
    """Return the rows of one epoch.

    Args:
        rows: Size of the dataset.
        fraction: Share of it in an epoch, in (0, 1].
        epoch: Number of the epoch, from 0.
        seed: Seed of the run.
        replacement: Shuffle anew for each epoch, so that rows may come back before all were seen.

    Returns:
        ``(k,)`` int64 distinct row numbers, in the order of training.

    Example:
        >>> import torch
        >>> parts = [epoch_rows(6, 1 / 3, epoch=epoch, seed=0) for epoch in range(3)]
        >>> torch.cat(parts).sort().values.tolist()
        [0, 1, 2, 3, 4, 5]
    """
    # The margin takes 0.29 * 100 = 28.999999999999996 for the 29 that it is meant to be.
    size = max(math.floor(fraction * rows + 1e-9), 1)
    chunks = 1 if replacement else min(math.floor(1 / fraction + 1e-9), rows // size)
    shuffle, chunk = divmod(epoch, chunks)
    # Hashed, because the CPU generator uses 32 bits of its seed and seed + shuffle would make the
    # second shuffle of one run the first of another.
    digest = hashlib.sha256(f"RS2 {seed} {shuffle}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    order = torch.randperm(rows, generator=generator)
    return order[chunk * size : (chunk + 1) * size].clone()


@dataclass(frozen=True)
class RS2(Strategy):
    """Plan epochs over random parts of the data; see the module for the method card.

    Args:
        fraction: Share of the data in an epoch, in (0, 1].
        replacement: Draw each epoch from all rows (True), or go through all rows before any comes
            back (False).

    Raises:
        ValueError: ``fraction`` outside (0, 1].

    Example:
        >>> from onlinesel.strategies import RS2
        >>> RS2(fraction=0.25).epoch_plan(100, epoch=0, seed=0).shape
        torch.Size([25])
    """

    fraction: float = 0.1
    replacement: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"RS2: fraction must be in (0, 1], got {self.fraction}. "
                "Say what share of the data one epoch trains on."
            )

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Train on every candidate; the choice was made by :meth:`epoch_plan`."""
        return Selection(torch.ones(signals.size)), state

    def epoch_plan(self, rows: int, *, epoch: int, seed: int) -> Tensor:
        """Return the rows of one epoch; the same number for every epoch."""
        if rows < 1 or epoch < 0:
            raise ValueError(
                f"RS2: rows must be at least 1 and epoch at least 0, got {rows} and {epoch}. "
                "Pass the size of the dataset and the number of the epoch, from 0."
            )
        return epoch_rows(rows, self.fraction, epoch=epoch, seed=seed, replacement=self.replacement)
