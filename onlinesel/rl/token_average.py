"""TokenAverage: normalise rewards over the tokens of a group, not over its completions.

Idea: a loss that averages over tokens counts a completion as often as it has tokens. Advantages
that are centred over completions then no longer sum to zero in the loss: long failures outweigh
short successes, or the other way round. Centred over tokens they do.

Paper: HAPO, Liu et al., "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every
Token's Nature" (arXiv:2509.16591), part 2.

Formula: with ``n_i`` tokens of completion ``i`` that carry loss, ``mu = sum_i n_i r_i / sum_i
n_i``, ``s^2 = sum_i n_i (r_i - mu)^2 / sum_i n_i`` (population), ``A_i = (r_i - mu) / (s + 1e-6)``.
If some ``|A_i| >= limit`` (5), the whole group takes GRPO's ``(r_i - mean) / (std + 1e-6)`` over
completions instead, with the unbiased deviation. For rewards of 0 and 1 with a share ``f`` of the
tokens in successes, that is ``f <= 1 / (limit^2 + 1)`` or ``f >= limit^2 / (limit^2 + 1)``. An
advantage is constant over the tokens of a completion, so lengths are all this needs.

Where this differs from the authors' code: that code normalises padding too, whose reward is 0, and
tests it against the limit, so that groups of rewards near 0.95 fall back for no reason. Here only
tokens that carry loss count. Without ``scale`` the fallback is not divided either.

Cost: none.

When it loses: with a loss that averages within completions first (``loss_type="grpo"``), whose
weights it does not match; use it with a mean over tokens (``"dapo"``, ``"bnpo"``). If successes
are shorter, their advantage grows as they shorten: lengths may drift.

If nothing qualifies: a group whose rewards are all equal, or with fewer than two completions that
count, gets 0. Completions without a reward or without tokens get 0 and no part in the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.group_advantages import deviations, sequence_advantages
from onlinesel.rl.types import Advantages, Rollouts

__all__ = ["TokenAverage", "token_average"]

_EPSILON = 1e-6


def token_average(
    rewards: Tensor, lengths: Tensor, *, limit: float = 5.0, scale: bool = True
) -> Tensor:
    """Return advantages whose mean over the tokens of a group is 0.

    Args:
        rewards: ``(Q, G)``, nan where nothing is known.
        lengths: ``(Q, G)`` int64, tokens that carry loss.
        limit: Size of an advantage from which its group is normalised over completions instead.
        scale: Divide by the standard deviation.

    Returns:
        ``(Q, G)`` in the dtype of the rewards; 0 without a reward or without tokens.

    Example:
        >>> import torch
        >>> rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[2, 6]])
        >>> token_average(rewards, lengths, scale=False).tolist()
        [[0.75, -0.25]]
    """
    deviation, squares = deviations(rewards, lengths)
    known = (lengths > 0) & torch.isfinite(rewards)
    tokens = torch.where(known, lengths, 0).sum(dim=-1, keepdim=True)
    over_tokens = deviation
    if scale:
        over_tokens = deviation / ((squares / tokens.clamp(min=1)).sqrt() + _EPSILON)
    extreme = (over_tokens.abs() >= limit).any(dim=-1, keepdim=True)
    return torch.where(extreme, sequence_advantages(rewards, known, scale=scale), over_tokens)


@dataclass(frozen=True)
class TokenAverage(Advantages):
    """Normalise over tokens; see the module for the method card.

    Args:
        limit: Size of an advantage from which its group is normalised over completions instead;
            ``float("inf")`` for never.
        scale: Divide by the standard deviation.

    Raises:
        ValueError: ``limit`` not positive.

    Example:
        >>> import torch
        >>> from onlinesel.rl.token_average import TokenAverage
        >>> from onlinesel.rl.types import Rollouts
        >>> r = torch.tensor([[1.0, 0.0]])
        >>> advantages = TokenAverage().compute(Rollouts(r, r, torch.tensor([[1, 4]])))
        >>> [round(value, 3) for value in advantages[0].tolist()]
        [2.0, -0.5]
    """

    limit: float = 5.0
    scale: bool = True

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(
                f"TokenAverage: limit must be positive, got {self.limit}. "
                "Use 5.0, or float('inf') to normalise every group over tokens."
            )

    def compute(self, rollouts: Rollouts) -> Tensor:
        """Return the advantages, ``(Q, G)`` float32."""
        rewards = rollouts.rewards.double()
        found = token_average(rewards, rollouts.lengths, limit=self.limit, scale=self.scale)
        return found.float()
