"""InfoBatch: skip some of the rows that the model has learnt, and let the others speak for them.

Idea: half of the rows whose last loss was below average are skipped at random; the half that
trains counts twice, so the expected gradient stays that of the full data.

Paper: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning"
(arXiv:2303.04947).

Formula: let ``h_i`` be the loss of row ``i`` when it last trained and ``m`` the mean of all that
are known. If ``h_i < m``: ``w_i = 0`` with probability ``prune``, else ``1 / (1 - prune)``. All
other rows, and rows never seen: ``w_i = 1``. So ``E[w_i] = 1``; the loss contract divides by
``sum_i w_i`` over rows (``normalize="samples"``), a ratio estimator of the full mean.

Run it with ``candidates=1``. The first epoch trains everything, since no row is known. In
``onlinesel.steps`` over a map-style dataset with torch's own samplers each epoch is drawn at its
start, as in the paper: skipped rows are never loaded, batches are full, and an epoch has fewer
steps. Everywhere else (Trainer, Lightning, streams, ids of one's own, ``scope`` other than global,
inside a ``Chain``) a row is decided when it comes up, against the mean at that moment: it is loaded
all the same, and steps are as many, and smaller. A skipped row keeps its old loss. The paper's last
epochs train on everything: ``When(InfoBatch(), stop=int(0.875 * max_steps))``; a drawn epoch is
read to its end.

The release divides ``sum_i w_i l_i`` by the rows of a batch, which makes
the gradient of its full batches larger, by up to ``1 / (1 - prune)``, and those of a shorter epoch
add up to the full epoch's. ``divide_by="rows"`` is that, where epochs are drawn. The default is the
weighted mean: where rows are decided as they come it already adds up to the full epoch's; where
epochs are drawn the steps are as large as without, and fewer.

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
from onlinesel.types import Normalize, Selection, Signals, State, Strategy
from onlinesel.weights import uniform_draws

__all__ = ["InfoBatch", "prune_weights"]


_DRAWN = "epoch"
"""Key of the ``(rows,)`` weights of the epoch that was drawn; empty where rows come one by one."""

_IDS, _LOSS = "new.ids", "new.loss"
"""Keys of what was observed and is not in the ledger yet, which takes many rows at once gladly."""

_MANY = 4096
_NOTHING: State = {
    _DRAWN: torch.empty(0), _IDS: torch.empty(0, dtype=torch.int64), _LOSS: torch.empty(0),
}  # fmt: skip


def _ledger(state: State) -> Ledger:
    """Return all that is known."""
    ledger = Ledger.from_state(state)
    # Checkpoints of version 0.1.0 have none of these keys.
    return ledger.update(state[_IDS], state[_LOSS]) if _IDS in state else ledger


def _drawn(state: State) -> Tensor:
    return state.get(_DRAWN, _NOTHING[_DRAWN])


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
        divide_by: ``"weights"``, or ``"rows"`` as in the released code; see the card.

    Raises:
        ValueError: ``prune`` outside [0, 1), an initial loss that is not finite, or another
            ``divide_by``.

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
    divide_by: str = "weights"

    needs: ClassVar[tuple[str, ...]] = ("ids",)
    observes: ClassVar[tuple[str, ...]] = ("loss",)
    normalize: ClassVar[Normalize] = "samples"

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
        if self.divide_by not in ("weights", "rows"):
            raise ValueError(
                f"InfoBatch: divide_by must be 'weights' or 'rows', got {self.divide_by!r}. "
                "Use 'weights' for a weighted mean."
            )
        normalize = "rows" if self.divide_by == "rows" else "samples"
        object.__setattr__(self, "normalize", normalize)

    def init(self) -> State:
        """Return an empty ledger; the visits tell which of two ranks saw a row later."""
        return {**Ledger(("loss", "visits")).to_state(), **_NOTHING}

    def draw_epoch(
        self, rows: int, state: State, *, step: int, generator: torch.Generator
    ) -> State:
        """Decide about all rows at once, against the mean at this moment: the paper's way."""
        ledger, drawn = _ledger(state), _NOTHING[_DRAWN]
        if rows:
            ids = torch.arange(rows)
            loss = ledger.lookup(ids, "loss", default=self._unseen)
            drawn = prune_weights(loss, ledger.mean, uniform_draws(ids, generator), self.prune)
        return {**ledger.to_state(), **_NOTHING, _DRAWN: drawn}

    def rows_of_epoch(self, state: State) -> Tensor | None:
        """Return the rows that were not skipped, None where none was drawn."""
        drawn = _drawn(state)
        return drawn > 0 if drawn.numel() else None

    @property
    def _unseen(self) -> float:
        return math.nan if self.initial_loss is None else self.initial_loss

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Skip and scale, unless the epoch was drawn so; ``keep`` plays no part."""
        ids, drawn = signals.require(self, "ids"), _drawn(state)
        if drawn.numel():
            inside = ids.clamp(0, drawn.shape[0] - 1)
            return Selection(torch.where(inside == ids, drawn[inside], 1.0)), state
        # Most of them will train, and be updated.
        loss, ledger = _ledger(state).recall(ids, "loss", default=self._unseen)
        weights = prune_weights(loss, ledger.mean, uniform_draws(ids, generator), self.prune)
        return Selection(weights, loss), {**ledger.to_state(), **_NOTHING}

    def observe(self, signals: Signals, state: State) -> State:
        """Record the losses of the rows that trained."""
        ids, loss = signals.require(self, "ids"), signals.require(self, "loss")
        if not _drawn(state).numel():
            return {**_ledger(state).update(ids, loss).to_state(), **_NOTHING}
        # A drawn epoch has each row once, so that one update later learns the same.
        new = {_IDS: torch.cat([state[_IDS], ids]), _LOSS: torch.cat([state[_LOSS], loss])}
        if new[_IDS].shape[0] < _MANY:
            return {**state, **new}
        return {**_ledger({**state, **new}).to_state(), **_NOTHING, _DRAWN: _drawn(state)}

    def merge(self, states: Sequence[State]) -> State:
        """Unite the ledgers of several ranks."""
        ledger = Ledger.union([_ledger(state) for state in states])
        return {**ledger.to_state(), **_NOTHING}
