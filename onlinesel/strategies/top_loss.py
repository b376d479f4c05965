"""TopLoss: train on the rows with the largest loss, or on those with the smallest.

Idea: what the model already predicts well teaches it little. ``lowest=True`` turns the method
around: trust the rows that agree with the model, because large losses are often wrong labels.

Paper: Kawaguchi and Lu, "Ordered SGD" (arXiv:1907.04371), for the largest; Shah et al., "Choosing
the Sample with Lowest Loss makes SGD Robust" (arXiv:2001.03316), for the smallest.

Formula: ``w_i = 1`` for the ``keep`` largest (smallest) ``l_i``, else 0, where ``l_i`` is the mean
loss of the labelled tokens of row ``i`` under the current model.

Cost: one forward without gradient over the candidates, about a third of a training step on as
many rows. It pays off when it drops more than a third of them. No memory.

When it loses: the largest losses are the noisiest rows, so wrong, garbled or foreign text is
picked first; short rows have noisier means and are over-represented at both ends. ``lowest=True``
trains on what is known already, and stops learning. In the demo (half of the pool corrupted, 8 of
32 rows, five seeds; ``onlinesel.recipes.demo``) 97 % of its rows were corrupted ones, and it
ended at a held-out loss of 5.325 where uniform had 4.589.

If nothing qualifies: rows whose loss is not finite are never kept; if none is finite, every
weight is 0 and the step has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import top_rows

__all__ = ["TopLoss", "loss_rows"]


def loss_rows(loss: Tensor, keep: int, ids: Tensor, *, lowest: bool = False) -> Tensor:
    """Give weight 1 to the ``keep`` rows of largest loss.

    Args:
        loss: ``(N,)`` mean loss of each row.
        keep: Number of rows.
        ids: ``(N,)`` int64; ties go to the lower id.
        lowest: Take the smallest losses instead.

    Returns:
        ``(N,)`` float32 of zeros and ones.

    Example:
        >>> import torch
        >>> loss_rows(torch.tensor([0.1, 3.0, 2.0]), 2, torch.arange(3)).tolist()
        [0.0, 1.0, 1.0]
    """
    return top_rows(loss, keep, ids, largest=not lowest)


@dataclass(frozen=True)
class TopLoss(Strategy):
    """Keep the rows of largest (smallest) loss; see the module for the method card.

    Args:
        lowest: Keep the smallest losses instead of the largest.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import TopLoss
        >>> signals = Signals(loss=torch.tensor([0.1, 3.0, 2.0]))
        >>> Selector(TopLoss()).select(signals, keep=1).rows.tolist()
        [1]
        >>> Selector(TopLoss(lowest=True)).select(signals, keep=1).rows.tolist()
        [0]
    """

    lowest: bool = False

    needs: ClassVar[tuple[str, ...]] = ("loss",)
    drops_only: ClassVar[bool] = True

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Keep the ``keep`` most extreme finite losses."""
        loss = signals.require(self, "loss")
        weights = loss_rows(loss, keep, signals.row_ids(), lowest=self.lowest)
        return Selection(weights, loss), state
