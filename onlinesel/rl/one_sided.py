"""OneSided: no right answer is ever trained away, however long it was.

Idea: with a reward that is more than right or wrong, a right answer can fall below the mean of its
group (all are right, this one is the longest), and GRPO then lowers its probability. Right answers
are measured against the worst right answer instead, if that is below the mean.

Paper: DR. SAF, Chen et al., "Aware First, Think Less" (arXiv:2508.11582), boundary preservation.

Formula: with ``b = min(mean, min over right answers of r)`` and the group's mean and unbiased
deviation, ``A_i = (r_i - b) / (std + 1e-6)`` for right answers and ``(r_i - mean) / (std + 1e-6)``
for all others. With rewards of 0 and 1 this is GRPO.

Where this differs from the authors' code: right is what the verifiable outcome says, 1 and nothing
less (with graded outcomes, ``success=`` of the callback says from where on); that code
reads it off the reward, ``r > 0.5``. One version of it (33924fa) measures wrong answers against
``b`` too, which pushes them down less. The other two parts of DR. SAF are reward functions.

Cost: none.

When it loses: the advantages of a group no longer sum to zero; their surplus raises the
probability of whatever right answer was sampled, and long right answers are only raised less than
short ones, not lowered: lengths fall more slowly. Bonuses for length in a group without a right
answer are still blown up to full size; gate on the outcome.

If nothing qualifies: a group without a right answer is GRPO's; one whose rewards are all equal gets
0. A completion without a reward gets 0 and no part in the statistics; one without a known outcome
counts as not right. A completion without tokens does count, as in GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.group_advantages import deviations
from onlinesel.rl.types import Advantages, Rollouts

__all__ = ["OneSided", "one_sided"]

_EPSILON = 1e-6


def one_sided(rewards: Tensor, right: Tensor) -> Tensor:
    """Return GRPO's advantages, with a lower baseline for right answers where they need one.

    Args:
        rewards: ``(Q, G)``, nan where nothing is known.
        right: ``(Q, G)`` bool.

    Returns:
        ``(Q, G)`` in the dtype of the rewards; at least 0 where right, 0 without a reward.

    Example:
        >>> import torch
        >>> rewards, right = torch.tensor([[1.0, 0.5, 0.75]]), torch.tensor([[True, True, False]])
        >>> [round(value, 2) for value in one_sided(rewards, right)[0].tolist()]
        [2.0, 0.0, 0.0]
    """
    known = torch.isfinite(rewards)
    deviation, squares = deviations(rewards, known.to(rewards.dtype))
    count = known.sum(dim=-1, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    worst = torch.where(right & known, deviation, torch.inf).amin(dim=-1, keepdim=True)
    # Everything is counted from the mean, so the lower baseline is negative or 0.
    return (deviation - torch.where(right & known, worst.clamp(max=0), 0.0)) / (std + _EPSILON)


@dataclass(frozen=True)
class OneSided(Advantages):
    """Never give a right answer a negative advantage; see the module for the method card.

    Example:
        >>> import torch
        >>> from onlinesel.rl.one_sided import OneSided
        >>> from onlinesel.rl.types import Rollouts
        >>> outcome, lengths = torch.ones(1, 2), torch.tensor([[3, 7]])
        >>> advantages = OneSided().compute(Rollouts(1 - lengths / 10, outcome, lengths))
        >>> [round(value, 3) for value in advantages[0].tolist()]
        [1.414, 0.0]
    """

    def compute(self, rollouts: Rollouts) -> Tensor:
        """Return the advantages, ``(Q, G)`` float32."""
        return one_sided(rollouts.rewards.double(), rollouts.outcome == 1).float()
