"""DRPO: among right answers the short ones count more, and no right answer counts against.

Idea: GRPO on a reward with a length penalty gives long right answers negative advantages. Keep the
two apart: right answers share one unit of weight by their length, wrong answers share minus one.

Paper: Li et al., "DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization"
(arXiv:2510.04474). ``lam=float("inf")`` is DisCO (arXiv:2505.12366), which ignores lengths.

Formula: with ``s_i`` the mean log-probability of the tokens of completion ``i`` and ``C`` the
longest completion allowed, the paper maximises over groups with right and wrong answers ``J_q =
sum_{i right} w_i s_i - tau log mean_{j wrong} exp(s_j / tau)``, ``w_i`` the softmax of ``(1 - L_i /
C) / lam`` over the right answers. The gradient of ``-J_q`` is that of ``-sum_i A_i s_i`` with ``A_i
= w_i`` for right answers and ``A_j = -softmax(s / tau)_j`` over the wrong ones, which is what is
computed here. The loss is ``-(1 / Q) sum_i A_i s_i``, and ``Q`` counts all groups.

Where this differs from the paper: the scores ``s`` of the softmax are those of the policy that
sampled. In the first update after a generation that is the paper's gradient; in later ones the
softmax stays where it was (at ``tau = 10`` it is near uniform anyway). The paper's constraint,
``beta / 2 max(KL(old, new) - delta, 0)^2``, is 0 with gradient 0 in the first update and is not
part of the advantages: in later updates the trainer's clipping holds the policy instead.

Cost: the scores of all completions under the sampling policy; trainers that keep these
log-probabilities have them for nothing, others pay one forward without gradient.

When it loses: where ``lam`` is far below the spread of ``L / C`` all weight falls on the shortest
right answer: at ``lam = 0.1``, an answer shorter by a quarter of ``C`` counts 12 times as much.
Groups that are all right give no gradient, so nothing shortens what is solved already. Small tau
concentrates on the most probable wrong answers.

If nothing qualifies: groups without a right or without a wrong answer get 0. Completions without
an outcome, a reward, a finite score or any token get 0 and no share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.rl.types import Advantages, Rollouts

__all__ = ["DRPO", "drpo_advantages"]


def _shares(logits: Tensor, rows: Tensor) -> Tensor:
    """Return the softmax over some rows of each group; 0 elsewhere, and if there are none."""
    chosen = torch.where(rows, logits, -torch.inf).softmax(dim=-1)
    return torch.where(rows, chosen, 0.0)


def drpo_advantages(
    right: Tensor, wrong: Tensor, share: Tensor, scores: Tensor, *, lam: float, tau: float
) -> Tensor:
    """Return the weight of every completion in DRPO's gradient.

    Args:
        right: ``(Q, G)`` bool.
        wrong: ``(Q, G)`` bool; rows that are neither take no part.
        share: ``(Q, G)`` length of each completion over the longest allowed.
        scores: ``(Q, G)`` mean log-probability of the tokens, in nats.
        lam: Temperature of the length reward ``1 - share``.
        tau: Temperature of the scores.

    Returns:
        ``(Q, G)``: in a group with both kinds, shares of 1 for the right and of -1 for the wrong
        rows; else 0.

    Example:
        >>> import torch
        >>> right = torch.tensor([[True, True, False]])
        >>> share, scores = torch.tensor([[0.25, 0.25, 0.5]]), torch.zeros(1, 3)
        >>> drpo_advantages(right, ~right, share, scores, lam=0.1, tau=10.0).tolist()
        [[0.5, 0.5, -1.0]]
    """
    mixed = right.any(dim=-1, keepdim=True) & wrong.any(dim=-1, keepdim=True)
    weight = _shares((1 - share) / lam, right) - _shares(scores / tau, wrong)
    return torch.where(mixed, weight, 0.0)


@dataclass(frozen=True)
class DRPO(Advantages):
    """Weigh right answers by length and wrong ones by score; see the module for the method card.

    Args:
        lam: Temperature of the length reward; small values favour the shortest right answer.
        tau: Temperature of the scores of wrong answers.

    Raises:
        ValueError: ``lam`` or ``tau`` not positive; outcomes other than 0 and 1; no scores.

    Example:
        >>> import torch
        >>> from onlinesel.rl.drpo import DRPO
        >>> from onlinesel.rl.types import Rollouts
        >>> outcome, lengths = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[2, 4, 8]])
        >>> rollouts = Rollouts(outcome, outcome, lengths, scores=-torch.ones(1, 3), longest=8)
        >>> [round(value, 3) for value in DRPO().compute(rollouts)[0].tolist()]
        [0.924, 0.076, -1.0]
    """

    lam: float = 0.1
    tau: float = 10.0

    needs_scores: ClassVar[bool] = True
    per_sequence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, usual in (("lam", 0.1), ("tau", 10.0)):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"DRPO: {name} must be positive, got {value}. Use {usual}.")

    def compute(self, rollouts: Rollouts) -> Tensor:
        """Return the advantages, ``(Q, G)`` float32."""
        scores = _checked_scores(rollouts)
        usable = torch.isfinite(rollouts.rewards) & torch.isfinite(scores)
        usable &= rollouts.lengths > 0
        found = drpo_advantages(
            usable & (rollouts.outcome == 1),
            usable & (rollouts.outcome == 0),
            rollouts.lengths.double() / rollouts.longest,
            scores.double(),
            lam=self.lam,
            tau=self.tau,
        )
        return found.float()


def _checked_scores(rollouts: Rollouts) -> Tensor:
    """Return the scores; refuse rollouts from which the method cannot be computed."""
    if rollouts.scores is None:
        raise ValueError(
            "DRPO: rollouts must hold scores, got None. Fill them with the mean log-probability of "
            "each completion (needs_scores)."
        )
    if rollouts.longest < 1:
        raise ValueError(
            f"DRPO: longest must be at least 1, got {rollouts.longest}. "
            "Say how many tokens a completion may have."
        )
    outcome = rollouts.outcome
    other = outcome[(outcome != 0) & (outcome != 1) & ~torch.isnan(outcome)]
    if other.numel():
        raise ValueError(
            f"DRPO: outcome must be 0 or 1, got {other[0].item():g}. "
            "Name the reward function that says right or wrong (outcome=), or say above which "
            "value an answer is right (success=)."
        )
    return rollouts.scores
