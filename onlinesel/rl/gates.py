"""Gates: which groups of completions a policy can learn from.

A gate is an ordinary strategy that reads ``reward`` (the verifiable outcome of each completion)
and ``group`` (the prompt that it answers) and gives whole groups weight 1 or 0. A group trains if
any of its rows has weight; a completion without a reward never does. Gates combine as all
strategies do: ``When(PassRateBand(0.25, 0.75), start=50)`` lets every group train for 50 steps and
then applies the band.

**Outcomes** are 1 for right, 0 for wrong, and anything between for what is partly right; nan is
unknown. Graded outcomes count as that fraction of a success.

**Decide on the outcome, never on a shaped reward.** A length bonus gives a group in which every
answer is wrong a spread, which normalisation blows up to full size: filtering on such a sum is
worse than no filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["PassRateBand", "ZeroVariance", "count_outcomes"]

_ROUNDING = 1e-6  # of the mean of graded outcomes in float32


def count_outcomes(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count successes by group.

    Args:
        reward: ``(N,)`` 1 for a success, 0 for a failure, a fraction for what lies between, nan
            where nothing is known.
        group: ``(N,)`` int64.

    Returns:
        ``(Q,)`` successes and ``(Q,)`` scorable completions of each group, float32, in the order
        of the group numbers, and ``(N,)`` the position of each row's group among them.

    Example:
        >>> import torch
        >>> reward = torch.tensor([1.0, 0.0, float("nan"), 1.0])
        >>> [part.tolist() for part in count_outcomes(reward, torch.tensor([5, 5, 7, 7]))]
        [[1.0, 1.0], [2.0, 1.0], [0, 0, 1, 1]]
    """
    names, where = group.unique(return_inverse=True)
    known = ~torch.isnan(reward)
    zeros = torch.zeros(names.shape[0])
    trials = zeros.index_add(0, where, known.float())
    return zeros.index_add(0, where, torch.where(known, reward, 0.0)), trials, where


def _spread(reward: Tensor, group: Tensor) -> Tensor:
    """Return the largest minus the smallest finite reward of each row's group; -inf without any."""
    names, where = group.unique(return_inverse=True)
    known = torch.isfinite(reward)
    extremes = []
    for how, fill in (("amax", -torch.inf), ("amin", torch.inf)):
        start = torch.full((names.shape[0],), fill)
        value = torch.where(known, reward, fill)
        extremes.append(start.scatter_reduce(0, where, value, how))
    return (extremes[0] - extremes[1])[where]


@dataclass(frozen=True)
class ZeroVariance(Strategy):
    """Drop the groups in which every completion has the same outcome: they have no gradient.

    Idea: a group whose completions are all right or all wrong has advantage 0 everywhere. Training
    on it costs a forward and a backward, and dilutes the mean of the others. (With a KL term it has
    that term's gradient, which goes with it.)

    Paper: DAPO, Yu et al. (arXiv:2503.14476), "dynamic sampling".

    Formula: a group trains if ``max r - min r > tolerance`` over its scorable completions; for
    outcomes of 0 and 1 that is ``0 < successes < completions``.

    Cost: none. What it saves is the backward pass of the dropped groups; their completions were
    generated all the same. It saves rollouts only together with a prompt sampler.

    When it loses: in rollouts. On the demo's two tasks it took 150 and 102 % of plain training's
    for the same held-out reward (``recipes/results/demo_grpo_cpu_5_seeds.md``).

    Where this differs from verl's filter: that keeps a group of a single completion, for estimators
    whose baseline is not the group's. In GRPO its advantage is 0, so here it is dropped.

    If nothing qualifies: every weight is 0, and the refill's policy decides. A group with fewer
    than two scorable completions has no spread.

    Args:
        tolerance: Spread up to which rewards count as equal; 1e-6 forgives rounding.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> reward, group = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> Selector(ZeroVariance()).select(Signals(reward=reward, group=group)).rows.tolist()
        [2, 3]
    """

    needs: ClassVar[tuple[str, ...]] = ("reward", "group")
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(
                f"ZeroVariance: tolerance must be at least 0, got {self.tolerance}. "
                "Use 1e-6 to forgive rounding."
            )

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Give weight to the groups whose outcomes differ."""
        reward, group = signals.require(self, "reward"), signals.require(self, "group")
        spread = _spread(reward, group)
        return Selection((spread > self.tolerance).float(), spread), state

    def possible(self, generations: int) -> list[int]:
        """Return the numbers of successes with which a group of ``generations`` trains."""
        return list(range(1, generations)) if self.tolerance < 1 else []


@dataclass(frozen=True)
class PassRateBand(Strategy):
    """Train on the groups whose share of right answers lies in a band around one half.

    Idea: what a policy can gain on a prompt grows with the variance of its outcome, ``p (1 - p)``;
    problems that it always or never solves teach nothing, and those near the edges little.

    Paper: Bae et al., "Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning"
    (arXiv:2504.03380): balanced bands around 1/2 and skewed ones that cut one side.

    Formula: with ``k`` successes in ``n`` scorable completions, a group trains if ``0 < k < n`` and
    ``low <= k / n <= high`` (``<`` with ``inclusive=False``). Graded outcomes count as fractions of
    a success: ``k`` is their sum, and instead of ``0 < k < n`` they must not all be equal, which is
    the same for outcomes of 0 and 1. ``PassRateBand(0, 0.75)`` keeps the
    hard side, ``PassRateBand(0.25, 1)`` the easy one. With ``anneal``, the band narrows linearly
    from every mixed group to ``(low, high)`` over that many steps, which is ours: a hard band is
    brutal on a cold start (at ``n = 8``, a problem solved once in twenty passes a 0.25 to 0.75
    band in 6 % of its groups).

    Cost: none by itself; what it rejects was generated. With a refill, a batch of ``Q`` groups
    takes ``Q / a`` groups, ``a`` the share that passes. The band alone amounts to a larger batch
    without the backward of its dead groups; it saves rollouts together with a prompt sampler.

    When it loses: on data of smoothly growing difficulty together with a sampler that aims at one
    half, it trained on the easy end and ended below plain training; on hard sets with few
    completions a prompt almost nothing passes; and next to a good sampler it throws away half of
    what was generated (``recipes/results/demo_grpo_cpu_5_seeds.md``).

    If nothing qualifies: every weight is 0, and the refill's policy decides.

    Args:
        low: Lowest share of successes.
        high: Highest share.
        inclusive: Whether the bounds themselves pass.
        anneal: Optimizer steps, from the first of the run, over which the band closes; 0 applies
            it as it is from the start.

    Raises:
        ValueError: Not ``0 <= low <= high <= 1``; rewards that are not between 0 and 1.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> reward = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
        >>> signals = Signals(reward=reward, group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        >>> Selector(PassRateBand(0.25, 0.75)).select(signals).rows.tolist()
        [4, 5, 6, 7]
    """

    needs: ClassVar[tuple[str, ...]] = ("reward", "group")
    low: float = 0.25
    high: float = 0.75
    inclusive: bool = True
    anneal: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                "PassRateBand: low and high must be shares with 0 <= low <= high <= 1, got "
                f"{self.low} and {self.high}. Use 0.25 and 0.75 for the balanced band."
            )
        if self.anneal < 0:
            raise ValueError(
                f"PassRateBand: anneal must be at least 0 steps, got {self.anneal}. "
                "Leave it out for a band that does not move."
            )

    def band(self, step: int) -> tuple[float, float]:
        """Return the band at an optimizer step.

        Example:
            >>> PassRateBand(0.2, 0.8, anneal=10).band(5)
            (0.1, 0.9)
        """
        share = 1.0 if step >= self.anneal else step / self.anneal
        return share * self.low, self.high + (1.0 - share) * (1.0 - self.high)

    def _within(self, rate: Tensor, slack: Tensor | float, step: int) -> Tensor:
        """Return which rates lie in the band; ``slack`` is what rounding may have moved them."""
        low, high = self.band(step)
        if self.inclusive:
            return (rate >= low - slack) & (rate <= high + slack)
        return (rate > low + slack) & (rate < high - slack)

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Give weight to the groups inside the band."""
        reward, group = signals.require(self, "reward"), signals.require(self, "group")
        known = reward[~torch.isnan(reward)]
        other = known[~((known >= 0) & (known <= 1))]
        if other.numel():
            raise ValueError(
                "PassRateBand: reward must be an outcome between 0 and 1, got "
                f"{other[0].item():g}. Name the reward function that says right or wrong "
                "(outcome=), or say above which value an answer is right (success=)."
            )
        successes, trials, where = count_outcomes(reward, group)
        rate = (successes.double() / trials.clamp(min=1).double())[where]
        # Sums of ones are exact; sums of fractions in float32 are not.
        whole = torch.isnan(reward) | (reward == 0) | (reward == 1)
        graded = torch.zeros_like(trials).index_add(0, where, (~whole).float()) > 0
        slack = torch.where(graded[where], _ROUNDING, 0.0).double()
        passes = (_spread(reward, group) > 0) & self._within(rate, slack, step)
        return Selection(passes.float(), rate.float()), state

    def possible(self, generations: int) -> list[int]:
        """Return the numbers of successes with which a group of ``generations`` trains.

        Graded outcomes may pass where no whole number of successes can.

        Example:
            >>> PassRateBand(0.25, 0.75).possible(8)
            [2, 3, 4, 5, 6]
        """
        counts = torch.arange(1, generations)
        return counts[self._within(counts.double() / generations, 0.0, self.anneal)].tolist()
