"""MaxVariance: generate many completions of a prompt, train on those that differ most.

Idea: generating is cheap and parallel, training is not. Of the completions of a prompt, keep the
ones whose rewards contrast most: the best and the worst.

Paper: PODS, Xu et al., "Not All Rollouts Are Useful: Down-Sampling Rollouts in LLM Reinforcement
Learning" (arXiv:2504.13818).

Formula: in every group, the ``keep`` rows of largest reward variance. They are the ``k`` lowest and
the ``keep - k`` highest for some ``k``, found from prefix sums of the sorted rewards. Where two
``k`` are equally good the smaller one is taken, which keeps more high rewards; among equal rewards
the lower ids are. The advantages must be those of the rows kept, not of all that were generated.

Cost: a sort of each group. It saves the training step of all rows that it leaves out.

When it loses: where training, not generating, is what limits the batch already; with rewards of 0
and 1 it keeps half right and half wrong answers wherever it can, so the batch no longer shows how
often the policy is right, and rare successes train every time. Variance follows outliers of a
shaped reward.

If nothing qualifies: every group keeps exactly ``keep`` rows. Rows whose reward is not finite are
taken only where the others are too few, lowest ids first; a selector takes their weight off again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["MaxVariance", "max_variance_rows"]

_TIE = 1e-12


def _best_split(ordered: Tensor, keep: int) -> int:
    """Return how many of the rows that maximise the variance are the lowest ones.

    Args:
        ordered: ``(n,)`` float64 ascending, ``n >= keep``.
        keep: Rows to choose.
    """
    # From the smallest on: equal rewards have variance 0 exactly, and nothing large cancels.
    above = ordered - ordered[0]
    start = ordered.new_zeros(1)
    sums = torch.cat([start, above.cumsum(0)])
    squares = torch.cat([start, above.square().cumsum(0)])
    low = torch.arange(keep + 1, device=ordered.device)
    high = ordered.shape[0] - keep + low  # the highest rows begin here

    def total(prefix: Tensor) -> Tensor:
        return prefix[low] + prefix[-1] - prefix[high]

    spread = keep * total(squares) - total(sums).square()
    # Splits that are equally good on paper must not be told apart by rounding.
    best = spread >= spread.max() - _TIE * keep * squares[-1]
    return int(best.nonzero()[0])


def max_variance_rows(reward: Tensor, keep: int, ids: Tensor) -> Tensor:
    """Choose the rows of one group whose rewards vary most.

    Args:
        reward: ``(n,)``, ``n >= keep``.
        keep: Rows to choose, at least 1.
        ids: ``(n,)`` int64; among equal rewards the lower ids are chosen.

    Returns:
        ``(n,)`` bool, ``keep`` of them True.

    Example:
        >>> import torch
        >>> reward = torch.tensor([0.5, 1.0, 0.0, 0.5])
        >>> max_variance_rows(reward, 2, torch.arange(4)).tolist()
        [False, True, True, False]
    """
    by_id = ids.argsort(stable=True)
    values = torch.where(torch.isfinite(reward), reward, torch.nan).double()
    order = by_id[values[by_id].argsort(stable=True)]  # nan sorts last, by id
    finite = int(torch.isfinite(reward).sum())
    chosen = torch.zeros_like(reward, dtype=torch.bool)
    if finite <= keep:
        chosen[order[:keep]] = True
        return chosen
    ordered = values[order[:finite]]
    low = _best_split(ordered, keep)
    place = torch.arange(finite, device=reward.device)
    taken = (place < low) | (place >= finite - (keep - low))
    # Which rewards, and how many of each, is settled; of equal ones the first ids are taken.
    _, run, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    wanted = torch.bincount(run[taken], minlength=size.shape[0])
    first = size.cumsum(0) - size
    chosen[order[:finite][place - first[run] < wanted[run]]] = True
    return chosen


@dataclass(frozen=True)
class MaxVariance(Strategy):
    """Keep the completions of each prompt whose rewards vary most; see the module for the card.

    Args:
        keep: Rows to keep of every group, at least 1.

    Raises:
        ValueError: ``keep`` below 1, or above the size of a group.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.rl.max_variance import MaxVariance
        >>> reward, group = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0]), torch.tensor([7] * 6)
        >>> Selector(MaxVariance(2)).select(Signals(reward=reward, group=group)).rows.tolist()
        [0, 2]
    """

    keep: int

    needs: ClassVar[tuple[str, ...]] = ("reward", "group")

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(
                f"MaxVariance: keep must be at least 1, got {self.keep}. "
                "Say how many completions of each prompt train."
            )

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Give weight 1 to exactly :attr:`keep` rows of every group; the argument plays no part."""
        reward, group = signals.require(self, "reward"), signals.require(self, "group")
        ids = signals.row_ids()
        names, where, sizes = group.unique(return_inverse=True, return_counts=True)
        if int(sizes.min()) < self.keep:
            small = int(sizes.argmin())
            raise ValueError(
                f"MaxVariance: keep must be at most the size of every group, got {self.keep} and "
                f"{int(sizes[small])} rows of group {int(names[small])}. "
                "Generate more completions or keep fewer."
            )
        weights = torch.zeros_like(reward)
        for rows in where.argsort(stable=True).split(sizes.tolist()):
            weights[rows] = max_variance_rows(reward[rows], self.keep, ids[rows]).float()
        return Selection(weights, reward), state
