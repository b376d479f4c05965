"""Rows that train together in a loop of one's own or in Lightning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onlinesel.callbacks._shared.replay import HeldRows, Replay
from onlinesel.parallel.distributed import world_size
from onlinesel.step import StepPlan
from onlinesel.weights import Weighing

__all__ = ["MicroBatch", "needs_weighted_mean"]


class MicroBatch:
    """Rows that train together.

    Attributes:
        batch: In the structure that the loader gives.
        ids: ``(N,)`` int64.
        weights: ``(N,)``; 0 for a row that only keeps its rank in step with the others.
        last: Whether it is the last of its optimizer step.
        weighing: Turns the losses of its rows into its part of the step's loss.
        used: Whether it has.
        begun: Whether the loop has asked for it.
        read: Whether the loop has read its weights.
        value: Its part of the step's loss, detached, once :meth:`loss` was called.
    """

    weighing: Weighing

    def __init__(self, batch: Any, ids: Tensor, weights: Tensor, last: bool) -> None:
        self.batch, self.ids, self._weights, self.last = batch, ids, weights, last
        self.used = self.begun = self.read = False
        self.value: Tensor | None = None
        self._held: HeldRows | None = None

    @property
    def weights(self) -> Tensor:
        """The rows' weights; who reads them weighs by hand."""
        self.read = True
        return self._weights

    def training(self) -> Replay:
        """Return what its one training forward must run in."""
        self.begun = True
        held, self._held = self._held, None
        return Replay(held)

    def loss(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return this micro-batch's part of the step's loss: call ``backward()`` on it.

        The parts of all micro-batches and ranks add up to ``sum_i w_i sum_t loss_it / D``.

        Args:
            losses: ``(N,)`` mean loss of each row, or ``(N, T)`` loss of each token.
            mask: ``(N, T)`` True where the token is labelled; without it, the losses of other
                tokens must be 0, as :func:`onlinesel.token_losses` gives them.

        Returns:
            Scalar, differentiable, already multiplied by what the engine divides by.
        """
        loss = self.weighing(losses, mask)
        self.value = loss.detach() / self.weighing.factor
        return loss


def needs_weighted_mean(plan: StepPlan, accumulate: int) -> bool:
    """Whether the mean over a micro-batch would be another loss than the planned one.

    It is the same only where one micro-batch of one rank is the whole step. On several ranks no
    rank alone could tell.
    """
    if world_size() > 1 or accumulate > 1 or bool((plan.weights[0] != 1).any()):
        return True
    return plan.normalize != "tokens" and plan.counts[0] is not None
