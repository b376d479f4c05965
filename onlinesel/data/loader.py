"""Candidates for plain loops: what competes in each optimizer step, from a loader as it is.

Of a torch ``DataLoader`` over a map-style dataset with one of torch's own samplers, the order of
the rows is taken over: one global order per epoch, a function of seed and epoch alone, cut into
the windows of the optimizer steps and dealt to the ranks. It does not depend on how many ranks
there are, so a run continues on another number of them without losing or repeating a row.

Any other loader (a stream, a sampler of one's own, one that a framework prepared) is left as it
is: its batches are joined into candidates, and a resumed run reads past those it has had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from onlinesel.data.candidates import Candidates, Joiner
from onlinesel.data.collating import OrderWatch
from onlinesel.data.datasets import DataFacts, check_size
from onlinesel.data.fingerprint import rows_digest
from onlinesel.data.order import Order, Thinned, own_order, torch_loader, window_rows
from onlinesel.data.randomness import undisturbed
from onlinesel.data.reading import (
    Cells,
    begin_workers,
    check_state,
    generator_states,
    generators_of,
    numbered_parts,
    set_generator_states,
    standing_in,
    tell_epoch,
)
from onlinesel.parallel.agreement import smallest_over_ranks, stack_over_ranks
from onlinesel.parallel.distributed import rank, world_size

__all__ = ["CandidateLoader", "Candidates"]


class CandidateLoader:
    """Read candidate micro-batches in windows of one optimizer step.

    Args:
        loader: A torch ``DataLoader``, or any iterable of batches that can be iterated anew.
            Nothing of it is changed for good.
        candidates: Candidate rows for each row that trains.
        accumulate: Micro-batches of an optimizer step, or a function that says.
        seed: Of the order, where it is ours.
        ids: ``"auto"``: the batch's column ``sample_id`` if there is one, else the row number of a
            map-style dataset, else a hash of the content; ``"hash"``; or a column of integers,
            which is taken out of the batch.
        groups: Column of the batch that holds the source or domain of each row, taken out of it.
        plan: A strategy's ``epoch_plan``.
        order: A sampler with ``epoch`` that replaces the loader's own, as a ``DomainSampler``.
        thin: As :meth:`onlinesel.Selector.rows_of_epoch`, for orders taken over and row numbers.
        pad_id: Token that pads ``input_ids`` where batches of different width are joined.
        device: Where collectives need their tensors.

    Attributes:
        data: The dataset as it was found; None of what is no loader of a map-style dataset.

    Raises:
        ValueError: The order has to be ours and cannot be, or its epoch has no step.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> rows = [(torch.tensor([float(i)]), i % 2) for i in range(6)]
        >>> reader = CandidateLoader(DataLoader(rows, batch_size=1), candidates=2, accumulate=2)
        >>> [[part.ids.tolist() for part in window] for window in reader.windows()]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(
        self,
        loader: Any,
        *,
        candidates: int = 1,
        accumulate: int | Callable[[], int] = 1,
        seed: int = 0,
        ids: str = "auto",
        groups: str | None = None,
        plan: Callable[..., Tensor | None] | None = None,
        order: Order | None = None,
        thin: Callable[..., Tensor | None] | None = None,
        pad_id: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.loader, self.candidates, self.seed = loader, candidates, seed
        self._accumulate = accumulate if callable(accumulate) else lambda: accumulate
        self._hashed, self._device = ids == "hash", device
        self._base = torch_loader(loader)
        taken_over = own_order(self._base, seed, plan)
        if order is not None and taken_over is None:
            raise ValueError(
                "CandidateLoader: loader must be a torch DataLoader with a map-style dataset and "
                f"a plain sampler where the order is planned, got {type(loader).__name__}. "
                "Use shuffle=True and no sampler."
            )
        self._thin = thin
        if taken_over is not None and order is None and thin is not None and ids == "auto":
            taken_over = Thinned(taken_over)
        self.order = order if order is not None else taken_over
        domains: Tensor | None = getattr(self.order, "domains", None)
        if domains is not None and self._base is not None:
            rows = len(self._base.dataset)  # type: ignore[arg-type]
            if domains.shape[0] != rows:
                raise ValueError(
                    "CandidateLoader: order must have a domain for each row of the dataset "
                    f"({rows}), got {domains.shape[0]}. Number the domains of this dataset."
                )
        self._joiner = Joiner(ids, groups, pad_id, domains)
        # What the user said about batches; read now, because a stand-in takes its place later.
        self._batching: Any = None if self._base is None else self._base.batch_sampler
        self.epoch = self.position = 0
        self._resumed = self._begun = self._over = False
        self._rng: Tensor | None = None
        self._costs: deque[int] = deque()  # of the windows that were read and have not trained
        self._cells = Cells(self._rows_of_this_rank)
        self._workers: Any = None
        self._watch = OrderWatch("CandidateLoader")
        self.data = None if self._base is None else DataFacts.of(self._base.dataset)
        if self.order is not None:
            check_size(
                "CandidateLoader", len(self.order), micro_batch=self._size * world_size(),
                accumulate=self._accumulate(), drops_last=self._drops_last,
                names=("candidates", "drop_last"),
            )  # fmt: skip

    # Size -----------------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        """Candidate rows of one micro-batch of this rank, where the order is ours."""
        return self._batching.batch_size * self.candidates

    def micro_batches(self) -> int:
        """Return the number of candidate micro-batches of an epoch on this rank.

        Raises:
            TypeError: The loader has no length.
        """
        return self._fitting(len(self.loader if self.order is None else self.order))

    def ahead(self) -> int:
        """Return how many of them are left, from where the epoch stands.

        Raises:
            TypeError: The loader has no length.
        """
        whole = len(self.loader if self.order is None else self.order)
        return self._fitting(whole - self.position)

    def behind(self) -> int:
        """Return how many have trained, in whole windows of this number of ranks."""
        if self.order is None:
            return self.position // self.candidates
        accumulate = self._accumulate()
        return (self.micro_batches() - self.ahead()) // accumulate * accumulate

    def _fitting(self, rest: int) -> int:
        """Return the micro-batches that hold the next rows (batches, of a loader left as it is)."""
        if self.order is None:
            return -(-rest // self.candidates)
        row, accumulate = self._size * world_size(), self._accumulate()
        return rest // (row * accumulate) * accumulate if self._drops_last else -(-rest // row)

    def __len__(self) -> int:
        """Return the number of optimizer steps of an epoch."""
        return -(-self.micro_batches() // self._accumulate())

    def step_rows(self) -> int | None:
        """Return the rows that train in a whole step over all ranks; None of an unknown loader."""
        size = getattr(self._batching, "batch_size", None)
        return None if size is None else size * self._accumulate() * world_size()

    @property
    def identity(self) -> str:
        """How rows are told apart, in words."""
        return self._joiner.told_apart(numbered=self._base is not None)

    @property
    def _drops_last(self) -> bool:
        return self._batching.drop_last

    def facts(self) -> dict[str, Any]:
        """Return what ranks must have in common to read equally many windows."""
        facts: dict[str, Any] = {"accumulate": self._accumulate(), "groups": self._joiner.groups}
        if self.order is not None:
            facts |= {"rows": len(self.order), "batch size": self._batching.batch_size}
            facts |= {"drop_last": self._drops_last, "order": type(self.order).__name__}
        return facts

    # Reading --------------------------------------------------------------------------------

    def windows(self) -> Iterator[list[Candidates]]:
        """Yield the candidates of each optimizer step of the epoch, or of what is left of it.

        A new call begins the next epoch, unless a state has just been loaded. Ranks read equally
        many micro-batches: where loaders of their own give them different numbers, the epoch ends
        with the shortest.
        """
        if self._begun and not self._resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self._begun, resumed, self._resumed = True, self._resumed, False
        self._over = False
        self._costs.clear()
        self._check_data()
        if isinstance(self.order, Thinned) and self._thin is not None:
            rows = 0 if self._joiner.named else len(self._base.dataset)  # type: ignore[arg-type, union-attr]
            self.order.kept = self._thin(rows, fresh=not resumed)
        windows = self._foreign if self.order is None else self._own_windows
        yield from windows(resumed)
        self._over = True

    def _check_data(self) -> None:
        """Refuse a dataset that has changed since its order was made."""
        if self.order is None or self.data is None or self._base is None:
            return  # who reads with a sampler of one's own may let the data grow
        found = self.data.difference(self._base.dataset)
        if found is not None:
            raise ValueError(
                "CandidateLoader: dataset must stay as it was when the loader was given, got "
                f"{found}. Rows are known by their number: make a new selection for new data."
            )

    def advance(self) -> None:
        """Note that the oldest window that was read has trained; a checkpoint counts those."""
        if self._costs:
            self.position += self._costs.popleft()

    def end_epoch(self) -> None:
        """Leave what is left of the epoch after :meth:`load_state_dict`: the next one follows."""
        self._resumed = False

    def _own_windows(self, resumed: bool) -> Iterator[list[Candidates]]:
        assert self.order is not None and self._base is not None
        self.order.epoch = self.epoch
        accumulate, ranks, left = self._accumulate(), world_size(), len(self.order) - self.position
        whole = self._size * accumulate * ranks
        pairs = self._read(self._base, quiet=resumed, batch_sampler=self._cells)
        while left >= whole or (left > 0 and not self._drops_last):
            rows = min(left, whole)
            count = -(-rows // (self._size * ranks))
            self._costs.append(rows)
            yield [self._joiner.join([pair]) for pair in islice(pairs, count)]
            left -= rows

    def _rows_of_this_rank(self) -> Iterator[list[int]]:
        assert self.order is not None
        return window_rows(
            islice(self.order, self.position, None), size=self._size, ranks=world_size(),
            accumulate=self._accumulate(), rank=rank(), drop_last=self._drops_last,
        )  # fmt: skip

    def _foreign(self, resumed: bool) -> Iterator[list[Candidates]]:
        tell_epoch(self.loader, self.epoch)
        generators = generators_of(self.loader)
        if not resumed:
            self._begin_workers()
            self._rng = stack_over_ranks(generator_states(generators), self._device)
            batches = self._batches()
        else:
            # The loader shuffles as it did, and what it draws of the program's disturbs nothing.
            with undisturbed():
                self._begin_workers()
                if self._rng is not None:
                    set_generator_states(generators, self._rng[rank()])
                batches = self._batches()
                for _ in islice(batches, self.position):
                    pass
        while True:
            accumulate = self._accumulate()
            raw = list(islice(batches, accumulate * self.candidates))
            # Ranks count alike: whatever their loaders give, they stand at the same batch.
            raw = raw[: smallest_over_ranks(len(raw), self._device)]
            if not raw:
                return
            self._costs.append(len(raw))
            parts = [raw[i : i + self.candidates] for i in range(0, len(raw), self.candidates)]
            yield [self._joiner.join(part) for part in parts]
            if len(parts) < accumulate:
                return

    def _begin_workers(self) -> None:
        """Let workers that persist begin before anything of the epoch is drawn."""
        if self._base is not None:
            self._workers = begin_workers(
                self._base, self._workers, self._watch, plain=self._hashed
            )

    def _batches(self) -> Iterator[tuple[Tensor | None, Any]]:
        if self._base is None or self._hashed:
            return ((None, batch) for batch in self.loader)
        return self._read(self.loader)

    def _read(
        self, loader: Any, *, quiet: bool = False, **parts: Any
    ) -> Iterator[tuple[Tensor, Any]]:
        """Iterate a loader whose base gives row numbers beside its batches.

        Args:
            loader: The loader, or its base.
            quiet: Whether what torch draws for an iterator is to be drawn again by the program: an
                epoch that is gone on with has had it.
            **parts: Of the base, in the place of its own.
        """
        base = self._base
        assert base is not None
        parts |= numbered_parts(base, self._watch)
        # Wrappers build the inner iterator at the first call of next, so that is done in here.
        # Workers that persist belong to an iterator, and are not to be those of the user's own.
        with standing_in(base, _iterator=self._workers, **parts):
            with undisturbed() if quiet else nullcontext():
                iterator = iter(loader)
            first = list(islice(iterator, 1))
            self._workers = vars(base)["_iterator"]
        return (pair for part in (first, iterator) for pair in part)

    # State ----------------------------------------------------------------------------------

    @cached_property
    def _digest(self) -> dict[str, Any] | None:
        """What the rows are recognised by; read once, and only where a state is."""
        if self._base is None:
            return None
        return rows_digest(self._base.dataset, workers=self._base.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands: plain numbers and, for a loader left as it is, a tensor.

        The same on every rank. Windows that were read but have not trained do not count.
        """
        over = self._over and not self._costs  # then the next epoch is what comes
        epoch, position = (self.epoch + 1, 0) if over else (self.epoch, self.position)
        state: dict[str, Any] = {"epoch": epoch, "position": position, "seed": self.seed}
        state |= {"named": self._joiner.named} | ({"rows": self._digest} if self._digest else {})
        if self.order is None:
            state |= {"ranks": world_size(), "rng": None if over else self._rng}
        elif hasattr(self.order, "state_dict"):
            state["order"] = self.order.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, on any number of ranks if the order is ours.

        Raises:
            ValueError: The state is of another kind of loader, other rows or another seed, or of
                the middle of an epoch of a loader that another number of ranks had read.
        """
        check_state(state, self.seed, self._digest, foreign=self.order is None)
        if "order" in state and self.order is not None:
            self.order.load_state_dict(state["order"])
        self.epoch, self.position = state["epoch"], state["position"]
        self._rng, self._joiner.named = state.get("rng"), state.get("named", False)
        self._begun = self._resumed = self.position > 0 or self._rng is not None
        self._over = False
        self._costs.clear()
