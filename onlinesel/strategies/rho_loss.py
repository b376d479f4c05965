"""RHOLoss: train on the rows that are hard for the model but easy for a reference.

Idea: a large loss has two causes, not learnt yet and not learnable. A reference model that was
trained on clean held-out data tells them apart: what it cannot predict either is noise.

Paper: Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and
Not Yet Learnt" (arXiv:2206.07137). With a reference trained on the target task this is RHO-down.

Formula: ``s_i = l_i - r_i``, the loss of row ``i`` under the model less that under the reference;
``w_i = 1`` for the ``keep`` largest ``s_i``, else 0.

Cost: one forward without gradient over the candidates with each of the two models. The reference
losses never change: computed once for the dataset and carried in the batch they cost nothing.

When it loses: with a reference that is weak, or was trained on the training rows themselves: it
is then low everywhere or high where it matters. Later in training the differences of rows are
small against the noise of their means. In the demo (half of the pool corrupted, 8 of 32 rows,
five seeds; ``onlinesel.recipes.demo``) it won: 4.514 to uniform's 4.589 at equal CPU time.

If nothing qualifies: a row with either loss not finite is never kept; if that is all of them,
every weight is 0 and the step has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import top_rows

__all__ = ["RHOLoss", "reducible_loss"]


def reducible_loss(loss: Tensor, reference_loss: Tensor) -> Tensor:
    """Return how much of each row's loss training can still remove, by the reference's judgement.

    Args:
        loss: ``(N,)`` mean loss of each row under the model.
        reference_loss: ``(N,)`` the same under the reference.

    Returns:
        ``(N,)`` differences; nan where either is not finite.

    Example:
        >>> import torch
        >>> reducible_loss(torch.tensor([3.0, 3.0]), torch.tensor([2.5, 0.5])).tolist()
        [0.5, 2.5]
    """
    finite = torch.isfinite(loss) & torch.isfinite(reference_loss)
    return torch.where(finite, loss - reference_loss, float("nan"))


@dataclass(frozen=True)
class RHOLoss(Strategy):
    """Keep the rows of largest reducible loss; see the module for the method card.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import RHOLoss
        >>> loss, reference = torch.tensor([3.0, 2.0]), torch.tensor([2.9, 0.5])
        >>> signals = Signals(loss=loss, reference_loss=reference)
        >>> Selector(RHOLoss()).select(signals, keep=1).rows.tolist()
        [1]
    """

    needs: ClassVar[tuple[str, ...]] = ("loss", "reference_loss")
    drops_only: ClassVar[bool] = True

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Keep the ``keep`` largest finite differences."""
        loss = signals.require(self, "loss")
        scores = reducible_loss(loss, signals.require(self, "reference_loss"))
        return Selection(top_rows(scores, keep, signals.row_ids()), scores), state
