"""Fill a generation batch with groups that train: generate, decide, and generate again.

Every decision is made from gathered numbers by all ranks alike, and all ranks make the same calls
in the same order, whatever their own rows look like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from onlinesel.callbacks.grpo.order import LoaderOrder
from onlinesel.callbacks.grpo.rows import Rows
from onlinesel.rl.gates import count_outcomes
from onlinesel.rl.prompts import PromptPool
from onlinesel.rl.refill import Refill, fill_up
from onlinesel.selector import Selector
from onlinesel.types import Signals

__all__ = ["Filled", "Filler", "Group", "Round"]

_EMA = 0.9  # of the share of groups that the gate keeps, from batch to batch


@dataclass(frozen=True)
class Round:
    """One generation call, as all ranks know it: ``B`` completions over all ranks.

    Attributes:
        batch: This rank's own rows, as the trainer returned them.
        rewards: ``(B, F)`` of every reward function.
        outcome: ``(B,)`` 1 for right, 0 for wrong, a fraction between, nan where unknown.
        prompts: ``(B,)`` row number of each completion's problem, -1 if unknown.
        lengths: ``(B,)`` tokens that carry loss.
    """

    batch: dict[str, Any]
    rewards: Tensor
    outcome: Tensor
    prompts: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Group:
    """The completions of one problem, as all ranks know them.

    Attributes:
        prompt: Row number of the problem, -1 if unknown.
        rewards: ``(G, F)`` of every reward function.
        outcome: ``(G,)`` 1, 0, between, or nan.
        weights: ``(G,)`` weight of each completion; all 0 if the gate dropped the group.
        lengths: ``(G,)`` tokens that carry loss.
        places: Where each completion lies: rank, call, row. Empty for a carried group.
        rows: The completions themselves, if the group was carried over from the batch before.
        number: Which of the groups of its batch it is; -1 for a carried one.
    """

    prompt: int
    rewards: Tensor
    outcome: Tensor
    weights: Tensor
    lengths: Tensor
    places: tuple[tuple[int, int, int], ...] = ()
    rows: Rows | None = None
    number: int = -1

    @property
    def kept(self) -> bool:
        """Whether any completion trains."""
        return bool((self.weights > 0).any())

    @property
    def spread(self) -> float:
        """Variance of the outcomes that are known; nan if none is."""
        known = self.outcome[~torch.isnan(self.outcome)]
        return known.var(correction=0).item() if known.shape[0] else float("nan")

    @property
    def undecided(self) -> Tensor:
        """Completions without a known outcome that some function scored: they have advantages."""
        return torch.isnan(self.outcome) & ~torch.isnan(self.rewards).all(dim=1)

    def weighted(self, weights: Tensor) -> Group:
        """Return the group with what a method, which sees outcomes alone, gave its completions.

        An undecided completion counts as much as the others of its group.
        """
        return replace(self, weights=torch.where(self.undecided, weights.max(), weights))

    def take(self, rows: Tensor) -> Group:
        """Return the group with some of its completions only."""
        values = {n: getattr(self, n)[rows] for n in ("rewards", "outcome", "weights", "lengths")}
        places = tuple(self.places[i] for i in rows.tolist()) if self.places else ()
        own = None if self.rows is None else {n: v[rows] for n, v in self.rows.items()}
        return replace(self, places=places, rows=own, **values)


@dataclass
class Filled:
    """What one generation batch came to.

    Attributes:
        groups: The groups that train, in order; repeated or rejected ones if the policy says so.
        leftover: Kept groups beyond a full batch.
        scored: Every group that was generated, in order.
        batches: This rank's own rows of every call.
        rollouts: Completions generated, over all ranks.
        tokens: Their tokens that carry loss.
        skip: Whether the weights must stay as they are.
        short: Groups missing before the policy for short batches spoke.
    """

    groups: list[Group] = field(default_factory=list)
    leftover: list[Group] = field(default_factory=list)
    scored: list[Group] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    rollouts: int = 0
    tokens: int = 0
    skip: bool = False
    short: int = 0

    @property
    def empty(self) -> bool:
        """Whether nothing trains."""
        return not self.groups

    @property
    def training(self) -> set[int]:
        """Numbers of the groups of this batch that train."""
        return {group.number for group in self.groups}


class Filler:
    """Fill generation batches.

    Args:
        generate: ``(rows of the data set or None for the loader's own) -> Round``.
        gate: Decides about groups; None keeps all.
        rollouts: Decides about the completions of a kept group; None keeps all.
        refill: The bounds; None never generates twice.
        pool: Chooses the problems; None takes the loader's.
        order: Deals out the loader's problems, where there is a refill and no pool; else None.
        generations: Completions of a group.
        groups: Groups of a full batch, over all ranks.
        ranks: Number of ranks.
        seed: Of the choice of repeated groups.
    """

    def __init__(
        self,
        generate: Callable[[Tensor | None], Round],
        *,
        gate: Selector | None,
        rollouts: Selector | None,
        refill: Refill | None,
        pool: PromptPool | None,
        order: LoaderOrder | None,
        generations: int,
        groups: int,
        ranks: int,
        seed: int,
    ) -> None:
        self.gate, self.rollouts, self.refill = gate, rollouts, refill or Refill(max_rounds=0)
        self.pool, self.order = pool, order
        self.carried: list[Group] = []
        self.acceptance = 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self._generate = generate
        self._generations, self._groups, self._ranks = generations, groups, ranks

    def fill(self, step: int) -> Filled:
        """Generate until the batch is full or a bound is reached, and decide what trains."""
        filled = Filled()
        kept = list(self.carried)
        self.carried = []
        multiple = self._ranks // gcd(self._ranks, self._generations)
        missing = max(self._groups - len(kept), 1)
        count = -(-missing // multiple) * multiple
        source = self.pool or self.order
        # The loader's order is kept even where it comes back to a problem that was carried over.
        waiting = torch.tensor([group.prompt for group in kept]) if self.pool is not None else None
        ids = None if source is None else source.propose(count, taken=waiting)
        kept += self._call(ids, filled, step)
        while source is not None:
            count = self.refill.ask(
                wanted=self._groups,
                kept=len(kept),
                acceptance=self.acceptance,
                rounds=len(filled.batches) - 1,
                rollouts=filled.rollouts,
                generations=self._generations,
                multiple=multiple,
            )
            seen = torch.tensor([g.prompt for g in (*filled.scored, *kept) if g.prompt >= 0])
            ids = source.propose(count, taken=seen.unique()) if count else None
            if ids is None or len(ids) < multiple:
                break
            kept += self._call(ids[: len(ids) // multiple * multiple], filled, step)
        share = sum(group.kept for group in filled.scored) / len(filled.scored)
        self.acceptance = _EMA * self.acceptance + (1 - _EMA) * share if step else share
        return self._finish(filled, kept, step)

    def _call(self, ids: Tensor | None, filled: Filled, step: int) -> list[Group]:
        """Generate for some problems, observe and decide; return the groups that were kept."""
        done = self._generate(ids)
        groups = self._split(done, call=len(filled.batches), first=len(filled.scored))
        filled.rollouts += len(done.lengths)
        filled.tokens += int(done.lengths.sum())
        filled.batches.append(done.batch)
        prompts = torch.tensor([group.prompt for group in groups])
        if self.pool is not None:
            outcome, number = self._flat(groups)
            successes, trials, _ = count_outcomes(outcome, number)
            squares, _, _ = count_outcomes(outcome.square(), number)
            self.pool.observe(prompts, successes, trials, squares=squares, step=step)
        groups = self._gated(groups, step)
        filled.scored += groups
        return [group for group in groups if group.kept]

    def _split(self, done: Round, call: int, first: int) -> list[Group]:
        size, local = self._generations, done.rewards.shape[0] // self._ranks
        groups = []
        for start in range(0, done.rewards.shape[0], size):
            part = slice(start, start + size)
            groups.append(
                Group(
                    prompt=int(done.prompts[start]),
                    rewards=done.rewards[part],
                    outcome=done.outcome[part],
                    weights=torch.ones(size),
                    lengths=done.lengths[part],
                    places=tuple((i // local, call, i % local) for i in range(start, start + size)),
                    number=first + start // size,
                )
            )
        return groups

    @staticmethod
    def _flat(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([group.outcome.shape[0] for group in groups])
        number = torch.arange(len(groups)).repeat_interleave(sizes)
        return torch.cat([group.outcome for group in groups]), number

    def _gated(self, groups: list[Group], step: int) -> list[Group]:
        """Ask the gate about all groups."""
        if self.gate is None:
            return groups
        reward, number = self._flat(groups)
        signals = Signals(ids=torch.arange(len(reward)), reward=reward, group=number)
        weights = self.gate.select(signals, step=step).weights.split(self._generations)
        pairs = zip(groups, weights, strict=True)
        return [group.weighted(weight) for group, weight in pairs]

    def _reduced(self, groups: list[Group], step: int) -> list[Group]:
        """Ask the rollout selection which completions of the groups train, as many in each."""
        if self.rollouts is None or not groups:
            return groups
        reward, number = self._flat(groups)
        signals = Signals(ids=torch.arange(len(reward)), reward=reward, group=number)
        chosen = self.rollouts.select(signals, step=step).weights.split(self._generations)
        keep = getattr(self.rollouts.strategy, "keep", 0)
        most = max(
            max(int((w > 0).sum()), min(keep, int(((w > 0) | group.undecided).sum())))
            for group, w in zip(groups, chosen, strict=True)
        )
        reduced = []
        for group, weights in zip(groups, chosen, strict=True):
            # Completions without an outcome fill up the number, those first that were scored.
            rank = 2 * (weights > 0).long() + group.undecided.long()
            rows = rank.argsort(descending=True, stable=True)[: most or self._generations]
            if bool(torch.isnan(group.outcome).all()):
                weights = torch.ones_like(weights)
            weights = group.weights * group.weighted(weights).weights
            reduced.append(replace(group, weights=weights).take(rows.sort().values))
        return reduced

    def _finish(self, filled: Filled, kept: list[Group], step: int) -> Filled:
        """Decide what a batch that is too long or too short trains."""
        filled.leftover = kept[self._groups :]
        filled.short = max(self._groups - len(kept), 0)
        final = self._topped_up(filled, kept) if filled.short else kept[: self._groups]
        filled.groups = self._reduced(final, step)
        return filled

    def _topped_up(self, filled: Filled, kept: list[Group]) -> list[Group]:
        """Return what a short batch trains."""
        policy = self.refill.on_short
        if policy == "raise":
            raise ValueError(
                f"RolloutSelection: batch must hold {self._groups} groups that train, got "
                f"{len(kept)} after {len(filled.batches)} generation calls. Raise the bounds of "
                "the refill, widen the gate, or use another on_short than 'raise'."
            )
        rejected = [group for group in filled.scored if not group.kept]
        spread = torch.tensor([group.spread for group in rejected])
        mine, added = fill_up(policy, len(kept), spread, self._groups, self.generator)
        extra = [replace(rejected[i], weights=torch.ones(self._generations)) for i in added]
        filled.skip = not mine and not extra and policy in ("skip", "replace")
        return [kept[i] for i in mine] + extra
