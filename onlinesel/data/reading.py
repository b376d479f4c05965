"""How a loader is read without being changed: stand-ins, generators, ids, and its states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from onlinesel.data.collating import OrderWatch
from onlinesel.data.fingerprint import same_rows
from onlinesel.data.randomness import PROGRAM, program_state, set_program_state
from onlinesel.data.rows import FILLER_ID
from onlinesel.parallel.distributed import world_size

__all__ = [
    "Cells",
    "Numbered",
    "Paired",
    "begin_workers",
    "check_state",
    "generator_states",
    "generators_of",
    "numbered_parts",
    "set_generator_states",
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
    watch: OrderWatch

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        ids = torch.tensor([number for number, _ in pairs], dtype=torch.int64)
        rows = [row for _, row in pairs]
        batch = self.collate(rows)
        self.watch.check(rows, batch)
        return ids, batch


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


def generator_states(generators: Sequence[torch.Generator]) -> Tensor:
    """Return where the program's generators and a loader's own stand: ``(3 + G, 5056)`` uint8."""
    return torch.cat([program_state(), *(g.get_state()[None] for g in generators)])


def set_generator_states(generators: Sequence[torch.Generator], states: Tensor) -> None:
    """Put generators where :func:`generator_states` was taken.

    Raises:
        ValueError: It was of a loader with another number of generators.
    """
    program, own = states[:PROGRAM].clone(), states[PROGRAM:].clone()
    if len(own) != len(generators):
        raise ValueError(
            f"CandidateLoader: loader must have as many generators of its own as the checkpoint's "
            f"({len(own)}), got {len(generators)}. Resume with the loader that wrote it."
        )
    set_program_state(program)
    for generator, state in zip(generators, own, strict=True):
        generator.set_state(state)


def numbered_parts(base: DataLoader[Any], watch: OrderWatch) -> dict[str, Any]:
    """Return the parts of a loader that gives row numbers beside its batches.

    Args:
        base: The loader.
        watch: Looks at the first batches of a run, not of each epoch.
    """
    return {"dataset": Numbered(base.dataset), "collate_fn": Paired(base.collate_fn, watch)}


def begin_workers(base: DataLoader[Any], kept: Any, watch: OrderWatch, *, plain: bool) -> Any:
    """Let the workers of a loader that keeps them begin, unless they have.

    What torch draws when they begin comes once in a run. Their first pass is empty, so that a
    sampler draws from where the epoch begins in the epoch in which they begin as in all others.

    Args:
        base: The loader.
        kept: Its iterator over numbered rows, None if there is none yet.
        watch: See :func:`numbered_parts`.
        plain: Whether its rows are read without their numbers, and its iterator is its own.

    Returns:
        The iterator over numbered rows, None if there is none.
    """
    if not base.num_workers or not base.persistent_workers:
        return kept
    parts = {} if plain else {"_iterator": kept, **numbered_parts(base, watch)}
    with standing_in(base, **parts):
        if vars(base)["_iterator"] is None:
            batching: list[Any] = []
            with standing_in(base, batch_sampler=Cells(lambda: chain.from_iterable(batching))):
                iter(base)
            batching.append(base.batch_sampler)
        return kept if plain else vars(base)["_iterator"]


def check_state(
    state: dict[str, Any], seed: int, digest: dict[str, Any] | None, *, foreign: bool
) -> None:
    """Refuse a state that a loader cannot go on from.

    Args:
        state: What ``CandidateLoader.state_dict`` gave.
        seed: Of the loader at hand.
        digest: Of its rows, None where it has none to look at.
        foreign: Whether it is left as it is.
    """
    if ("ranks" in state) != foreign or state["seed"] != seed:
        raise ValueError(
            "CandidateLoader: state must come from the same kind of loader and seed "
            f"({seed}), got one of seed {state['seed']} and "
            f"{'a loader left as it is' if 'ranks' in state else 'an order of our own'}. "
            "Resume with the loader that wrote it."
        )
    if foreign and state["ranks"] != world_size() and state["position"] > 0:
        raise ValueError(
            f"CandidateLoader: number of ranks must be the checkpoint's ({state['ranks']}) in "
            f"the middle of an epoch of a loader with its own sampler, got {world_size()}. "
            "Use a torch DataLoader with shuffle=True and no sampler, or an epoch's end."
        )
    if not same_rows(state.get("rows"), digest):
        raise ValueError(
            f"CandidateLoader: dataset must be the checkpoint's ({state['rows']}), got {digest}. "
            "Resume with the same rows in the same order, or begin a run from the model alone."
        )
