"""Assemble the final batch: equal numbers of rows on all ranks, and their advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onlinesel.callbacks.grpo.decide import Filled, Group
from onlinesel.callbacks.grpo.rows import Rows, join, move, mute, rows_of, take, trim
from onlinesel.data.batch import deal
from onlinesel.parallel.distributed import rank, world_size
from onlinesel.rl.group_advantages import group_advantages, total_rewards
from onlinesel.rl.types import Advantages, Rollouts

__all__ = ["assemble", "carry", "final_advantages"]

Place = tuple[Group, int]
"""A completion: its group, and which one it is there."""


class _Store:
    """This rank's own rows of every generation call, below each other."""

    def __init__(self, filled: Filled, pad_id: int) -> None:
        self.rows = join([rows_of(batch) for batch in filled.batches], pad_id)
        self.starts = [0]
        for batch in filled.batches:
            self.starts.append(self.starts[-1] + batch["prompt_ids"].shape[0])

    def number(self, place: Place) -> int:
        """Return where a completion of this rank lies."""
        group, i = place
        _, call, row = group.places[i]
        return self.starts[call] + row

    def is_whole_call(self, places: Sequence[Place], ranks: int) -> bool:
        """Return whether these are all rows that all ranks made in a single call, in order."""
        size = self.starts[1]
        found = [group.places[i] if group.places else None for group, i in places]
        return len(self.starts) == 2 and found == [
            (k // size, 0, k % size) for k in range(size * ranks)
        ]


def _places(groups: Sequence[Group]) -> list[Place]:
    return [(group, i) for group in groups for i in range(len(group.weights))]


def _owners(places: Sequence[Place], ranks: int) -> Tensor:
    """Return which rank holds each row; carried rows, which all hold, go where fewest lie."""
    owners = [group.places[i][0] if group.places else -1 for group, i in places]
    counts = [owners.count(r) for r in range(ranks)]
    for k, owner in enumerate(owners):
        if owner < 0:
            owners[k] = counts.index(min(counts))
            counts[owners[k]] += 1
    return torch.tensor(owners, dtype=torch.long)


def assemble(
    filled: Filled, *, slices: int, pad_id: int, multiple: int | None
) -> tuple[Rows, Tensor]:
    """Return this rank's rows of the final batch, and which of the ``K`` final rows they are.

    Every rank gets the same number of rows, a multiple of ``slices``; places that no row fills are
    taken by a muted row, whose number is -1.

    Args:
        filled: What was generated and chosen.
        slices: Micro-batches that the trainer cuts the batch into.
        pad_id: Token that fills prompts and completions.
        multiple: Widths are a multiple of it, if given.
    """
    me, ranks = rank(), world_size()
    store, places = _Store(filled, pad_id), _places(filled.groups)
    if store.is_whole_call(places, ranks):
        return store.rows, torch.arange(len(places)).chunk(ranks)[me]
    owners = _owners(places, ranks)
    targets = deal(owners, ranks)
    mine = (targets == me).nonzero().flatten().tolist()
    carried = [k for k in mine if places[k][0].rows is not None]
    local = [k for k in mine if k not in set(carried) and int(owners[k]) == me]
    leaving = [
        (k, take(store.rows, [store.number(places[k])]))
        for k in ((owners == me) & (targets != me)).nonzero().flatten().tolist()
        if places[k][0].rows is None
    ]
    arrived = move(leaving) if bool((owners != targets).any()) else {}
    foreign = [k for k in mine if k in arrived]
    size = -(-max(-(-len(places) // ranks), 1) // slices) * slices
    missing = size - len(mine)
    device = store.rows["prompt_ids"].device
    others = [arrived[k] for k in foreign] + [
        {name: value[i : i + 1] for name, value in (group.rows or {}).items()}
        for group, i in (places[k] for k in carried)
    ]
    parts = [take(store.rows, [store.number(places[k]) for k in local])]
    parts += [{name: value.to(device) for name, value in part.items()} for part in others]
    parts += [mute(take(store.rows, [0]), [0])] * missing
    where = torch.tensor([*local, *foreign, *carried] + [-1] * missing)
    return trim(join(parts, pad_id), multiple, pad_id), where


def carry(filled: Filled, pad_id: int) -> list[Group]:
    """Return the left-over groups with their rows, equal on all ranks."""
    fresh = [group for group in filled.leftover if group.places]  # never carried a second time
    if not fresh:
        return []
    store = _Store(filled, pad_id)
    leaving = [
        (at, take(store.rows, [store.number(place)]))
        for at, place in enumerate(_places(fresh))
        if place[0].places[place[1]][0] == rank()
    ]
    arrived, start, groups = move(leaving), 0, []
    for group in fresh:
        numbers = range(start, start + len(group.weights))
        rows = join([arrived[k] for k in numbers], pad_id)
        groups.append(replace(group, places=(), rows=rows, number=-1))
        start = numbers.stop
    return groups


def final_advantages(
    groups: Sequence[Group], trainer: Any, shaper: Advantages | None, scores: Tensor | None
) -> Tensor:
    """Return the advantage of each of the ``K`` rows that train, over all ranks.

    Args:
        groups: The groups that train; all of one size.
        trainer: Its settings say how rewards become advantages.
        shaper: Replaces the trainer's own definition.
        scores: ``(K,)`` mean log-probability of each row, if the shaper asks for it.
    """
    if not groups:
        return torch.zeros(0)
    rewards = torch.stack([group.rewards for group in groups])
    count, size, functions = rewards.shape
    flat, weights = rewards.reshape(-1, functions), torch.cat([group.weights for group in groups])
    if shaper is None:
        values = group_advantages(
            flat,
            trainer.reward_weights,
            size,
            scale=trainer.scale_rewards,
            aggregation=trainer.multi_objective_aggregation,
        )
        return values * weights
    lengths = torch.stack([group.lengths for group in groups])
    rollouts = Rollouts(
        rewards=total_rewards(flat, trainer.reward_weights).reshape(count, size),
        outcome=torch.stack([group.outcome for group in groups]),
        lengths=lengths,
        scores=None if scores is None else scores.reshape(count, size),
        longest=trainer.max_completion_length,
    )
    values = shaper.compute(rollouts)
    if shaper.per_sequence:
        values = values * _per_sequence(trainer, lengths)
    return values.flatten() * weights


def _per_sequence(trainer: Any, lengths: Tensor) -> Tensor:
    """Return what turns the trainer's loss into ``-(1/Q) sum_i A_i mean_t log pi_it``."""
    count, size = lengths.shape
    if trainer.loss_type == "grpo":  # already a mean over rows of means over tokens
        return torch.full(lengths.shape, float(size))
    each = lengths.clamp(min=1).float()
    if trainer.loss_type == "dapo":  # a mean over all tokens
        return lengths.sum() / (count * each)
    return size * trainer.max_completion_length / each  # a sum over a constant
