"""Candidates keep who they are in any loader, and a state continues behind what trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from onlinesel.data.loader import CandidateLoader, Candidates
from onlinesel.mixing import DomainSampler, FixedMixture

ROWS = [{"x": torch.tensor([i, i]), "y": i % 3} for i in range(11)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


def weighted(seed: int = 0) -> DataLoader[Any]:
    """A loader whose sampler stays; it draws from the global generator."""
    torch.manual_seed(seed)
    return DataLoader(ROWS, batch_size=2, sampler=WeightedRandomSampler([1.0] * 11, 11))


def epoch(reader: CandidateLoader) -> list[list[list[int]]]:
    """Read one epoch; ids of every window and micro-batch, as trained."""
    found = []
    for window in reader.windows():
        found.append([check(part).ids.tolist() for part in window])
        reader.advance()
    return found


def check(part: Candidates) -> Candidates:
    """The ids are those of the rows that they stand beside."""
    numbered = (part.ids >= 0) & (part.ids < 100)  # neither fillers nor hashes
    assert part.columns["x"][numbered, 0].tolist() == part.ids[numbered].tolist()
    return part


def flat(windows: list[list[list[int]]]) -> list[int]:
    return [i for window in windows for part in window for i in part]


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_of_candidates(workers: int) -> None:
    persistent = workers > 0
    loader = DataLoader(ROWS, batch_size=1, num_workers=workers, persistent_workers=persistent)
    reader = CandidateLoader(loader, candidates=2, accumulate=2)
    for _ in range(2):  # workers that persist read the second epoch as well
        assert epoch(reader) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
    assert reader.epoch == 1 and len(reader) == 3 and reader.micro_batches() == 6
    assert loader.dataset is ROWS and type(loader.batch_sampler).__name__ == "BatchSampler"


def test_drop_last_leaves_a_shorter_window_out() -> None:
    loader = DataLoader(ROWS, batch_size=1, drop_last=True)
    reader = CandidateLoader(loader, candidates=2, accumulate=2)
    assert flat(epoch(reader)) == list(range(8))
    assert len(reader) == 2 and reader.micro_batches() == 4


def test_shuffled_epochs_differ_and_follow_from_the_seed() -> None:
    def two(seed: int) -> list[list[int]]:
        reader = CandidateLoader(DataLoader(ROWS, batch_size=2, shuffle=True), seed=seed)
        return [flat(epoch(reader)) for _ in range(2)]

    first, second = two(0)
    assert sorted(first) == sorted(second) == list(range(11)) and first != second
    torch.manual_seed(99)
    assert two(0) == [first, second] and two(1)[0] != first


def test_a_sampler_of_ones_own_is_joined_and_keeps_row_numbers() -> None:
    drawn = [i for batch in weighted() for i in batch["x"][:, 0].tolist()]
    reader = CandidateLoader(weighted(), candidates=2, accumulate=2)
    windows = epoch(reader)
    assert flat(windows) == drawn
    assert [[len(part) for part in window] for window in windows] == [[4, 4], [3]]
    assert len(reader) == 2


def test_a_stream_has_ids_of_its_content_and_no_length() -> None:
    reader = CandidateLoader(DataLoader(Stream(), batch_size=2), candidates=2)
    first, second = (flat(epoch(reader)) for _ in range(2))
    assert first == second and len(set(first)) == 11
    with pytest.raises(TypeError):
        len(reader)


def test_any_iterable_of_batches_will_do() -> None:
    batches = [{"x": torch.tensor([[i, i]]), "sample_id": torch.tensor([7 + i])} for i in range(3)]
    reader = CandidateLoader(batches, candidates=2)
    windows = list(reader.windows())
    assert [part.ids.tolist() for window in windows for part in window] == [[7, 8], [9]]
    assert list(windows[0][0].columns) == ["x"]


def test_ids_and_groups_come_from_columns_and_leave_the_batch() -> None:
    loader = DataLoader([{**row, "number": 10**12 + i} for i, row in enumerate(ROWS)], batch_size=4)
    reader = CandidateLoader(loader, ids="number", groups="y")
    parts = [part for window in reader.windows() for part in window]
    assert [i for p in parts for i in p.ids.tolist()] == [10**12 + i for i in range(11)]
    groups = [p.groups.tolist() for p in parts if p.groups is not None]
    assert sum(groups, []) == [i % 3 for i in range(11)]
    assert all(list(part.columns) == ["x"] for part in parts)
    # Hashes tell equal rows from different ones, whatever their number.
    twice = CandidateLoader(DataLoader(ROWS[:2] + ROWS[:2], batch_size=4), ids="hash")
    ((part,),) = twice.windows()
    assert part.ids[0] == part.ids[2] != part.ids[1] == part.ids[3]


@pytest.mark.parametrize("make", ["own", "workers", "foreign", "stream"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_state_continues_behind_what_trained(make: str, stop: int) -> None:
    def reader() -> CandidateLoader:
        loader: DataLoader[Any] = DataLoader(ROWS, batch_size=2, shuffle=True)
        if make == "workers":
            loader = DataLoader(ROWS, batch_size=2, shuffle=True, num_workers=1)
        elif make != "own":
            loader = weighted() if make == "foreign" else DataLoader(Stream(), batch_size=2)
        return CandidateLoader(loader, candidates=2)

    torch.manual_seed(5)
    first = reader()
    whole = [epoch(first), epoch(first)]
    torch.manual_seed(5)
    second = reader()
    epoch(second)
    windows = second.windows()
    for _ in islice(windows, stop):
        second.advance()
    next(windows)  # was read and did not train: it comes again
    state = second.state_dict()
    if make != "foreign":
        torch.manual_seed(123)  # nothing that the resumed run draws plays a part
    before = torch.get_rng_state()
    third = reader() if make != "foreign" else CandidateLoader(weighted(77), candidates=2)
    third.load_state_dict(state)
    assert epoch(third) == whole[1][stop:]
    assert third.epoch == 1
    if make == "own":
        after = torch.Generator()
        after.set_state(before)
        if stop == 0:  # an epoch begins, as it did: torch draws once for its iterator
            torch.empty((), dtype=torch.int64).random_(generator=after)
        assert torch.equal(torch.get_rng_state(), after.get_state())


def test_a_new_iteration_begins_the_next_epoch() -> None:
    reader = CandidateLoader(DataLoader(ROWS, batch_size=2, shuffle=True))
    next(reader.windows())
    again = flat(epoch(reader))
    assert reader.epoch == 1 and sorted(again) == list(range(11))


def test_a_sampler_with_a_generator_of_its_own_is_replayed() -> None:
    def make() -> CandidateLoader:
        generator = torch.Generator().manual_seed(3)
        sampler = WeightedRandomSampler([1.0] * 11, 11, generator=generator)
        return CandidateLoader(DataLoader(ROWS, batch_size=2, sampler=sampler), candidates=2)

    first = make()
    epoch(first)
    whole = epoch(first)
    second = make()
    epoch(second)
    next(second.windows())
    second.advance()
    third = make()
    third.load_state_dict(second.state_dict())
    assert epoch(third) == whole[1:] and epoch(third) == epoch(first)


@pytest.mark.parametrize("make", ["own", "foreign"])
def test_a_state_of_an_epochs_end_begins_the_next(make: str) -> None:
    def reader() -> CandidateLoader:
        own = DataLoader(ROWS, batch_size=2, shuffle=True)
        return CandidateLoader(own if make == "own" else weighted())

    first = reader()
    epoch(first)
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)
    second = reader()
    second.load_state_dict({**state, "ranks": 7} if make == "foreign" else state)
    rows = flat(epoch(second))
    assert second.epoch == 1 and len(rows) == 11
    if make == "own":
        assert rows == flat(epoch(first))


def test_the_users_own_iteration_is_left_alone() -> None:
    loader = DataLoader(ROWS, batch_size=4, num_workers=1, persistent_workers=True)
    before = [batch["y"].tolist() for batch in loader]
    reader = CandidateLoader(loader)
    assert flat(epoch(reader)) == flat(epoch(reader)) == list(range(11))
    assert [batch["y"].tolist() for batch in loader] == before


class Named(list[Any]):
    source = "a dataset's own attribute"


def reads_the_dataset(_: int) -> None:
    worker = torch.utils.data.get_worker_info()
    assert worker is not None and worker.dataset.source == Named.source  # type: ignore[attr-defined]


def test_workers_reach_the_dataset() -> None:
    loader: DataLoader[Any] = DataLoader(
        Named(ROWS), batch_size=4, num_workers=1, worker_init_fn=reads_the_dataset
    )
    assert flat(epoch(CandidateLoader(loader))) == list(range(11))


@pytest.mark.parametrize("kind", ["numbers", "strings", "array"])
@pytest.mark.parametrize("joined", [False, True])
def test_rows_that_are_no_tensors_follow_their_rows(kind: str, joined: bool) -> None:
    import numpy as np

    whole: Any = {"numbers": [1, 2, 3, 4], "strings": list("abcd"), "array": np.arange(4)}[kind]
    batches = [
        {"x": torch.tensor([r, r + 1]), "extra": whole[r : r + 2], "scale": 2.0} for r in (0, 2)
    ]
    windows = list(CandidateLoader(batches, candidates=1 + joined).windows())
    assert len(windows) == 2 - joined
    for (part,) in windows:
        batch = part.rebuild(part.columns)
        assert list(batch["extra"]) == [whole[i] for i in batch["x"]] and batch["scale"] == 2.0
        assert type(batch["extra"]) is type(whole)


@pytest.mark.parametrize("extra", [["a", "b", "c"], {1, 2}, ["a"]])
def test_rows_that_cannot_be_told_apart_are_refused(extra: Any) -> None:
    batches = [{"x": torch.ones(2, 2), "extra": extra}]
    with pytest.raises(ValueError, match="'extra' must "):
        next(CandidateLoader(batches).windows())


def test_domains_belong_to_row_numbers() -> None:
    domains = torch.arange(11) % 2
    order = DomainSampler(domains, FixedMixture("uniform"), seed=0)
    loader = DataLoader(ROWS, batch_size=4)
    for window in CandidateLoader(loader, order=order).windows():
        for part in window:
            assert part.groups is not None and torch.equal(part.groups, domains[part.ids])
    with pytest.raises(ValueError, match="ids must be row numbers where an order draws by domain"):
        next(CandidateLoader(loader, order=order, ids="hash").windows())
    named = DataLoader([{**row, "sample_id": 5} for row in ROWS], batch_size=4)
    with pytest.raises(ValueError, match=r"ids must be row numbers .* no column sample_id"):
        next(CandidateLoader(named, order=order).windows())
    short = DomainSampler(domains[:5], FixedMixture("uniform"), seed=0)
    with pytest.raises(ValueError, match=r"a domain for each row of the dataset \(11\), got 5"):
        CandidateLoader(loader, order=short)


def test_designed_errors() -> None:
    loader = DataLoader(ROWS, batch_size=2)
    with pytest.raises(ValueError, match=r"ids must be a column of the batch, got 'name'\. The "):
        next(CandidateLoader(loader, ids="name").windows())
    with pytest.raises(ValueError, match="groups must be a column of the batch, got 'source'"):
        next(CandidateLoader(loader, groups="source").windows())
    holes = DataLoader(ROWS, batch_size=4, collate_fn=lambda rows: {
        "x": torch.zeros(len(rows), 2), "sample_id": [None] + [1] * (len(rows) - 1)
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"'sample_id' must have a number in every row, got None"):
        next(CandidateLoader(holes).windows())
    floats = DataLoader([{"x": torch.zeros(2), "sample_id": 0.5}], batch_size=1)
    with pytest.raises(TypeError, match="ids must be integers, got torch.float64 in column 'sam"):
        next(CandidateLoader(floats).windows())
    state = CandidateLoader(loader).state_dict()
    with pytest.raises(ValueError, match=r"same kind of loader and seed \(1\), got one of seed 0"):
        CandidateLoader(loader, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="got one of seed 0 and an order of our own"):
        CandidateLoader(weighted()).load_state_dict(state)
    foreign = {**CandidateLoader(weighted()).state_dict(), "ranks": 2, "position": 3}
    with pytest.raises(ValueError, match=r"number of ranks must be the checkpoint's \(2\)"):
        CandidateLoader(weighted()).load_state_dict(foreign)
    with pytest.raises(ValueError, match="loader must be a torch DataLoader .* order is planned"):
        CandidateLoader(weighted(), order=range(3))
