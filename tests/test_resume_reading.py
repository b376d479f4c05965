"""Whatever a loader draws its order from, a run that goes on reads the rows that were left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from onlinesel.data.loader import CandidateLoader
from onlinesel.data.randomness import program_state, set_program_state
from onlinesel.mixing import DomainSampler, FixedMixture

Epoch = list[list[list[int]]]


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor([i, i])} for i in range(count)]


class Drawn(Sampler[int]):
    """An order that a generator of the program draws, at once or row by row."""

    def __init__(self, count: int, kind: str) -> None:
        self.count, self.kind = count, kind

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        if self.kind == "torch":
            yield from torch.randperm(self.count).tolist()
        elif self.kind == "python":
            random.shuffle(order)
            yield from order
        elif self.kind == "numpy":
            yield from np.random.permutation(self.count).tolist()
        while self.kind == "lazy" and order:
            yield order.pop(int(torch.randint(len(order), ())))


class Stream(IterableDataset[Any]):
    """A stream that is shuffled anew in each pass, and as often yields a row more."""

    def __init__(self, count: int, kind: str) -> None:
        self.count, self.kind, self.passes = count, kind, 0

    def __iter__(self) -> Iterator[Any]:
        for i in Drawn(self.count, self.kind):
            yield {"x": torch.tensor([i, i]), "sample_id": torch.tensor(i)}


def make(kind: str, count: int, size: int) -> Any:
    structure, _, source = kind.partition("-")
    if structure == "stream":
        return DataLoader(Stream(count, source), batch_size=size)
    if structure == "batches":
        batches = BatchSampler(Drawn(count, source), size, drop_last=False)
        return DataLoader(rows(count), batch_sampler=Shuffled(batches))
    if structure == "own":
        return DataLoader(rows(count), batch_size=size, shuffle=True)
    if structure == "generator":
        generator = torch.Generator().manual_seed(3)
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * count, count, generator=generator)
        return DataLoader(rows(count), batch_size=size, sampler=sampler, generator=generator)
    return DataLoader(rows(count), batch_size=size, sampler=Drawn(count, source))


class Shuffled:
    """A batch sampler of one's own."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batches.batch_size, False

    def __iter__(self) -> Iterator[list[int]]:
        found = list(self.batches)
        return (found[i] for i in torch.randperm(len(found)).tolist())


KINDS = [
    f"{structure}-{source}"
    for structure in ("sampler", "batches", "stream")
    for source in ("torch", "python", "numpy", "lazy")
] + ["own-", "generator-"]


def windows(reader: CandidateLoader, noise: bool, stop: int | None = None) -> Epoch:
    """Read an epoch or a part; the training between may draw from torch's generator as well."""
    found = []
    for window in islice(reader.windows(), stop):
        found.append([part.ids.tolist() for part in window])
        for part in window:
            assert part.columns["x"][:, 0].tolist() == part.ids.tolist()
        reader.advance()
        if noise:
            torch.rand(3)
    return found


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 23),
    size=st.integers(1, 4),
    candidates=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    epochs=st.integers(0, 2),
    stop=st.integers(1, 6),
)
def test_a_run_that_goes_on_reads_what_was_left(
    kind: str, count: int, size: int, candidates: int, accumulate: int, epochs: int, stop: int
) -> None:
    def reader() -> CandidateLoader:
        loader = make(kind, count, size)
        return CandidateLoader(loader, candidates=candidates, accumulate=accumulate, seed=1)

    noise = epochs % 2 == 0
    seed_all(0)
    whole = reader()
    expected = [windows(whole, noise) for _ in range(epochs + 2)]
    seed_all(0)
    first = reader()
    before = [windows(first, noise) for _ in range(epochs)]
    before.append(windows(first, noise, stop))
    assert before == [*expected[:epochs], expected[epochs][:stop]]
    state, program = first.state_dict(), program_state()
    seed_all(99)
    second = reader()
    second.load_state_dict(state)
    next_epoch = state["epoch"] > epochs
    # Of an epoch that began, the order is known; what is drawn from now on, the program draws.
    if (next_epoch and kind != "own-") or kind.endswith("lazy"):
        set_program_state(program)
    wanted = expected[epochs + 1] if next_epoch else expected[epochs][stop:]
    if not (noise and kind.endswith("lazy")):  # rows that depend on what the training draws
        assert windows(second, noise) == wanted


@pytest.mark.parametrize("ids", ["auto", "hash"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_workers_that_persist_change_nothing(ids: str, epochs: int) -> None:
    """Torch draws once where they begin: in a resumed run, in another epoch than before."""

    def reader() -> CandidateLoader:
        loader = DataLoader(
            rows(11), batch_size=2, sampler=Drawn(11, "torch"), num_workers=1,
            persistent_workers=True,
        )  # fmt: skip
        return CandidateLoader(loader, candidates=2, ids=ids)

    def read(reader: CandidateLoader, stop: int | None = None) -> Any:
        found = []
        for window in islice(reader.windows(), stop):
            found.append([part.columns["x"][:, 0].tolist() for part in window])
            reader.advance()
        return found

    seed_all(0)
    whole = reader()
    expected = [read(whole) for _ in range(epochs + 2)]
    plain = DataLoader(rows(11), batch_size=2, sampler=Drawn(11, "torch"), num_workers=1,
                       persistent_workers=True)  # fmt: skip
    seed_all(0)  # and the order is the one that the loader gives by itself
    for epoch in expected:
        assert sum(sum(epoch, []), []) == [i for b in plain for i in b["x"][:, 0].tolist()]
    seed_all(0)
    first = reader()
    for _ in range(epochs):
        read(first)
    assert read(first, 1) == expected[epochs][:1]
    state, program = first.state_dict(), torch.get_rng_state()
    seed_all(99)
    second = reader()
    second.load_state_dict(state)
    torch.set_rng_state(program)  # as a loop does that keeps it in its checkpoint
    assert read(second) == expected[epochs][1:]
    assert read(second) == expected[epochs + 1]


@pytest.mark.parametrize("workers", [0, 1])
@given(st.permutations(range(9)))
@settings(max_examples=10, deadline=None)
def test_other_rows_are_refused(workers: int, order: list[int]) -> None:
    data = rows(9)
    reader = CandidateLoader(DataLoader(data, batch_size=2, shuffle=True, num_workers=workers))
    state = reader.state_dict()
    for other in ([data[i] for i in order], data[:8], [*data, data[0]]):
        again = CandidateLoader(DataLoader(other, batch_size=2, shuffle=True, num_workers=workers))
        if [row["x"][0] for row in other] == list(range(9)):
            again.load_state_dict(state)
        else:
            with pytest.raises(ValueError, match="CandidateLoader: dataset must be the checkpoint"):
                again.load_state_dict(state)


def test_rows_that_change_when_they_are_read_are_not_compared() -> None:
    """Augmented rows are nobody's fault; their number still counts, and nothing is disturbed."""

    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            return {"x": torch.rand(2)}

    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    state = CandidateLoader(DataLoader(Augmented(), batch_size=2)).state_dict()
    assert state["rows"] == {"rows": 5, "content": None} and torch.equal(torch.rand(1), drawn)
    CandidateLoader(DataLoader(Augmented(), batch_size=2)).load_state_dict(state)
    other = CandidateLoader(DataLoader(rows(4), batch_size=2))
    with pytest.raises(ValueError, match="dataset must be the checkpoint's"):
        other.load_state_dict(state)


def test_a_dataset_with_workers_is_not_opened_here() -> None:
    class Opened(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read in the main process")

    loader = DataLoader(Opened(), batch_size=2, num_workers=1)
    assert CandidateLoader(loader).state_dict()["rows"] == {"rows": 5, "content": None}


def test_a_mixture_goes_on_too() -> None:
    def reader() -> CandidateLoader:
        order = DomainSampler(torch.arange(12) % 3, FixedMixture("uniform"), seed=4)
        return CandidateLoader(DataLoader(rows(12), batch_size=2, shuffle=True), order=order)

    first = reader()
    expected = windows(first, False)
    second = reader()
    assert windows(second, False, 2) == expected[:2]
    third = reader()
    third.load_state_dict(second.state_dict())
    assert windows(third, False) == expected[2:]
