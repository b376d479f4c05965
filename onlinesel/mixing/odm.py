"""ODM: more of the domains whose loss is high, as a bandit that keeps exploring.

Idea: domains are the arms of an adversarial bandit (EXP3) and the training loss is the reward:
what the model predicts worst, it can learn most from. Exploration starts uniform and fades.

Paper: Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training"
(arXiv:2312.02406).

Formula: with ``L_i`` the mean loss of the rows of domain i in a step, for the domains that occur in
it, ``R_i <- decay R_i + (1 - decay) L_i / p_i``, where ``p`` are the proportions in force; ``R``
starts at 0. At step ``t = 1, 2, ...``, ``eps_t = min(1 / K, sqrt(ln K / (K t)))``, ``eps_0 = 1 /
K``, and ``p_i = (1 - K eps_t) exp(eps_(t-1) R_i) / sum_j exp(eps_(t-1) R_j) + eps_t``. While
``t <= K ln K`` this is the uniform draw. During the first ``warmup`` steps the proportions are
``initial``; rewards are gathered all the same.

Where this differs from the paper: it draws whole micro-batches from one domain and adds up their
losses; here a step mixes rows of all domains, and the mean of a domain's rows keeps the reward
independent of the batch size. ``p`` is that of the moment of observing; where a loader looks ahead,
the rows were drawn some steps before. Code that goes back to the authors' release averages
``exp(loss)`` without dividing by ``p`` and mixes in proportion to that average.

Cost: nothing but O(N + K) a step; the losses are those of training.

When it loses: noise has the highest loss and never gets better: a domain of random text is drawn
most. Domains whose losses differ in scale (code against prose) are told apart by their scale.
Dividing by ``p`` pulls towards equal shares of ``L_i / p_i``, and with ``eps`` the difference
between domains fades again. Losses of rows that a strategy chose for their loss are higher than
their domain's.

If nothing is known: the draw is uniform, or ``initial`` during the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.mixing.types import Mixture, domain_means, normalized, start_proportions
from onlinesel.types import State

__all__ = ["ODM", "exp3_proportions", "exploration_rate"]


def exploration_rate(step: int, domains: int) -> float:
    """Return the least share of a domain at a step: ``min(1 / K, sqrt(ln K / (K step)))``.

    Args:
        step: From 1; 0 gives ``1 / K``.
        domains: Number of domains ``K``.

    Example:
        >>> from onlinesel.mixing.odm import exploration_rate
        >>> [round(exploration_rate(step, 4), 3) for step in (0, 5, 6, 100)]
        [0.25, 0.25, 0.24, 0.059]
    """
    if step == 0:
        return 1 / domains
    return min(1 / domains, math.sqrt(math.log(domains) / (domains * step)))


def exp3_proportions(rewards: Tensor, step: int) -> Tensor:
    """Return the EXP3 distribution of a step over the domains.

    Args:
        rewards: ``(K,)`` float64.
        step: Step about to be drawn, from 1.

    Returns:
        ``(K,)`` float64, positive, sums to 1.

    Example:
        >>> import torch
        >>> from onlinesel.mixing.odm import exp3_proportions
        >>> rewards = torch.tensor([4.0, 1.0], dtype=torch.float64)
        >>> [round(share, 4) for share in exp3_proportions(rewards, 100).tolist()]
        [0.539, 0.461]
    """
    count = rewards.shape[0]
    now, before = exploration_rate(step, count), exploration_rate(step - 1, count)
    return (1 - count * now) * torch.softmax(before * rewards, dim=0) + now


@dataclass(frozen=True)
class ODM(Mixture):
    """Draw domains by their training loss; see the module for the method card.

    Args:
        decay: Weight of the past in the moving average of rewards (alpha in the paper), in [0, 1).
        warmup: Steps that are drawn in the initial proportions.
        initial: Proportions of the warm-up: positive numbers, ``"uniform"`` or ``"size"``.

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel.mixing import ODM
        >>> mixture = ODM()
        >>> state = mixture.init(torch.tensor([50, 50]))
        >>> for _ in range(20):
        ...     state = mixture.observe(torch.tensor([0, 1]), torch.tensor([4.0, 1.0]), state)
        >>> [round(share, 3) for share in mixture.proportions(state).tolist()]
        [0.593, 0.407]
    """

    decay: float = 0.9
    warmup: int = 0
    initial: Sequence[float] | str = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"ODM: decay must be in [0, 1), got {self.decay}. Use 0.9, or 0 for no memory."
            )
        if self.warmup < 0:
            raise ValueError(
                f"ODM: warmup must be at least 0 steps, got {self.warmup}. "
                "Use 0 for none, or 1 % of the run's steps."
            )
        why = "Rewards are divided by the share"
        object.__setattr__(self, "initial", normalized(self, "initial", self.initial, no_zero=why))

    def init(self, sizes: Tensor) -> State:
        """Return rewards of 0."""
        return {
            "initial": start_proportions(self, "initial", self.initial, sizes),
            "reward": torch.zeros(len(sizes), dtype=torch.float64),
            "steps": torch.tensor(0),
        }

    def proportions(self, state: State) -> Tensor:
        """Return the distribution of the next step."""
        done = int(state["steps"])
        if done < self.warmup:
            return state["initial"]
        return exp3_proportions(state["reward"], done + 1)

    def observe(
        self,
        domain: Tensor,
        loss: Tensor,
        state: State,
        *,
        reference_loss: Tensor | None = None,
    ) -> State:
        """Move the rewards of the domains that occur; ``reference_loss`` plays no part."""
        means, seen = domain_means(domain, loss, len(state["reward"]))
        if not bool(seen.any()):
            return state
        gained = self.decay * state["reward"] + (1 - self.decay) * means / self.proportions(state)
        reward = torch.where(seen, gained, state["reward"])
        return {"initial": state["initial"], "reward": reward, "steps": state["steps"] + 1}
