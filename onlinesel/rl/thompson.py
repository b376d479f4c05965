"""Thompson: problems whose pass rate, drawn from a belief, is nearest to the target.

Idea: keep a Beta belief about every problem's pass rate; draw from it; roll out the problems whose
draws are nearest to the rate that teaches most. Uncertain problems are drawn widely and so get
explored without a rule of their own.

Paper: MoPPS, Qu et al., "Can Prompt Difficulty be Online Predicted for Accelerating RL Finetuning
of Reasoning Models?" (arXiv:2507.04632).

Formula: ``gamma_q ~ Beta(a_q, b_q)``, prior (1, 1); proposed are the smallest ``(gamma_q -
target)^2``. After a group with ``k`` successes of ``n``: ``a <- discount a + (1 - discount) + k``
and ``b <- discount b + (1 - discount) + n - k``, so that old outcomes fade as the policy moves.
They fade when the problem is visited again, not before. Graded outcomes in [0, 1] count as
fractions of a success: ``k`` is their sum, which has the right mean and more variance than they do.

Where this differs from the paper: a share of the proposals, ``floor``, is uniform, so that a
problem once found hopeless is looked at again.

Cost: the problems are shuffled for each proposal, O(N), and ``candidates`` draws are made for each
one wanted; 16 bytes a problem.

When it loses: on large data sets seen once. It knows nothing of a problem before its first
rollout: with 1,600 hopeless problems among 2,000 and groups of 8, finding that out costs 12,800
rollouts. Use :class:`onlinesel.rl.SharedDifficulty` there. On small ones, below ``candidates``
problems for each one of a batch, it comes back to the same few: with 200 problems and batches of
16, of which a fifth was worth rolling out, 16 problems got 38 % of 60 simulated batches.

If nothing is known: all beliefs are equal, and the choice is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.prompts import (
    PromptSampler,
    beta_moments,
    check_candidates,
    in_proportion,
)
from onlinesel.types import State

__all__ = ["InformativeProbability", "Thompson", "draw_beta"]


def draw_beta(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from Beta distributions: ``(N,)`` float64, from the generator alone.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> draws = draw_beta(torch.full((5000,), 2.0), torch.full((5000,), 6.0), g)
        >>> round(draws.mean().item(), 2)
        0.25
    """
    x, y = (torch._standard_gamma(v.double(), generator=generator) for v in (a, b))
    return x / (x + y)  # torch never draws 0


def _check_shares(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(
                f"{owner}: {name} must be between 0 and 1, got {value}. "
                "Leave it out for the default."
            )


class _BetaBeliefs(PromptSampler):
    """The belief that both samplers of this file share: one Beta distribution a problem."""

    discount: float

    def init(self, prompts: int, features: Tensor | None = None) -> State:
        """Return the flat prior (1, 1) for every problem."""
        return {name: torch.ones(prompts, dtype=torch.float64) for name in ("a", "b")}

    def observe(self, ids: Tensor, successes: Tensor, trials: Tensor, state: State) -> State:
        """Fade what was known of these problems, and count their new outcomes."""
        new = {}
        for name, count in (("a", successes), ("b", trials - successes)):
            faded = state[name].clone()
            faded[ids] = self.discount * faded[ids] + (1 - self.discount)
            new[name] = faded.index_add(0, ids, count)
        return new

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the beliefs."""
        return beta_moments(state["a"], state["b"])


@dataclass(frozen=True)
class Thompson(_BetaBeliefs):
    """Roll out the problems whose drawn pass rates are nearest to the target (MoPPS).

    Args:
        target: Pass rate that teaches most; 0.3 to 0.5.
        discount: Share of the old counts that survives a visit; 1 never forgets.
        floor: Share of the proposals drawn uniformly.
        candidates: Problems compared for each one proposed; None compares all.
        rest: Proposals for which a problem is left alone after its own.

    Raises:
        ValueError: A share outside [0, 1], or no candidate.

    Example:
        >>> Thompson(target=0.4).discount
        0.5
    """

    target: float = 0.5
    discount: float = 0.5
    floor: float = 0.05
    candidates: int | None = 16
    rest: int = 0

    def __post_init__(self) -> None:
        _check_shares(
            "Thompson", target=self.target, discount=self.discount, floor=self.floor
        )  # fmt: skip
        check_candidates(self)

    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        """Return the negative squared distance of a draw from the target."""
        drawn = draw_beta(state["a"][ids], state["b"][ids], generator)
        return -(drawn - self.target).square()


@dataclass(frozen=True)
class InformativeProbability(_BetaBeliefs):
    """Draw problems in proportion to the probability that their group will be mixed (MaPP's score).

    ``V = 1 - B(a + G, b) / B(a, b) - B(a, b + G) / B(a, b)``, the posterior probability that ``G``
    completions are neither all right nor all wrong. No target rate has to be named.

    Source: the selection score of MaPP, a preprint of 2026; the belief is that of
    :class:`Thompson`, and so are cost and weakness.

    Args:
        discount: Share of the old counts that survives a visit; 1 never forgets.
        floor: Share of the proposals drawn uniformly.
        candidates: Problems compared for each one proposed; None compares all.
        rest: Proposals for which a problem is left alone after its own.

    Raises:
        ValueError: A share outside [0, 1], or no candidate.

    Example:
        >>> import torch
        >>> sampler = InformativeProbability()
        >>> value = sampler.informative(torch.tensor([1.0, 100.0]), torch.tensor([1.0, 1.0]), 8)
        >>> [round(v, 3) for v in value.tolist()]
        [0.778, 0.074]
    """

    discount: float = 0.5
    floor: float = 0.05
    candidates: int | None = 16
    rest: int = 0

    def __post_init__(self) -> None:
        _check_shares("InformativeProbability", discount=self.discount, floor=self.floor)
        check_candidates(self)

    @staticmethod
    def informative(a: Tensor, b: Tensor, trials: int) -> Tensor:
        """Return the probability of a mixed group under Beta beliefs."""
        a, b = a.double(), b.double()  # float32 log-gammas cancel to nothing

        def ratio(x: Tensor, y: Tensor) -> Tensor:  # B(x + G, y) / B(x, y)
            rest = torch.lgamma(x + trials) - torch.lgamma(x)
            return (rest + torch.lgamma(x + y) - torch.lgamma(x + y + trials)).exp()

        return (1 - ratio(a, b) - ratio(b, a)).clamp(min=0)

    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        """Return scores whose largest are a draw in proportion to the probability."""
        value = self.informative(state["a"][ids], state["b"][ids], trials)
        return in_proportion(value, generator)
