"""Prompt samplers: which problems to roll out next, decided before the rollout.

A filter after the rollout cannot save one; only a prediction before it can. A sampler is a frozen
dataclass of its hyper-parameters with pure functions over a flat state, as a strategy is;
:class:`PromptPool` is the one stateful object around it. Prompts are known by their row number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from onlinesel.types import State

__all__ = ["PromptPool", "PromptSampler", "beta_moments"]


def beta_moments(successes: Tensor, failures: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of Beta distributions.

    Example:
        >>> import torch
        >>> mean, std = beta_moments(torch.tensor([1.0]), torch.tensor([1.0]))
        >>> round(mean.item(), 3), round(std.item(), 3)
        (0.5, 0.289)
    """
    total = successes + failures
    mean = successes / total
    return mean, (mean * (1 - mean) / (total + 1)).sqrt()


def shuffled(free: Tensor, generator: torch.Generator) -> Tensor:
    """Return the row numbers at which a mask is True, in random order."""
    rows = free.nonzero().flatten()
    return rows[torch.randperm(rows.shape[0], generator=generator)]


def check_candidates(sampler: PromptSampler) -> None:
    """Refuse a bound that would propose fewer problems than are asked for, and a rest below 0."""
    if sampler.rest < 0:
        raise ValueError(
            f"{type(sampler).__name__}: rest must be at least 0 proposals, got {sampler.rest}. "
            "Use 0 for none."
        )
    if sampler.candidates is not None and sampler.candidates < 1:
        raise ValueError(
            f"{type(sampler).__name__}: candidates must be at least 1 or None, got "
            f"{sampler.candidates}. Use None to compare all problems."
        )


def in_proportion(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return scores whose largest ones are a draw without replacement in proportion to ``value``.

    The logarithm plus Gumbel noise: ``(N,)`` float64.
    """
    uniform = torch.rand(value.shape[0], generator=generator, dtype=torch.float64)
    return value.clamp(min=1e-12).log() - (-uniform.clamp(min=1e-12).log()).log()


class PromptSampler(ABC):
    """One way to choose problems: hyper-parameters as fields, and pure functions over a state.

    Attributes:
        needs: What :meth:`observe` reads of the outcomes: ``"successes"``, for which they must lie
            between 0 and 1, and ``"squares"``, which is then handed to it by name; empty for a
            method that only counts visits, which takes rewards of any kind.
        floor: Share of the proposals drawn uniformly, whatever the method thinks: beliefs about
            problems that are never looked at cannot be corrected.
        candidates: Problems compared for each one that is proposed, drawn at random; None compares
            all. A bound keeps the choice varied where the method's scores are alike.
        rest: Proposals for which a problem is left alone after it was proposed, if there are enough
            others: a policy that meets the same few problems again and again learns them by heart.
        features: Where :meth:`init` gets its features: ``"policy"``, a column, or None for none.
    """

    needs: ClassVar[tuple[str, ...]] = ("successes",)
    floor: float = 0.0
    candidates: int | None = None
    rest: int = 0
    features: str | None = None

    def init(self, prompts: int, features: Tensor | None = None) -> State:
        """Return the state before the first rollout.

        Args:
            prompts: Number of problems ``N``.
            features: ``(N, k)`` float32, what is known about each problem; None unless asked for.
        """
        return {}

    @abstractmethod
    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        """Return how much each problem is wanted, higher first: ``(C,)`` for ``(C,)`` ids.

        Args:
            ids: Row numbers of the problems compared.
            state: What :meth:`init` or :meth:`observe` returned.
            trials: Completions that a group will have.
            generator: The only source of randomness (CPU).
        """

    def propose(
        self, count: int, state: State, *, free: Tensor, trials: int, generator: torch.Generator
    ) -> tuple[Tensor, State]:
        """Return at most ``count`` row numbers, all different and all free, and the new state.

        Args:
            count: How many problems are wanted.
            state: The state.
            free: ``(N,)`` bool, False for problems that may not be proposed.
            trials: Completions that a group will have.
            generator: The only source of randomness (CPU).
        """
        uniform = int((torch.rand(count, generator=generator) < self.floor).sum())
        # In random order, so that problems of equal scores have equal chances.
        rows = shuffled(free, generator)
        explored, compared, wanted = rows[:uniform], rows[uniform:], count - uniform
        if self.candidates is not None:
            compared = compared[: wanted * self.candidates]
        if not compared.shape[0] or not wanted:
            return explored, state
        scores = self.scores(compared, state, trials=trials, generator=generator)
        best = scores.argsort(descending=True, stable=True)[:wanted]
        return torch.cat([compared[best], explored]), state

    @abstractmethod
    def observe(self, ids: Tensor, successes: Tensor, trials: Tensor, state: State) -> State:
        """Learn from scored groups, kept or not; returns the new state.

        Args:
            ids: ``(Q,)`` row numbers; one may occur twice.
            successes: ``(Q,)`` right answers of each group; graded ones count as fractions.
            trials: ``(Q,)`` scorable completions of each group, at least 1.
            state: The state; not to be changed in place.
        """

    def predict(self, state: State) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of every problem's pass rate; None without belief."""
        return None

    def metrics(self, state: State) -> dict[str, float]:
        """Return scalars for the log."""
        return {}


class PromptPool:
    """A prompt sampler over a data set, with what must survive a checkpoint.

    Ranks that share seed and observations propose the same problems without a word between them.

    Args:
        sampler: The method.
        prompts: Number of problems, at least 1.
        trials: Completions of a group, at least 1.
        seed: Of the pool's own generator.
        features: ``(N, k)`` for samplers that ask for them.
        initial: What the sampler's ``init`` returned for these problems; None calls it.
        state: What :meth:`state_dict` returned, to go on from there; features are part of it.

    Example:
        >>> import torch
        >>> from onlinesel.rl import PromptPool, Thompson
        >>> pool = PromptPool(Thompson(candidates=None), 3, trials=8)
        >>> for _ in range(40):
        ...     pool.observe(torch.tensor([0, 1, 2]), torch.tensor([0, 4, 8]), torch.full((3,), 8))
        >>> pool.propose(1).tolist()
        [1]
    """

    def __init__(
        self,
        sampler: PromptSampler,
        prompts: int,
        *,
        trials: int,
        seed: int = 0,
        features: Tensor | None = None,
        initial: State | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(sampler, PromptSampler):
            raise TypeError(
                f"PromptPool: sampler must be a PromptSampler instance, got {sampler!r}. "
                "Pass the method itself, for example Thompson()."
            )
        for name, value in (("prompts", prompts), ("trials", trials)):
            if value < 1:
                raise ValueError(
                    f"PromptPool: {name} must be at least 1, got {value}. "
                    "Pass the number of problems, and of completions for each."
                )
        self.sampler, self.trials = sampler, trials
        self._generator = torch.Generator().manual_seed(seed)
        self._visits = torch.zeros(prompts, dtype=torch.int64)
        self._last = torch.full((prompts,), -1, dtype=torch.int64)
        self._rested = torch.zeros(prompts, dtype=torch.int64)  # number of the call that frees it
        self._calls = torch.tensor(0)
        if state is None:
            self._state = sampler.init(prompts, features) if initial is None else dict(initial)
        else:
            self.load_state_dict(state)

    def propose(self, count: int, *, taken: Tensor | None = None) -> Tensor:
        """Return the row numbers of at most ``count`` different problems, ``(n,)`` int64.

        Args:
            count: How many are wanted; fewer come if fewer are left.
            taken: Row numbers that may not be proposed; -1 for a problem that has none.
        """
        free = torch.ones(self._visits.shape[0], dtype=torch.bool)
        if taken is not None:
            free[taken[taken >= 0].long()] = False  # an empty list becomes a float tensor
        count = max(min(count, int(free.sum())), 0)
        awake = free & (self._rested <= self._calls)
        free = awake if int(awake.sum()) >= count else free
        with torch.no_grad():
            ids, self._state = self.sampler.propose(
                count, self._state, free=free, trials=self.trials, generator=self._generator
            )
        self._calls = self._calls + 1
        self._rested[ids] = self._calls + self.sampler.rest
        return ids

    def observe(
        self,
        ids: Tensor,
        successes: Tensor,
        trials: Tensor,
        *,
        squares: Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Learn from scored groups; those without a scorable completion are left out.

        Args:
            ids: ``(Q,)`` row numbers; -1 for a problem that has none.
            successes: ``(Q,)`` right answers; graded ones count as fractions of one.
            trials: ``(Q,)`` scorable completions.
            squares: ``(Q,)`` sum of the squared outcomes of each group; None where they are 0 and
                1, whose squares are the outcomes themselves.
            step: Optimizer step, for the readout.

        Raises:
            ValueError: Successes that are not between 0 and the trials. Nothing is changed then.
        """
        known = (trials > 0) & (ids >= 0)
        squares = (successes if squares is None else squares)[known].double()
        ids, successes, trials = ids[known].long(), successes[known], trials[known]
        if not ids.shape[0]:
            return
        bad = ~((successes >= 0) & (successes <= trials))
        if bool(bad.any()) and self.sampler.needs:
            raise ValueError(
                "PromptPool: successes must be between 0 and trials, got "
                f"{successes[bad][0].item():g} of {trials[bad][0].item():g}. "
                "Count right answers, not their share."
            )
        more = {"squares": squares} if "squares" in self.sampler.needs else {}
        with torch.no_grad():
            self._state = self.sampler.observe(
                ids, successes.double(), trials.double(), self._state, **more
            )
        self._visits.index_add_(0, ids, torch.ones_like(ids))
        if step is not None:
            self._last[ids] = step

    def metrics(self) -> dict[str, float]:
        """Return scalars about the pool: share of problems seen, and the sampler's own."""
        seen = (self._visits > 0).float().mean().item()
        return {"prompts_seen": seen, **self.sampler.metrics(self._state)}

    def table(self) -> list[dict[str, Any]]:
        """Return what is believed about every problem.

        Each has ``id``, ``rate`` and ``std`` (None without belief), ``visits``, and ``last``, the
        optimizer step of its last visit (None before the first).
        """
        belief = self.sampler.predict(self._state)
        size = self._visits.shape[0]
        rates, stds = ([None] * size, [None] * size) if belief is None else (
            belief[0].tolist(), belief[1].tolist()
        )  # fmt: skip
        visits, lasts = self._visits.tolist(), self._last.tolist()
        return [
            {"id": i, "rate": r, "std": s, "visits": v, "last": last if last >= 0 else None}
            for i, (r, s, v, last) in enumerate(zip(rates, stds, visits, lasts, strict=True))
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs, as flat CPU tensors."""
        own = {
            "generator": self._generator.get_state(),
            "visits": self._visits.clone(),  # observing counts in place
            "last": self._last.clone(),
            "rested": self._rested.clone(),
            "calls": self._calls,
        }
        return {**own, **{f"sampler.{name}": value for name, value in self._state.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: The state is of a data set of another size. Nothing is changed then.
        """
        if state["visits"].shape != self._visits.shape:
            raise ValueError(
                f"PromptPool: state must be of {self._visits.shape[0]} problems, got "
                f"{state['visits'].shape[0]}. Resume with the data set that wrote it."
            )
        self._visits, self._last = state["visits"].clone(), state["last"].clone()
        self._rested, self._calls = state["rested"].clone(), state["calls"].clone()
        self._generator.set_state(state["generator"])
        self._state = {
            name.removeprefix("sampler."): value.clone()
            for name, value in state.items()
            if name.startswith("sampler.")
        }
