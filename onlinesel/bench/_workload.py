"""One optimizer step of a run on many ranks, as one of them sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onlinesel import strategies
from onlinesel.bench._ledgers import spread_ids
from onlinesel.bench._settings import clock
from onlinesel.data.batch import deal
from onlinesel.parallel.distributed import gather_signals
from onlinesel.selector import Selector
from onlinesel.step import StepPlan, StepPlanner
from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["STRATEGIES", "Rehearsal", "Workload"]

STRATEGIES = ("TopLoss", "SelectiveBackprop", "InfoBatch", "UDS")
_EMBEDDING = 1024  # of UDS: 128 over the vocabulary times 8 over time


@dataclass(frozen=True)
class Workload:
    """What is decided in a step.

    Args:
        strategy: One of :data:`STRATEGIES`.
        ranks: Number of ranks.
        rows: Rows that each rank trains in a step.
        candidates: Candidates for every trained row; InfoBatch, which only skips, runs with 1.
        tokens: Length of a row.
        known: Rows of the dataset.
        dense: Ids are row numbers, not hashes.

    Raises:
        ValueError: An unknown strategy, a number below 1, or fewer rows in the dataset than in a
            step.
    """

    strategy: str = "TopLoss"
    ranks: int = 1024
    rows: int = 4
    candidates: int = 4
    tokens: int = 2048
    known: int = 1_000_000
    dense: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"bench_scale: strategies must be of {', '.join(STRATEGIES)}, got "
                f"{self.strategy!r}. Name one of them."
            )
        for name in ("ranks", "rows", "candidates", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"bench_scale: {name} must be at least 1, got {getattr(self, name)}. "
                    "Pass a positive integer."
                )
        if self.known < self.ranks * self.size:
            raise ValueError(
                f"bench_scale: ids must be at least the candidates of a step "
                f"({self.ranks * self.size}), got {self.known}. Take a larger dataset."
            )

    @property
    def size(self) -> int:
        """Candidates of one rank."""
        return self.rows * (1 if self.strategy == "InfoBatch" else self.candidates)

    def method(self) -> Strategy:
        """Return the strategy with its defaults."""
        strategy: Strategy = getattr(strategies, self.strategy)()
        return strategy


class _TimedSelector(Selector):
    seconds = 0.0

    def select(
        self, signals: Signals, *, keep: int | None = None, step: int | None = None
    ) -> Selection:
        start = clock()
        selection = super().select(signals, keep=keep, step=step)
        self.seconds = clock() - start
        return selection


class Rehearsal:
    """Take the steps of one rank through the code that a trainer calls.

    Args:
        work: What is decided.
        rank: Which rank this is.
        state: What the strategy remembers at the beginning; its own ``init`` if None.
        scoring: Called when the model would score.
    """

    def __init__(
        self,
        work: Workload,
        rank: int,
        state: State | None = None,
        scoring: Callable[[], None] | None = None,
    ) -> None:
        self.work, self.rank, self._scoring = work, rank, scoring
        method = work.method()
        self.selector = _TimedSelector(method)
        if state is not None:
            self.selector._state = state
        candidates = work.size // work.rows
        self._planner = StepPlanner(self.selector, self._score, candidates=candidates)
        shape = (work.size, work.tokens)
        content = torch.arange(math.prod(shape)).reshape(shape) % 30_000
        self.batch: dict[str, Any] = {
            "input_ids": content,
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": content,
        }
        self._pool: Signals | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that changes rank."""
        return sum(value[0].nbytes for value in self.batch.values())

    @property
    def counts(self) -> list[int]:
        """Candidates of each rank."""
        return [self.work.size] * self.work.ranks

    def pool(self, step: int) -> Signals:
        """Return the candidates of all ranks: no row twice in an epoch, other scores each step."""
        work, generator = self.work, torch.Generator().manual_seed(step)
        rows = work.ranks * work.size
        stride = int(0.618 * work.known) | 1
        while math.gcd(stride, work.known) > 1:
            stride += 2
        numbers = (torch.arange(step * rows, (step + 1) * rows) % work.known * stride) % work.known
        found: dict[str, Tensor] = {
            "ids": spread_ids(numbers, work.known, work.dense),
            "tokens": torch.full((rows,), work.tokens - 1),
        }
        for name in self.selector.strategy.needs:
            if name not in found:
                shape = (rows, _EMBEDDING) if name == "embedding" else (rows,)
                found[name] = torch.rand(shape, generator=generator)
        self._pool = Signals(**found)
        return self._pool

    def _mine(self) -> Signals:
        assert self._pool is not None
        first = self.rank * self.work.size
        return self._pool.take(torch.arange(first, first + self.work.size))

    def _score(self, batch: Any, needs: Sequence[str], hosted: Any) -> Signals:
        if self._scoring is not None:
            self._scoring()
        return Signals(**{name: getattr(self._mine(), name) for name in needs})

    def decide(self, step: int) -> StepPlan:
        """Decide about the candidates that :meth:`pool` made."""
        return self._planner.plan([self.batch], [self._mine().row_ids()], step)

    def trained(self, plan: StepPlan) -> tuple[Signals, list[int]]:
        """Return what training shows about the rows of all ranks, and how many each trained."""
        _, targets = self.moves(plan)
        ((pool, selection),) = plan.decisions
        by_rank = targets.argsort(stable=True)
        ids = pool.row_ids()[selection.rows[by_rank]]
        counts = torch.bincount(targets, minlength=self.work.ranks)
        return Signals(ids=ids, loss=_loss(ids)), counts.tolist()

    def moves(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Return which rank holds each row that trains, and which trains it."""
        ((_, selection),) = plan.decisions
        holders = selection.rows // self.work.size
        return holders, deal(holders, self.work.ranks)

    def observe(self, plan: StepPlan) -> None:
        """Gather what training showed and hand it to the strategy."""
        ids = torch.cat(plan.ids)
        seen, _ = gather_signals(Signals(ids=ids, loss=_loss(ids)))
        self.selector.observe(seen)


def _loss(ids: Tensor) -> Tensor:
    """Return losses as training might show them: the same for a row wherever it trains."""
    return (ids % 9973) / 9973
