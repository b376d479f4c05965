"""Uniform: train on rows drawn at random, the baseline that every method must beat.

Idea: no score; ``keep`` of the candidates, each equally likely. With ``candidates=1`` every row
trains and a run equals one without the callback.

Paper: none. As a fresh random subset of each epoch it is RS2 with replacement (Okanovic et al.,
"Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", arXiv:2305.18424).

Formula: ``w_i = 1`` for the ``keep`` smallest of ``u_i ~ U(0, 1)``, else 0.

Cost: nothing. No forward, no memory.

When it loses: when part of the data is useless and a score can tell which.

If nothing qualifies: cannot happen; every row qualifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import top_rows, uniform_draws

__all__ = ["Uniform", "uniform_rows"]


def uniform_rows(ids: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Give weight 1 to ``keep`` rows drawn without replacement.

    Args:
        ids: ``(N,)`` int64.
        keep: Number of rows.
        generator: CPU generator; not advanced if every row is kept.

    Returns:
        ``(N,)`` float32 of zeros and ones.

    Example:
        >>> import torch
        >>> uniform_rows(torch.arange(4), 2, torch.Generator().manual_seed(0)).sum().item()
        2.0
    """
    if keep >= ids.shape[0]:
        return torch.ones(ids.shape[0])
    return top_rows(uniform_draws(ids, generator), keep, ids, largest=False)


@dataclass(frozen=True)
class Uniform(Strategy):
    """Keep rows uniformly at random; see the module for the method card.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import Uniform
        >>> Selector(Uniform()).select(Signals(ids=torch.arange(8)), keep=2).rows.numel()
        2
    """

    drops_only: ClassVar[bool] = True

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Draw ``keep`` rows."""
        return Selection(uniform_rows(signals.row_ids(), keep, generator)), state
