"""What a Lightning trainer iterates instead of the user's loader, and which loaders it may be.

The trainer is handed one token per micro-batch. Rows are read a whole window at a time, and the
token turns into a planned micro-batch only where the trainer moves its batch to the device: a
trainer that fetches ahead thus never fetches a decision made with older weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NoReturn

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from onlinesel.callbacks._shared.micro_batch import MicroBatch
from onlinesel.callbacks._shared.source import StepSource
from onlinesel.data.loader import CandidateLoader, Candidates
from onlinesel.data.order import torch_loader
from onlinesel.parallel.agreement import smallest_over_ranks
from onlinesel.parallel.distributed import world_size

__all__ = ["Stream", "Token", "Window", "check_loader", "check_window", "follow", "refuse"]


def refuse(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the designed error of the callback."""
    raise ValueError(f"LightningSelection: {argument} must be {rule}, got {got}. {remedy}")


class Window:
    """The candidates of one optimizer step, and what became of them.

    Attributes:
        parts: Candidate micro-batches, as the user's loader gives them.
        accumulate: Micro-batches that a whole window had when it was read.
        ahead: Whether it was read while another step was under way.
        final: Whether the epoch ends with it.
        planned: What trains, once it was decided.
    """

    def __init__(
        self, parts: list[Candidates], accumulate: int, *, ahead: bool, final: bool
    ) -> None:
        self.parts, self.accumulate, self.ahead, self.final = parts, accumulate, ahead, final
        self.planned: list[MicroBatch] = []


class Token:
    """One micro-batch on its way through the trainer's fetcher."""

    def __init__(self, window: Window, index: int) -> None:
        self.window, self.index = window, index


class Stream:
    """Iterate the tokens of an epoch.

    The trainer saves and restores what has ``state_dict``, and warns of a loader without it; the
    place in the data is part of the callback's own state.

    Args:
        trainer: The Lightning trainer.
        source: Plans the steps.
        loader: The user's.
        attach: Gives the reader of the windows; called when the length or the first rows are
            wanted, since strategies ask for a loader before there is a model.
        accumulate: Says how many micro-batches a window has.
    """

    def __init__(
        self,
        trainer: Any,
        source: StepSource,
        loader: Any,
        attach: Callable[[], CandidateLoader],
        accumulate: Callable[[], int],
    ) -> None:
        self.trainer, self.source, self.loader = trainer, source, loader
        self._attach, self._accumulate = attach, accumulate
        self.standing: tuple[int, float] | None = None  # micro-batches behind and ahead, if resumed
        self.begun = False

    @cached_property
    def reader(self) -> CandidateLoader:
        """Reads the windows."""
        return self._attach()

    @cached_property
    def size(self) -> float:
        """Micro-batches of an epoch, as many as every rank has; infinite if one has no length."""
        try:
            size = self.reader.micro_batches()
        except TypeError:
            size = -1
        size = smallest_over_ranks(size, self.source.device)
        return size if size >= 0 else float("inf")

    def __len__(self) -> int:
        """Return the size; without one the trainer fetches ahead to see the end."""
        if self.size == float("inf"):
            raise TypeError("the loader has no length")
        return int(self.size)

    def __iter__(self) -> Iterator[Token]:
        self.begun = True
        behind, ahead = self.standing or (0, self.size)
        self.standing = None
        left = min(ahead, self.trainer.fit_loop.max_batches - behind)
        windows = self.reader.windows()
        while left > 0:
            early = self.source.open
            if not early:
                self.source.meter.fetch()
            accumulate = self._accumulate()
            parts = next(windows, None)
            if parts is None:
                return
            parts = parts[: int(min(left, accumulate))]
            left -= len(parts)
            final = left == 0 or len(parts) < accumulate
            window = Window(parts, accumulate, ahead=early, final=final)
            yield from (Token(window, index) for index in range(len(parts)))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the callback's state holds the place."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, for the same reason."""

    @property
    def worker_init_fn(self) -> Any:
        """The torch loader's own, which the trainer sets where workers are to be seeded."""
        return _workers_of(self.loader).worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        _workers_of(self.loader).worker_init_fn = function


def _workers_of(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        raise AttributeError("worker_init_fn")
    return loader


def check_loader(trainer: Any, loader: Any, order: Any) -> None:
    """Refuse loaders whose rows could not be dealt exactly.

    Args:
        trainer: The Lightning trainer.
        loader: What gives its batches.
        order: The sampler that the user gave in place of the loader's.
    """
    if isinstance(loader, Mapping | list | tuple) or hasattr(loader, "flattened"):
        refuse(
            "train_dataloader", "one loader", type(loader).__name__,
            "Join the datasets with torch.utils.data.ConcatDataset, and use groups= or "
            "order=DomainSampler(...) to tell them apart.",
        )  # fmt: skip
    base = torch_loader(loader)
    sampler = None if base is None else base.sampler
    if trainer.overfit_batches > 0 and not isinstance(sampler, SequentialSampler):
        refuse(
            "overfit_batches", "0 for a loader that shuffles", trainer.overfit_batches,
            "The same batches come again with shuffle=False.",
        )  # fmt: skip
    if base is None or world_size() == 1 or order is not None:
        return
    injects = trainer._accelerator_connector.use_distributed_sampler
    plain = isinstance(sampler, RandomSampler | SequentialSampler)
    if injects and not plain and not isinstance(sampler, DistributedSampler):
        refuse(
            "use_distributed_sampler", "False for a sampler of one's own on several devices", True,
            f"The trainer would shuffle what {type(sampler).__name__} gives: let it give each "
            "rank rows of its own.",
        )  # fmt: skip
    if plain and not injects:
        refuse(
            "use_distributed_sampler", "True for a loader with torch's own sampler", False,
            "All rows of its dataset are dealt to the ranks. Where each rank has a dataset of its "
            "own, give it a sampler of your own and ids= of a column that is unique over ranks.",
        )  # fmt: skip


def follow(reader: CandidateLoader, before: Stream | None) -> CandidateLoader:
    """Let a second fit of one trainer begin another epoch of the same data.

    Args:
        reader: Of the loader of this fit.
        before: What the fit before has read, None if there was none.
    """
    if before is None:
        return reader
    old = before.reader.data
    if reader.data is not None and old is not None:
        found = old.difference(reader.data.dataset, alike=True)
        if found is not None:
            refuse(
                "train_dataloader", "over the dataset of this trainer's fit before", found,
                "Rows are known by their number: make a new Trainer with a new LightningSelection.",
            )  # fmt: skip
    reader.load_state_dict(before.reader.state_dict())
    reader.end_epoch()
    return reader


def check_window(window: Window, size: int, ready: int) -> None:
    """Refuse a window that the trainer will not accumulate as it was read.

    Args:
        window: That begins.
        size: Micro-batches of an optimizer step now.
        ready: Batches that the trainer has had in this epoch.
    """
    if size != window.accumulate or ready % size:
        refuse(
            "accumulate_grad_batches", "the same through all of a step's micro-batches",
            f"{size} after {window.accumulate}", "Change it between epochs only, and give the "
            "loader a length where it changes at the first.",
        )  # fmt: skip
