"""The contract of the parts that act inside a generation batch: advantages and token weights.

Gates and rollout down-sampling are ordinary strategies (:class:`onlinesel.Strategy`) that read
``reward`` and ``group``. What follows the choice, the advantage of a completion and the weight of
each of its tokens, needs two value types more: :class:`Rollouts`, the completions by group, and
:class:`TokenSignals`, what the loss knows about every token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Advantages", "Rollouts", "TokenSignals", "TokenTerms", "TokenWeights"]


@dataclass(frozen=True)
class Rollouts:
    """The ``Q`` groups of ``G`` completions that train, the same on every rank.

    Attributes:
        rewards: ``(Q, G)`` float32, what the trainer optimises (the weighted sum of its reward
            functions); nan where no function scored the completion.
        outcome: ``(Q, G)`` float32, the verifiable outcome: 1 success, 0 failure, a fraction for
            what is partly right, nan unknown.
        lengths: ``(Q, G)`` int64, tokens of each completion that carry loss.
        scores: ``(Q, G)`` float32, mean log-probability of those tokens under the policy that
            sampled them, in nats; None unless asked for (:attr:`Advantages.needs_scores`).
        longest: Largest number of tokens that a completion may have.

    Example:
        >>> import torch
        >>> r = torch.tensor([[1.0, 0.0]])
        >>> Rollouts(r, r, torch.tensor([[3, 5]]), longest=8).rewards.shape
        torch.Size([1, 2])
    """

    rewards: Tensor
    outcome: Tensor
    lengths: Tensor
    scores: Tensor | None = None
    longest: int = 0


class Advantages(ABC):
    """How a completion's reward becomes its advantage: hyper-parameters and one pure function.

    Attributes:
        needs_scores: Whether :meth:`compute` reads :attr:`Rollouts.scores`, which may cost a
            forward.
        per_sequence: False: the trainer's own loss takes the advantages as they are. True: the
            method defines its loss as ``-(1/Q) sum_i A_i mean_t log pi_it``, and the host scales
            the advantages so that the trainer's ``loss_type`` gives that.
    """

    needs_scores: ClassVar[bool] = False
    per_sequence: ClassVar[bool] = False

    @abstractmethod
    def compute(self, rollouts: Rollouts) -> Tensor:
        """Return the advantages, ``(Q, G)`` float32, finite, 0 where the reward is nan."""


@dataclass(frozen=True)
class TokenSignals:
    """What the loss knows about ``B`` completions of at most ``T`` tokens.

    Attributes:
        entropy: ``(B, T)`` entropy of the policy that sampled, in nats; frozen for the whole
            generation batch.
        ratio: ``(B, T)`` ``pi_theta / pi_old``, detached; 1 in the first update.
        advantages: ``(B, T)``.
        mask: ``(B, T)`` bool, True where a token carries loss.
        statistics: What :meth:`TokenWeights.statistics` said about this generation batch.
        clip: The trainer's own clip range ``(epsilon_low, epsilon_high)``.
    """

    entropy: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor
    statistics: Mapping[str, Tensor]
    clip: tuple[float, float]


@dataclass(frozen=True)
class TokenTerms:
    """What the clipped loss uses in place of the trainer's own: all ``(B, T)``, no gradient."""

    advantages: Tensor
    clip_low: Tensor
    clip_high: Tensor


class TokenWeights(ABC):
    """How much each token of a completion counts: hyper-parameters and two pure functions."""

    def statistics(self, entropy: Tensor) -> dict[str, Tensor]:
        """Return scalars about one generation batch, computed once and used by all its updates.

        Args:
            entropy: ``(M,)`` float32, entropies of all tokens that carry loss, over all ranks;
                may be empty.
        """
        return {}

    @abstractmethod
    def weigh(self, tokens: TokenSignals) -> TokenTerms:
        """Return the advantages and clip ranges of every token."""


def nanmean(values: Tensor) -> Tensor:
    """Return the mean over the last dimension of what is not nan, 0 if all is, keeping it."""
    known = ~torch.isnan(values)
    total = torch.where(known, values, 0.0).sum(dim=-1, keepdim=True)
    return total / known.sum(dim=-1, keepdim=True).clamp(min=1)
