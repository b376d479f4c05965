"""Orders of the Hugging Face trainer's rows: functions of an epoch, and how to go on in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Sampler, SequentialSampler

__all__ = ["ContinuedOrder", "EpochOrder", "order_of", "sampler_of"]


@dataclass(frozen=True)
class EpochOrder:
    """The rows of an epoch as a function of its number.

    Attributes:
        rows: Of an epoch.
        of: ``epoch -> rows``, lazily.
        seed: What the shuffles start from, None where there are none of the trainer's.
    """

    rows: int
    of: Callable[[int], Iterator[int]]
    seed: int | None = None


class ContinuedOrder(Sampler[int]):
    """Epochs one after the other as one stream of rows, read in portions of another length.

    Args:
        order: ``epoch -> rows``.
        rows: Rows of an epoch.
        behind: Rows of the stream that have been read.
        origin: Place in the stream at which the trainer's epoch 0 would begin; may be negative.
        length: Rows that the trainer reads in what it counts as an epoch.

    Attributes:
        epoch: The trainer's epoch that the next ``iter`` reads.

    Example:
        >>> from onlinesel.callbacks.hf.order import ContinuedOrder
        >>> order = lambda epoch: iter([10 * epoch, 10 * epoch + 1, 10 * epoch + 2])
        >>> stream = ContinuedOrder(order, 3, behind=2, origin=2, length=2)
        >>> list(stream)
        [2, 10]
        >>> stream.epoch = 1
        >>> list(stream)
        [11, 12]
    """

    def __init__(
        self,
        order: Callable[[int], Iterator[int]],
        rows: int,
        *,
        behind: int,
        origin: int,
        length: int,
    ) -> None:
        self.order, self.rows, self.behind, self.origin = order, rows, behind, origin
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.origin + self.epoch * self.length
        # The trainer skips them unseen, and an order that moves must not be asked for old epochs.
        before = min(max(self.behind - start, 0), self.length)
        yield from (0 for _ in range(before))
        number, first = divmod(start + before, self.rows)
        left = self.length - before
        while left:
            for row in islice(self.order(number), first, min(self.rows, first + left)):
                yield row
                left -= 1
            number, first = number + 1, 0


def sampler_of(loader: Any) -> Any:
    """Return the sampler inside the batch samplers that accelerate nests."""
    found: Any = getattr(loader, "batch_sampler", None)
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return getattr(found, "sampler", None)


def order_of(loader: Any, ours: Any, seed: int | None = None) -> EpochOrder | None:
    """Return the order of a loader's rows, None where it is no function of seed and epoch.

    Args:
        loader: What the trainer built.
        ours: Our sampler, if it has one.
        seed: Of the shuffles, if not the sampler's own.
    """
    if ours is not None:

        def draw(epoch: int) -> Iterator[int]:
            ours.epoch = epoch
            return iter(ours)

        return EpochOrder(len(ours), draw)
    sampler = sampler_of(loader)
    if type(sampler) is SequentialSampler:
        rows = len(sampler)
        return EpochOrder(rows, lambda _: iter(range(rows)))
    if type(sampler).__name__ != "SeedableRandomSampler":  # accelerate's
        return None
    shuffler: Any = sampler
    if seed is not None:
        shuffler.initial_seed = seed

    def shuffle(epoch: int) -> Iterator[int]:
        shuffler.set_epoch(epoch)
        return iter(list(shuffler))

    return EpochOrder(len(shuffler), shuffle, shuffler.initial_seed)
