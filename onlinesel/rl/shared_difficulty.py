"""SharedDifficulty: predict a problem's pass rate from what problems have in common.

Idea: per-problem memory must roll every problem out once before it knows anything. A regression on
features that problems share, by default the policy's own embedding of the prompt, generalises from
the first few batches on: also problems never rolled out are predicted. Its prediction is the prior
of a per-problem belief, so that what a problem itself showed has the last word.

Source: ours; the ingredients are Bayesian linear regression with Thompson sampling (Agrawal and
Goyal, arXiv:1209.3352) and the Beta belief of MoPPS (arXiv:2507.04632).

Formula: two linear regressions on features ``x`` share one precision matrix: of the measured rate
``k / n``, and of the unbiased estimate of its squared error ``(p - x w)^2``, which tells problems
of rate one half from a mixture of easy and hard ones that share their features. (Graded outcomes
count as fractions of a success; ``p^2`` is estimated from every pair of different completions.)
Weights are drawn from their posterior (Thompson). Mean ``mu`` and squared error ``v`` give the
prior ``Beta(s mu, s (1 - mu))`` with ``s = mu (1 - mu) / v - 1``, between 0.1 and ``strength``; the
problem's own counts, halved every ``half_life`` times that groups were scored, are added; proposed
are the problems of smallest ``E[(p - target)^2]``. The regressions forget: each group leaves the
share ``forgetting`` of what they knew.

Cost: one forward over the prompts at the start of the run (no generation), in batches of as many
tokens, and principal components of their features, which the callback keeps for runs that begin
with the same weights and prompts; then O(N) a proposal, O(N + k^2) a group, 4 k + 16 bytes a
problem. Features stay those of the first step, and are part of the checkpoint. They are of the
text: images in a prompt are left out, and of a prompt longer than the model's positions the last
ones count.

When it loses: where nothing in the prompt tells its difficulty; and with many groups a step, where
plain training already has more informative groups than it can use. Cut the prompts per step to what
plain training effectively learned from, or the gain vanishes. On small data sets, below
``candidates`` problems for each one of a batch, it comes back to the same few as long as they stay
near the target: with 200 problems and batches of 16, of which a fifth was worth rolling out, 16
problems got 82 % of 60 simulated batches without a ``rest``; with 2,000 problems, 17 %. Lower
``candidates`` there: with 4 of 200, they got 34 %, and 68 % instead of 86 % of the groups were
mixed. Where difficulty grows smoothly, a target of one half stays on the easy end; ``target=None``
gained there what the target lost (``recipes/results/demo_grpo_cpu_5_seeds.md``).

Measured: to plain GRPO's best held-out reward with 32 ± 9 % of its rollouts and 39 ± 15 % of its
time on the demo's task of trivial, learnable and impossible problems, 76 ± 11 % and 84 ± 14 % on
its task of sums of 1 to 6 digits.

If nothing is known: draws are wide, so the choice is close to uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.rl.prompts import (
    PromptSampler,
    beta_moments,
    check_candidates,
    in_proportion,
)
from onlinesel.rl.thompson import InformativeProbability
from onlinesel.types import State

__all__ = ["SharedDifficulty", "principal_features"]

_WIDEST = 1024  # of the matrix whose eigenvectors are taken
_BLOCK = 4096  # rows that are float64 at a time
_NOISE = 0.15  # standard deviation of a measured rate about its prediction
_ERROR = 0.05  # squared error of a prediction before anything is known of it


def principal_features(raw: Tensor, components: int = 24) -> Tensor:
    """Return standardised principal components of raw features, and a constant.

    Args:
        raw: ``(N, d)`` float; of a wide one, columns are first added up at random, to 1024.
        components: Number of components ``k``, at most; fewer if the data have fewer.

    Returns:
        ``(N, k + 1)`` float32, each component of mean 0 and variance 1, the last column 1.

    Example:
        >>> import torch
        >>> raw = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 8.0]])
        >>> [round(value, 2) for value in principal_features(raw, 2)[:, 0].abs().tolist()]
        [1.22, 0.0, 1.22]
    """
    size, width = raw.shape
    blocks = raw.split(_BLOCK)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / size
    squares = [(block.double() - mean).square().sum(dim=0) for block in blocks]
    spread = (torch.stack(squares).sum(dim=0) / size).sqrt()
    # A constant column has at most the spread of rounding errors.
    varies = spread > 1e-9 * mean.abs()
    scale = torch.where(varies, 1 / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (width,), generator=generator) * 2.0 - 1

    def standard(block: Tensor) -> Tensor:
        x = (block.double() - mean) * scale
        if width <= _WIDEST:
            return x
        # Sums with random signs keep the expectation of all inner products.
        folded = torch.zeros(x.shape[0], _WIDEST, dtype=torch.float64)
        for part in (x * sign).split(_WIDEST, dim=1):
            folded[:, : part.shape[1]] += part
        return folded

    second = sum(x.T @ x for x in map(standard, blocks)) / size
    values, vectors = torch.linalg.eigh(second)
    best = values.argsort(descending=True)[:components]
    best = best[values[best] > 1e-6 * values.max().clamp(min=1e-12)]
    turn = vectors[:, best] / values[best].sqrt()
    scores = torch.cat([(standard(block) @ turn).float() for block in blocks])
    return torch.cat([scores, torch.ones(size, 1)], dim=1)


@dataclass(frozen=True)
class SharedDifficulty(PromptSampler):
    """Roll out the problems predicted nearest to the target pass rate, seen or not.

    Args:
        target: Pass rate that teaches most; 0.3 to 0.5. None proposes in proportion to the
            probability of a mixed group, which keeps hard problems in the choice that a target
            would leave for later.
        features: ``"policy"`` embeds the prompts with the model as it is when the run starts, or
            takes what an earlier run kept of the same (in ``HF_ASSETS_CACHE``); another name is a
            column of the data set that holds a vector for each problem.
        components: Principal components that are kept.
        strength: Most completions that the prediction counts as, against a problem's own.
        half_life: How many times groups are scored, once for each generation call, until a
            problem's own outcomes count half; None never forgets.
        forgetting: Share of the regression's memory that survives a group.
        floor: Share of the proposals drawn uniformly.
        candidates: Problems compared for each one proposed; None compares all.
        rest: Proposals for which a problem is left alone after its own.

    Raises:
        ValueError: A share outside its range, no component, or no candidate.

    Example:
        >>> import torch
        >>> from onlinesel.rl import PromptPool
        >>> x = torch.linspace(-1, 1, 21)[:, None]
        >>> pool = PromptPool(SharedDifficulty(candidates=None, floor=0), 21, trials=8, features=x)
        >>> ids = torch.tensor([0, 5, 15, 20] * 10)
        >>> rate = torch.tensor([0, 2, 6, 8] * 10)
        >>> pool.observe(ids, rate, torch.full((40,), 8))
        >>> 8 <= pool.propose(1).item() <= 12
        True
    """

    needs: ClassVar[tuple[str, ...]] = ("successes", "squares")
    target: float | None = 0.5
    features: str | None = "policy"
    components: int = 24
    strength: float = 8.0
    half_life: float | None = 20.0
    forgetting: float = 0.9995
    floor: float = 0.05
    candidates: int | None = 16
    rest: int = 5

    def __post_init__(self) -> None:
        for name in ("target", "floor", "forgetting"):
            value = getattr(self, name)
            if not 0 <= (0.5 if name == "target" and value is None else value) <= 1:
                raise ValueError(
                    f"SharedDifficulty: {name} must be between 0 and 1, got {value}. "
                    "Leave it out for the default."
                )
        for name in ("components", "strength", "half_life"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"SharedDifficulty: {name} must be above 0, got {value}. "
                    "Leave it out for the default."
                )
        check_candidates(self)

    @property
    def _center(self) -> float:
        """Pass rate of a problem of which nothing is known."""
        return 0.5 if self.target is None else self.target

    def init(self, prompts: int, features: Tensor | None = None) -> State:
        """Return a regression that knows nothing.

        Raises:
            ValueError: No features, not one row a problem, or numbers that are not finite.
        """
        shape = None if features is None else tuple(features.shape)
        fits = shape is not None and len(shape) == 2 and shape[0] == prompts and shape[1] > 0
        if features is None or not fits:
            raise ValueError(
                f"SharedDifficulty: features must be a matrix of {prompts} rows, got {shape}. "
                "Give every problem one vector of the same length."
            )
        bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten()
        if bad.shape[0]:
            raise ValueError(
                f"SharedDifficulty: features must be finite, got others in {bad.shape[0]} of "
                f"{prompts} rows, the first is {int(bad[0])}. Leave these problems out, or "
                "name another column by features=."
            )
        x = principal_features(features, self.components)
        own = torch.zeros(prompts, dtype=torch.float64)
        return {
            "x": x,
            "precision": torch.eye(x.shape[1], dtype=torch.float64),
            "moments": torch.zeros(x.shape[1], 2, dtype=torch.float64),
            "successes": own,
            "failures": own.clone(),
        }

    def _weights(self, state: State, generator: torch.Generator | None) -> Tensor:
        """Return the regressions' weights ``(k, 2)``: the mean, or a draw."""
        factor = torch.linalg.cholesky(state["precision"])
        mean = torch.cholesky_solve(state["moments"], factor)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        return mean + torch.linalg.solve_triangular(factor.T, noise, upper=True)

    def _beliefs(
        self, ids: Tensor, state: State, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the Beta belief of some problems: predicted prior plus own counts."""
        guess = state["x"][ids].double() @ self._weights(state, generator)
        mean = (guess[:, 0] + self._center).clamp(0.02, 0.98)
        error = (guess[:, 1] + _ERROR).clamp(min=1e-6)
        # Beta(s mu, s (1 - mu)) has variance mu (1 - mu) / (s + 1).
        s = (mean * (1 - mean) / error - 1).clamp(0.1, self.strength)
        return s * mean + state["successes"][ids], s * (1 - mean) + state["failures"][ids]

    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        """Return the negative expected squared distance to the target, under drawn weights."""
        a, b = self._beliefs(ids, state, generator)
        if self.target is None:
            return in_proportion(InformativeProbability.informative(a, b, trials), generator)
        mean, std = beta_moments(a, b)
        return -(std.square() + (mean - self.target).square())

    def observe(
        self,
        ids: Tensor,
        successes: Tensor,
        trials: Tensor,
        state: State,
        squares: Tensor | None = None,
    ) -> State:
        """Update the regressions and the problems' own counts.

        Args:
            ids: As :meth:`PromptSampler.observe`, as are all but the last.
            successes: ``(Q,)``.
            trials: ``(Q,)``.
            state: The state.
            squares: ``(Q,)`` sum of the squared outcomes; None where they are 0 and 1.
        """
        squares = successes if squares is None else squares
        x = state["x"][ids].double()
        rate = successes / trials
        keep = self.forgetting ** ids.shape[0]
        prior = torch.eye(x.shape[1], dtype=torch.float64)
        new = {
            **state,
            "precision": keep * state["precision"] + (1 - keep) * prior + x.T @ x / _NOISE**2,
            "moments": keep * state["moments"],
        }
        new["moments"][:, 0] += x.T @ (rate - self._center) / _NOISE**2
        guess = x @ self._weights(new, None)[:, 0] + self._center
        # The mean product of two different completions estimates p^2 without bias, for outcomes of
        # 0 and 1 it is k (k - 1) / (n (n - 1)); a single completion cannot.
        pairs = (trials * (trials - 1)).clamp(min=1)
        square = torch.where(trials > 1, (successes.square() - squares) / pairs, rate)
        error = square - 2 * guess * rate + guess.square()
        new["moments"][:, 1] += x.T @ (error - _ERROR) / _NOISE**2
        fade = 1.0 if self.half_life is None else 0.5 ** (1 / self.half_life)
        for name, count in (("successes", successes), ("failures", trials - successes)):
            new[name] = (fade * state[name]).index_add(0, ids, count)
        return new

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the beliefs."""
        return beta_moments(*self._beliefs(torch.arange(state["x"].shape[0]), state, None))
