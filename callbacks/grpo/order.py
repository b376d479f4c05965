"""The problems of the trainer's loader, dealt out in the loader's own order.

The loader reads a fixed number of problems for each generation batch. A refill needs more of them,
at a moment that nobody can know before, and those should be the next ones: drawn from elsewhere,
they would come a second time when the loader gets to them, and a curriculum would be none. So the
order is read here a second time, and the loader's own rows are left unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import count as counting
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import repeat_iterable_dataset

from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks.grpo.checks import refuse
from onlinesel.data.rows import ROW_ID

__all__ = ["LoaderOrder"]


class LoaderOrder:
    """Deal out the problems of a GRPO trainer as its loader would, but as many as are asked for.

    Args:
        trainer: A GRPO trainer. Its ``_get_train_sampler`` gives the order of a map-style data set;
            a stream is read from its beginning.

    Attributes:
        drawn: Problems dealt out so far, those included that were passed over.
    """

    def __init__(self, trainer: Any) -> None:
        self.drawn = 0
        self._trainer = trainer
        self._stream = is_stream(trainer.train_dataset)
        self._groups = trainer.args.generation_batch_size // trainer.num_generations
        self._problems: Iterator[Any] | None = None
        self._rows: dict[int, Any] = {}

    def propose(self, count: int, *, taken: Tensor | None = None) -> Tensor:
        """Return the next problems: row numbers, or places in a stream, ``(n,)`` int64.

        Args:
            count: How many are wanted; with ``taken``, fewer come where two epochs hold no others.
            taken: Row numbers that are passed over, as they were in this batch already; None for
                the first call of a batch.
        """
        busy = set() if taken is None else set(taken.tolist())
        found: list[int] = []
        left = None if self._stream else 2 * len(self._trainer.train_dataset)
        self._rows = {}
        while len(found) < count and left != 0:
            problem = self._next()
            left = None if left is None else left - 1
            if self._stream:
                self._rows[self.drawn] = problem
                found.append(self.drawn)
            elif problem not in busy:
                found.append(problem)
                busy.add(problem)
        if taken is None:  # a first call is never short
            found += [self._next() for _ in range(count - len(found))]
        return torch.tensor(found, dtype=torch.long)

    def row(self, number: int) -> dict[str, Any]:
        """Return the row of a problem that was just proposed; it is the caller's own."""
        if self._stream:
            return dict(deepcopy(self._rows[number]))
        return {**self._trainer.train_dataset[number], ROW_ID: number}

    def begin(self, step: int) -> None:
        """Go to where the loader is in a run that is continued without our state.

        Args:
            step: Optimizer steps done.
        """
        args = self._trainer.args
        if self.drawn or args.ignore_data_skip:
            return
        batches = step * args.gradient_accumulation_steps // self._repeats
        for _ in range(batches * self._groups):
            self._next()

    def check(self, incoming: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
        """Refuse a loader that is in another order; only the first batch can be compared.

        Args:
            incoming: The loader's rows.
            own: Those that were dealt out instead.
        """
        key = "prompt" if self._stream else ROW_ID
        if [row.get(key) for row in incoming] != [row.get(key) for row in own]:
            refuse(
                "loader", "in the order of the trainer's _get_train_sampler for refill=",
                "one in another order", "Override _get_train_sampler instead of "
                "get_train_dataloader, or pass prompts=UniformPrompts(), which needs no loader.",
            )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return where the order is."""
        return {"drawn": torch.tensor(self.drawn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on behind what was dealt out; a stream is read up to there."""
        for _ in range(int(state["drawn"])):
            self._next()

    # The order ------------------------------------------------------------------------------

    @property
    def _repeats(self) -> int:
        """How often the loader repeats a generation batch, of which only the first is generated."""
        return int(self._trainer.num_iterations * self._trainer.args.steps_per_generation)

    def _next(self) -> Any:
        if self._problems is None:
            self._problems = self._streamed() if self._stream else self._numbered()
        self.drawn += 1
        return next(self._problems)

    def _numbered(self) -> Iterator[int]:
        """Yield row numbers, epoch after epoch, from a sampler of our own."""
        trainer, size = self._trainer, self._trainer.args.generation_batch_size
        sampler = trainer._get_train_sampler(trainer.train_dataset)
        batches = 0
        for epoch in counting():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            before, batch = batches, list[int]()
            for number in sampler:
                batch.append(int(number))
                if len(batch) == size:
                    if batches % self._repeats == 0:
                        yield from self._problems_of(batch)
                    batch, batches = [], batches + 1
            _check_not_empty(batches > before, self._groups)

    def _problems_of(self, batch: list[int]) -> list[int]:
        """Return each problem of a generation batch once."""
        size = self._trainer.num_generations
        groups = [batch[i : i + size] for i in range(0, len(batch), size)]
        for group in groups:
            if len(set(group)) > 1:
                refuse(
                    "sampler", f"one that gives every problem {size} times in a row for refill=",
                    f"rows {group}", "Change the order of TRL's RepeatSampler, not its repeats.",
                )  # fmt: skip
        return [group[0] for group in groups]

    def _streamed(self) -> Iterator[Any]:
        """Yield rows, epoch after epoch, from a second reader of the stream."""
        trainer = self._trainer
        dataset = trainer.train_dataset
        if trainer.shuffle_dataset:
            dataset = dataset.shuffle(seed=trainer.args.seed)
        # The rest that fills no batch is left out, as the loader leaves it out.
        dataset = repeat_iterable_dataset(dataset, mini_repeat_count=1, batch_size=self._groups)
        for epoch in counting():
            dataset.set_epoch(epoch)
            empty = True
            for row in dataset:
                empty = False
                yield row
            _check_not_empty(not empty, self._groups)


def _check_not_empty(some: bool, groups: int) -> None:
    if not some:
        refuse(
            "train_dataset", f"of at least {groups} problems, one generation batch", "fewer",
            "Lower generation_batch_size.",
        )  # fmt: skip
