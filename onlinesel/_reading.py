"""How a loader is read without being changed: stand-ins and generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from onlinesel.rows import FILLER_ID

__all__ = [
    "Cells",
    "Numbered",
    "Paired",
    "generators_of",
    "standing_in",
    "tell_epoch",
]


class Numbered(Dataset[Any]):
    """Rows of a map-style dataset with their numbers; ``~row`` asks for a filler."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        """Let a worker reach what the dataset has of its own."""
        if name == "dataset":  # not there yet while a worker unpickles this object
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if index < 0:
            return FILLER_ID, self.dataset[~index]
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        if min(indices) < 0:
            return [self[i] for i in indices]
        rows = [self.dataset[i] for i in indices] if fetch is None else fetch(indices)
        return list(zip(indices, rows, strict=True))


@dataclass(frozen=True)
class Cells:
    """A batch sampler that begins where the reader stands, each time it is iterated."""

    begin: Callable[[], Iterator[list[int]]]

    def __iter__(self) -> Iterator[list[int]]:
        return self.begin()


@dataclass(frozen=True)
class Paired:
    """A collator that keeps the numbers of the rows beside the batch."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        ids = torch.tensor([number for number, _ in pairs], dtype=torch.int64)
        return ids, self.collate([row for _, row in pairs])


@contextmanager
def standing_in(loader: Any, **attributes: Any) -> Iterator[None]:
    """Give a loader other parts while it builds an iterator; torch forbids setting them."""
    before = {name: vars(loader)[name] for name in attributes}
    vars(loader).update(attributes)
    try:
        yield
    finally:
        vars(loader).update(before)


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` on the loader or, where it has none, on its samplers."""
    base = getattr(loader, "base_dataloader", loader)
    for owner in (loader, getattr(base, "batch_sampler", None), getattr(base, "sampler", None)):
        tell = getattr(owner, "set_epoch", None)
        if tell is not None:
            tell(epoch)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader's own samplers draw from."""
    base = getattr(loader, "base_dataloader", loader)
    owners, found = [loader, base], list[torch.Generator]()
    for name in ("sampler", "batch_sampler"):
        inner = getattr(base, name, None)
        while inner is not None and inner not in owners:
            owners.append(inner)
            inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found
