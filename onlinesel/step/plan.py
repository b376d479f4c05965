"""What one rank trains in one optimizer step, and what its losses are weighed by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onlinesel.types import Normalize, Selection, Signals
from onlinesel.weights import Weighing

__all__ = ["Batch", "Decision", "StepPlan"]

Batch = dict[str, Any]
Decision = tuple[Signals, Selection]
"""What was decided about which candidates."""


@dataclass(frozen=True)
class StepPlan:
    """What one rank trains in one optimizer step.

    Attributes:
        batches: The micro-batches, as many as there were candidates; each has at least one row.
        weights: ``(n,)`` weight of each row of each micro-batch; 0 for a row that only keeps the
            rank in step with the others (its labels are -100).
        ids: ``(n,)`` int64 ids of those rows.
        counts: ``(n,)`` labelled tokens of those rows; None where each row is one item.
        widths: Tokens of each row that may have a loss; None where each row is one item.
        denominator: Scalar ``D`` of the loss contract over all ranks, on the host; 1 where nothing
            has weight, so that the loss is 0 and not 0 / 0.
        normalize: ``"tokens"``, ``"samples"`` or ``"rows"``.
        decisions: What was decided about which signals, one pair per decision.
        seconds: Time from the candidates to this plan.
        undefined: Whether nothing trains because no labelled candidate has a finite score, as where
            the model has diverged. The loss is then shown as nan; its gradient is 0 all the same.
    """

    batches: list[Batch]
    weights: list[Tensor]
    ids: list[Tensor]
    counts: list[Tensor | None]
    widths: list[int | None]
    denominator: Tensor
    normalize: Normalize
    decisions: list[Decision]
    seconds: float
    undefined: bool = False

    def multipliers(self, index: int) -> Tensor | None:
        """Return what each row's summed token loss is multiplied by before dividing by ``D``.

        None means 1 for every row that has labels left: the host's own loss is exact as it is.
        """
        weights, counts = self.weights[index], self.counts[index]
        if self.normalize != "tokens" and counts is not None:
            return torch.where(counts > 0, weights / counts.clamp(min=1), 0.0)
        return None if bool(((weights == 1) | (weights == 0)).all()) else weights

    def weighing(
        self,
        index: int,
        factor: float = 1.0,
        observe: Callable[[Tensor], None] | None = None,
    ) -> Weighing:
        """Return what turns the row or token losses of a micro-batch into its part of the loss.

        Args:
            index: Number of the micro-batch.
            factor: What the engine divides the gradient by afterwards.
            observe: Is told the rows' mean losses.
        """
        weights, counts = self.weights[index], self.counts[index]
        width = None if counts is None else self.widths[index]
        return Weighing(
            weights, counts, self.denominator, self.normalize, factor, observe, width,
            undefined=self.undefined,
        )  # fmt: skip
