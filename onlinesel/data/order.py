"""The global order of an epoch's rows, and how it is cut into steps and dealt to ranks.

An order is a torch sampler with an ``epoch``: a function of seed and epoch alone, the same for any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from onlinesel.data.rows import PlanSampler

__all__ = ["Order", "Thinned", "own_order", "shuffled_rows", "torch_loader", "window_rows"]

Order = Any
"""A sampler with a length and an ``epoch``."""


class Thinned:
    """An order without the rows that a method leaves out of the epoch at hand.

    Args:
        order: A sampler with an ``epoch``.

    Attributes:
        kept: ``(rows,)`` bool, which rows of the dataset the epoch reads; None for all.

    Example:
        >>> thinned = Thinned(PlanSampler(lambda epoch: torch.tensor([2, 0, 1])))
        >>> thinned.kept = torch.tensor([True, False, True])
        >>> list(thinned), len(thinned)
        ([2, 0], 2)
    """

    def __init__(self, order: Any) -> None:
        self._order = order
        self.kept: Tensor | None = None

    @property
    def epoch(self) -> int:
        """Number of the epoch."""
        return int(self._order.epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._order.epoch = epoch

    def __len__(self) -> int:
        return len(self._order) if self.kept is None else int(self.kept.sum())

    def __iter__(self) -> Iterator[int]:
        if self.kept is None:
            return iter(self._order)
        rows = torch.tensor(list(self._order), dtype=torch.int64)
        return iter(rows[self.kept[rows]].tolist())


def shuffled_rows(rows: int, *, epoch: int, seed: int) -> Tensor:
    """Return the order of one epoch: ``(rows,)`` int64, a function of its arguments alone.

    Example:
        >>> shuffled_rows(5, epoch=0, seed=0).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    # Mixed, so that the second epoch of one seed is not the first of the next.
    mixed = (seed * 1_000_003 + epoch) * 2_654_435_761 % 2**32
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))


def window_rows(
    order: Iterable[int], *, size: int, accumulate: int, ranks: int, rank: int, drop_last: bool
) -> Iterator[list[int]]:
    """Yield the rows of one rank's micro-batches, window by window.

    A window is the next ``accumulate * ranks * size`` rows of the order, in cells of ``size`` that
    lie micro-batch by micro-batch, rank by rank. A shorter window at the end is dealt evenly over
    as few micro-batches as hold it. A cell that gets no row holds the window's first one, with
    its bits inverted (``~row``) to say that it is a filler: no rank may skip a forward.

    Args:
        order: Rows of the epoch that are still to come.
        size: Candidate rows of a micro-batch on one rank.
        accumulate: Micro-batches of an optimizer step.
        ranks: Number of ranks.
        rank: Whose rows are wanted.
        drop_last: Leave a shorter window at the end out.

    Example:
        >>> def rows(rank):
        ...     order = range(7)
        ...     return list(window_rows(
        ...         order, size=2, accumulate=1, ranks=2, rank=rank, drop_last=False))
        >>> rows(0), rows(1)
        ([[0, 1], [4, 5]], [[2, 3], [6]])
    """
    whole = size * accumulate * ranks
    rest = iter(order)
    while block := list(islice(rest, whole)):
        if len(block) < whole and drop_last:
            return
        cells = -(-len(block) // (size * ranks)) * ranks
        share, extra = divmod(len(block), cells)
        for cell in range(rank, cells, ranks):
            start = cell * share + min(cell, extra)
            yield block[start : start + share + (cell < extra)] or [~block[0]]


def own_order(
    base: DataLoader[Any] | None, seed: int, plan: Callable[..., Tensor | None] | None
) -> Order | None:
    """Return the global order that replaces a loader's sampler, None if the sampler stays.

    Args:
        base: The torch loader, None for any other iterable.
        seed: Of the shuffles.
        plan: A strategy's ``epoch_plan``.

    Raises:
        ValueError: The strategy plans epochs, but the loader's order is not ours to plan.
    """
    known = base is not None and type(base.batch_sampler) is BatchSampler
    sampler = base.sampler if base is not None and known else None
    plain = type(sampler) in (RandomSampler, SequentialSampler, DistributedSampler)
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler._num_samples):
        plain = False
    rows = len(base.dataset) if base is not None and plain else 0  # type: ignore[arg-type]
    wanted = plan(rows or 1024, epoch=0, seed=seed) if plan is not None else None
    if not plain and wanted is not None:
        raise ValueError(
            "own_order: loader must be a torch DataLoader with a map-style dataset and a "
            f"plain sampler for a method that plans whole epochs, got {type(sampler).__name__}. "
            "Use shuffle=True and no sampler."
        )
    if not plain:
        return None
    if wanted is not None and plan is not None:
        chosen = plan
        return PlanSampler(lambda epoch: chosen(rows, epoch=epoch, seed=seed))
    if isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True):
        return PlanSampler(lambda epoch: torch.arange(rows))
    return PlanSampler(lambda epoch: shuffled_rows(rows, epoch=epoch, seed=seed))


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the torch loader that reads a map-style dataset, inside a wrapper if need be."""
    base = getattr(loader, "base_dataloader", loader)  # accelerate keeps it there
    if not isinstance(base, DataLoader) or base.batch_sampler is None:
        return None
    dataset = base.dataset
    stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    return None if stream else base
