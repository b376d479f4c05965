"""InfoBatch: skip some of the rows that the model has learnt, and let the others speak for them.

Idea: half of the rows whose last loss was below average are skipped at random; the half that
trains counts twice, so the expected gradient stays that of the full data.

Paper: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning"
(arXiv:2303.04947).

Formula: let ``h_i`` be the loss of row ``i`` when it last trained and ``m`` the mean of all that
are known. If ``h_i < m``: ``w_i = 0`` with probability ``prune``, else ``1 / (1 - prune)``. All
other rows, and rows never seen: ``w_i = 1``. So ``E[w_i] = 1``; the loss contract divides by
``sum_i w_i`` over rows (``normalize="samples"``), a ratio estimator of the full mean.

Run it with ``candidates=1``. The first epoch trains everything, since no row is known. The paper
then draws once for each epoch; here a row is decided when it comes up, against the mean at that
moment, so no host needs to know where an epoch begins. A skipped row keeps its old loss. The
paper's last epochs train on everything: ``When(InfoBatch(), stop=int(0.875 * max_steps))``.

Cost: no forward. Rows that are skipped save their whole training step, up to ``prune`` times the
share of rows below the mean. 16 bytes a row of the dataset, up to 18.3 while updates wait to be
merged. A step costs what its own rows do, times the logarithm of all.

When it loses: in a single epoch, where no row comes back, it does nothing. The losses are those
of rows that trained, up to an epoch old. Batches get smaller, and their gradients noisier.

If nothing qualifies: a batch may, by chance, lose all of its rows; its weights are all 0 and it
adds no gradient. A row whose loss was not finite is not recorded, and counts as never seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.ledger import Ledger
from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import uniform_draws

__all__ = ["InfoBatch", "prune_weights"]


def prune_weights(loss: Tensor, mean: Tensor, draws: Tensor, prune: float) -> Tensor:
    """Drop rows below the mean by chance and scale up those of them that stay.

    Args:
        loss: ``(N,)`` last known loss; nan for a row that must train.
        mean: Scalar; nan drops nothing.
        draws: ``(N,)`` uniform numbers in [0, 1).
        prune: Probability of a row below the mean to be dropped, in [0, 1).

    Returns:
        ``(N,)`` float32: 0, 1 or ``1 / (1 - prune)``.

    Example:
        >>> import torch
        >>> loss, draws = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([0.3, 0.7, 0.1])
        >>> prune_weights(loss, torch.tensor(3.0), draws, 0.5).tolist()
        [0.0, 2.0, 1.0]
    """
    below = loss < mean
    scaled = torch.where(draws < prune, 0.0, 1 / (1 - prune))
    return torch.where(below, scaled, 1.0).float()


@dataclass(frozen=True)
class InfoBatch(Strategy):
    """Skip rows that are below the mean loss by chance; see the module for the method card.

    Args:
        prune: Probability of a row below the mean to be skipped, in [0, 1).
        initial_loss: Loss that rows never seen are compared with; None always trains them. The
            released code starts all rows at 3.0, which only its first epoch sees.

    Raises:
        ValueError: ``prune`` outside [0, 1), or an initial loss that is not finite.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import InfoBatch
        >>> selector, ids = Selector(InfoBatch()), torch.arange(4)
        >>> selector.observe(Signals(ids=ids, loss=torch.tensor([1.0, 1.0, 1.0, 9.0])))
        >>> sorted(set(selector.select(Signals(ids=ids)).weights.tolist()) - {0.0, 2.0})
        [1.0]
    """

    prune: float = 0.5
    initial_loss: float | None = None

    needs: ClassVar[tuple[str, ...]] = ("ids",)
    observes: ClassVar[tuple[str, ...]] = ("loss",)
    normalize: ClassVar[str] = "samples"

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(
                f"InfoBatch: prune must be in [0, 1), got {self.prune}. Use the paper's 0.5."
            )
        if self.initial_loss is not None and not math.isfinite(self.initial_loss):
            raise ValueError(
                f"InfoBatch: initial_loss must be finite or None, got {self.initial_loss}. "
                "Use None to always train rows that were never seen."
            )

    def init(self) -> State:
        """Return an empty ledger; the visits tell which of two ranks saw a row later."""
        return Ledger(("loss", "visits")).to_state()

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Skip and scale; ``keep`` plays no part."""
        ids = signals.require(self, "ids")
        unseen = float("nan") if self.initial_loss is None else self.initial_loss
        # Most of them will train, and be updated.
        loss, ledger = Ledger.from_state(state).recall(ids, "loss", default=unseen)
        weights = prune_weights(loss, ledger.mean, uniform_draws(ids, generator), self.prune)
        return Selection(weights, loss), ledger.to_state()

    def observe(self, signals: Signals, state: State) -> State:
        """Record the losses of the rows that trained."""
        ids, loss = signals.require(self, "ids"), signals.require(self, "loss")
        return Ledger.from_state(state).update(ids, loss).to_state()

    def merge(self, states: Sequence[State]) -> State:
        """Unite the ledgers of several ranks."""
        return Ledger.union([Ledger.from_state(state) for state in states]).to_state()
