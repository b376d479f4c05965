"""SelectiveBackprop: train on a row the more likely, the larger its loss is among recent losses.

Idea: large losses first, but by chance, so that no part of the data is ever shut out.

Paper: Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers"
(arXiv:1910.00762).

Formula: ``p_i = CDF(l_i) ** beta``, where the CDF is the share of losses ``<= l_i`` among the
``capacity`` most recent ones and the candidates themselves. ``exact=True`` keeps exactly ``keep``
rows: the smallest of ``e_i / p_i`` with ``e_i ~ Exp(1)``, which draws one row after the other with
odds ``p_i``, without replacement. ``exact=False`` is the paper: row ``i`` trains if ``u_i < p_i``,
independently, and the number of rows varies. Weights are 1; nothing corrects for the preference.

A loss counts itself and its equals, so the largest is always drawn, equal losses are all
certain, and no row has ``p = 0``. The release counts what is strictly smaller: there the smallest
loss can never train, and where all are equal nothing does. That is not offered.

Cost: one forward without gradient over the candidates; 4 bytes a remembered loss.

When it loses: as :class:`onlinesel.strategies.TopLoss`, on noisy data, though it is milder. With
a learning rate that is tuned for uniform rows, the gradient is biased towards large losses.

If nothing qualifies: rows whose loss is not finite are never kept nor remembered; if none is
finite, every weight is 0. With ``exact=False`` a step may draw no row, and has no gradient then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import top_rows, uniform_draws

__all__ = ["SelectiveBackprop", "keep_probability", "weighted_rows"]


def keep_probability(loss: Tensor, history: Tensor, beta: float) -> Tensor:
    """Return the share of losses that are not larger, to the power ``beta``.

    Args:
        loss: ``(N,)`` candidates; they count as seen.
        history: ``(H,)`` finite losses of earlier candidates.
        beta: 0 makes all rows equal; larger values prefer large losses more.

    Returns:
        ``(N,)`` float64 in (0, 1]; nan where the loss is not finite.

    Example:
        >>> import torch
        >>> keep_probability(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0]), 1.0).tolist()
        [0.25, 1.0]
    """
    finite = torch.isfinite(loss).nonzero().flatten()
    # Asked for in their own order, the ranks are found by walking through memory, not leaping.
    ranked, order = loss[finite].sort()
    seen = torch.searchsorted(history.sort().values, ranked, right=True) + _not_larger(ranked)
    below = torch.zeros(loss.shape, dtype=torch.int64).index_copy(0, finite[order], seen)
    share = below.double() / max(history.shape[0] + finite.shape[0], 1)
    return torch.where(torch.isfinite(loss), share**beta, float("nan"))


def _not_larger(ascending: Tensor) -> Tensor:
    """Return how many numbers of an ascending list are not larger than each."""
    last = torch.ones(ascending.shape, dtype=torch.bool)
    last[:-1] = ascending[1:] != ascending[:-1]
    ends = last.nonzero().flatten() + 1
    return ends.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))


def weighted_rows(
    probabilities: Tensor, keep: int, ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Give weight 1 to ``keep`` rows drawn without replacement with odds ``probabilities``.

    Args:
        probabilities: ``(N,)`` odds; rows that are not positive and finite are never drawn.
        keep: Number of rows.
        ids: ``(N,)`` int64.
        generator: CPU generator.

    Returns:
        ``(N,)`` float32 of zeros and ones.

    Example:
        >>> import torch
        >>> odds = torch.tensor([0.5, 0.0, 0.5])
        >>> weighted_rows(odds, 2, torch.arange(3), torch.Generator().manual_seed(0)).tolist()
        [1.0, 0.0, 1.0]
    """
    # -log(1 - u) rather than -log(u): u may be 0, never 1.
    waits = -torch.log1p(-uniform_draws(ids, generator))
    usable = torch.isfinite(probabilities) & (probabilities > 0)
    return top_rows(torch.where(usable, waits / probabilities, torch.inf), keep, ids, largest=False)


@dataclass(frozen=True)
class SelectiveBackprop(Strategy):
    """Draw rows by the rank of their loss; see the module for the method card.

    Args:
        beta: Power of the rank; the paper uses 1 to 3.
        capacity: Number of recent losses to rank against.
        exact: Keep exactly ``keep`` rows (True), or decide about each row alone (the paper).

    Raises:
        ValueError: ``beta`` below 0 or not finite, or ``capacity`` below 1.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import SelectiveBackprop
        >>> signals = Signals(loss=torch.tensor([0.1, 3.0, 2.0]))
        >>> Selector(SelectiveBackprop(beta=50.0)).select(signals, keep=1).rows.tolist()
        [1]
    """

    beta: float = 2.0
    capacity: int = 1024
    exact: bool = True

    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(
                f"SelectiveBackprop: beta must be finite and >= 0, got {self.beta}. "
                "Use 1 to 3, or 0 for uniform rows."
            )
        if self.capacity < 1:
            raise ValueError(
                f"SelectiveBackprop: capacity must be at least 1, got {self.capacity}. "
                "Say how many recent losses to rank against."
            )
        object.__setattr__(self, "drops_only", self.exact)

    def init(self) -> State:
        """Return an empty history."""
        return {"history": torch.empty(0)}

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Draw rows and remember the losses of all candidates, in the order of their ids."""
        loss, ids = signals.require(self, "loss"), signals.row_ids()
        # Numbers are drawn, and losses remembered, in the order of the ids: it is found once.
        by_id = ids.argsort(stable=True)
        loss, ids = loss[by_id], ids[by_id]
        chance = keep_probability(loss, state["history"], self.beta)
        if self.exact:
            weights = weighted_rows(chance, keep, ids, generator)
        else:
            weights = (uniform_draws(ids, generator) < chance).float()
        history = torch.cat([state["history"], loss[torch.isfinite(loss)]])
        weights, chance = (x.index_copy(0, by_id, x) for x in (weights, chance))
        return Selection(weights, chance), {"history": history[-self.capacity :].clone()}
