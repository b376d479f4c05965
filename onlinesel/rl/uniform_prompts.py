"""UniformPrompts and GRESO: walk through shuffled epochs, taking every problem or skipping some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.rl.prompts import PromptSampler, shuffled
from onlinesel.types import State

__all__ = ["GRESO", "UniformPrompts"]


class _Walk(PromptSampler):
    """Go through a shuffled order of all problems, epoch after epoch."""

    def init(self, prompts: int, features: Tensor | None = None) -> State:
        """Return a walk that shuffles at its first step."""
        nothing = torch.tensor(0)
        return {"order": torch.arange(prompts), "cursor": torch.tensor(prompts), "epoch": nothing}

    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        """Return equal scores: the walk decides."""
        return torch.zeros(ids.shape[0])

    def skips(self, ids: Tensor, state: State, generator: torch.Generator) -> Tensor:
        """Return which of the next problems the walk passes over: ``(C,)`` bool."""
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    def propose(
        self, count: int, state: State, *, free: Tensor, trials: int, generator: torch.Generator
    ) -> tuple[Tensor, State]:
        """Take the next problems of the walk that are free and not skipped.

        Problems that are not free are put off to later in the epoch, so that none loses its turn.
        """
        order, cursor, epoch = state["order"], int(state["cursor"]), int(state["epoch"])
        size, free, order, picked = order.shape[0], free.clone(), order.clone(), [order[:0]]
        missing, look, last = count, 2 * count, epoch + 2
        # This epoch and the next hold everything that is free, unless skips are unlucky.
        while missing and (cursor < size or epoch < last):
            if cursor >= size:
                order, cursor, epoch = torch.randperm(size, generator=generator), 0, epoch + 1
            ahead = order[cursor : cursor + look]
            available = free[ahead]
            wanted = available & ~self.skips(ahead, state, generator)
            reached = wanted.cumsum(0) - wanted.long() < missing
            passed = reached & available  # chosen or skipped
            picked.append(ahead[reached & wanted])
            free[picked[-1]] = False
            missing -= picked[-1].shape[0]
            over = missing > 0 and cursor + look >= size
            order[cursor : cursor + look] = torch.cat([ahead[passed], ahead[~passed]])
            cursor = size if over else cursor + int(passed.sum())
            look *= 2  # the more is taken, the further away the next one
        rest = shuffled(free, generator)[:missing] if missing else order[:0]
        numbers = {"cursor": torch.tensor(cursor), "epoch": torch.tensor(epoch)}
        return torch.cat([*picked, rest]), {**state, "order": order, **numbers}


@dataclass(frozen=True)
class UniformPrompts(_Walk):
    """Every problem once an epoch, in shuffled order: the baseline of every sampler.

    Cost: O(N) a proposal, 8 bytes a problem.

    Example:
        >>> import torch
        >>> from onlinesel.rl import PromptPool
        >>> pool = PromptPool(UniformPrompts(), 5, trials=8)
        >>> sorted(torch.cat([pool.propose(3), pool.propose(2)]).tolist())
        [0, 1, 2, 3, 4]
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def observe(self, ids: Tensor, successes: Tensor, trials: Tensor, state: State) -> State:
        """Learn nothing."""
        return state


@dataclass(frozen=True)
class GRESO(_Walk):
    """Skip problems that were all right or all wrong on their latest visits, with a probability.

    Idea: a problem without spread in one epoch mostly has none in the next.

    Paper: GRESO, Zheng et al., "Act Only When It Pays: Efficient Reinforcement Learning for LLM
    Reasoning via Selective Rollouts" (arXiv:2506.02177).

    Formula: with ``z`` consecutive latest visits without a wrong (easy) or without a right answer
    (hard), skip with probability ``1 - max(p^z, 0.01)``, with a ``p`` of its own for easy and hard.
    Whenever groups were scored, each ``p`` falls by ``change`` if the measured share of such groups
    reaches its target (a third of ``zero_variance`` for easy, two thirds for hard) and rises
    otherwise, in [0.05, 0.95], from the second epoch on. At the target it falls, as in the paper's
    code: with 12 groups and the defaults a share is exactly at a target every few batches.

    Where this differs from the paper's code: easy means all right (theirs: 98 % right), hard means
    none right at any group size (theirs: at most 11 %, the same at 8 completions); probabilities
    move after each generation call (theirs: once for all calls of an update); how many problems a
    batch asks for is left to :class:`onlinesel.rl.Refill`; and where too few are left after the
    skips of two epochs, the batch is filled up at random.

    Graded outcomes: a group is easy if every answer is fully right, hard if none is right at all.

    Cost: O(N) a proposal, 16 bytes a problem.

    When it loses: within the first epoch it is uniform, so it needs data that are seen repeatedly.

    Args:
        zero_variance: Share of groups without spread that is aimed at.
        change: Step of the probabilities.

    Raises:
        ValueError: A share outside (0, 1).

    Example:
        >>> GRESO().zero_variance
        0.25
    """

    zero_variance: float = 0.25
    change: float = 0.01

    def __post_init__(self) -> None:
        for name in ("zero_variance", "change"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"GRESO: {name} must be between 0 and 1, got {getattr(self, name)}. "
                    "Leave it out for the default."
                )

    def init(self, prompts: int, features: Tensor | None = None) -> State:
        """Return a walk without memory, both probabilities at one half."""
        memory = {"streak": torch.zeros(prompts, dtype=torch.int64), "p": torch.tensor([0.5, 0.5])}
        return {**super().init(prompts), **memory}

    def skips(self, ids: Tensor, state: State, generator: torch.Generator) -> Tensor:
        """Draw which problems are passed over: streaks above 0 are easy ones, below 0 hard ones."""
        streak = state["streak"][ids]
        p = torch.where(streak > 0, state["p"][0], state["p"][1])
        keep = p.pow(streak.abs()).clamp(min=0.01)
        return torch.rand(ids.shape[0], generator=generator) >= keep

    def observe(self, ids: Tensor, successes: Tensor, trials: Tensor, state: State) -> State:
        """Lengthen or end the streaks, and move the probabilities towards their targets.

        A problem that occurs twice counts as one visit.
        """
        ids, where = ids.unique(return_inverse=True)
        none = torch.zeros(ids.shape[0], dtype=torch.float64)
        successes, trials = (none.index_add(0, where, v) for v in (successes, trials))
        easy, hard = successes == trials, successes == 0
        streak, old = state["streak"].clone(), state["streak"][ids]
        ended = torch.where(easy, 1, torch.where(hard, -1, 0))
        same = (ended != 0) & (old.sign() == ended)
        streak[ids] = torch.where(same, old + ended, ended)
        p = state["p"].clone()
        if int(state["epoch"]) > 1:
            for i, (kind, share) in enumerate(((easy, 1 / 3), (hard, 2 / 3))):
                # A share that is the target on paper must not miss it by rounding.
                reached = kind.double().mean() >= share * self.zero_variance - 1e-12
                p[i] = (p[i] + (-self.change if reached else self.change)).clamp(0.05, 0.95)
        return {**state, "streak": streak, "p": p}

    def metrics(self, state: State) -> dict[str, float]:
        """Return both probabilities of keeping a problem after one visit without spread."""
        return {"keep_easy": state["p"][0].item(), "keep_hard": state["p"][1].item()}
