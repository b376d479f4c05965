"""However many ranks read an order, they read the same rows in the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from onlinesel.data.order import own_order, shuffled_rows, torch_loader, window_rows
from onlinesel.strategies import RS2


def read(rows: int, **options: Any) -> list[list[list[int]]]:
    """Return the micro-batches of every rank."""
    ranks = options["ranks"]
    return [list(window_rows(range(rows), rank=r, **options)) for r in range(ranks)]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_every_row_is_read_once_and_every_rank_reads_equally_often(
    rows: int, size: int, accumulate: int, ranks: int, drop_last: bool
) -> None:
    options = {"size": size, "accumulate": accumulate, "ranks": ranks, "drop_last": drop_last}
    read_by = read(rows, **options)
    assert len({len(cells) for cells in read_by}) == 1
    assert all(1 <= len(cell) <= size for cells in read_by for cell in cells)
    real = [row for cells in read_by for cell in cells for row in cell if row >= 0]
    whole = size * accumulate * ranks
    assert sorted(real) == list(range(rows - rows % whole if drop_last else rows))
    for cells in read_by:  # a filler is alone in its micro-batch
        assert all(len(cell) == 1 for cell in cells if cell[0] < 0)


@given(st.integers(1, 40), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(1, 2))
def test_the_steps_do_not_depend_on_the_number_of_ranks(
    rows: int, split: tuple[int, int], accumulate: int
) -> None:
    ranks, size = split
    one = read(rows, size=4, accumulate=accumulate, ranks=1, drop_last=False)[0]
    many = read(rows, size=size, accumulate=accumulate, ranks=ranks, drop_last=False)
    for step in range(-(-len(one) // accumulate)):
        part = slice(step * accumulate, (step + 1) * accumulate)
        together = [row for cells in many for cell in cells[part] for row in cell if row >= 0]
        assert sorted(together) == sorted(row for cell in one[part] for row in cell)


def test_a_shuffle_is_a_function_of_seed_and_epoch() -> None:
    first = shuffled_rows(50, epoch=0, seed=0)
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, shuffled_rows(50, epoch=0, seed=0))
    others = [shuffled_rows(50, epoch=e, seed=s) for e, s in ((1, 0), (0, 1), (1, 1))]
    assert all(not torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])


ROWS = list(range(10))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ROWS, sampler=WeightedRandomSampler([1.0] * 10, 10)),
        DataLoader(ROWS, sampler=RandomSampler(ROWS, num_samples=5)),
        DataLoader(ROWS, sampler=RandomSampler(ROWS, replacement=True)),
        DataLoader(ROWS, sampler=[3, 1, 2]),
    ],
    ids=["weighted", "part", "replacement", "own"],
)
def test_a_sampler_of_ones_own_stays(loader: DataLoader[int]) -> None:
    assert own_order(torch_loader(loader), 0, None) is None
    with pytest.raises(ValueError, match="own_order: loader must be a torch DataLoader .*, got "):
        own_order(torch_loader(loader), 0, RS2().epoch_plan)


def test_a_batch_sampler_of_ones_own_stays() -> None:
    class Longest(BatchSampler):
        pass

    loader = DataLoader(ROWS, batch_sampler=Longest(range(10), 2, False))
    assert own_order(torch_loader(loader), 0, None) is None
    assert torch_loader(DataLoader(ROWS, batch_size=None)) is None
    assert torch_loader([1, 2]) is None


def test_what_is_taken_over_keeps_its_meaning() -> None:
    def order(loader: DataLoader[Any], **options: Any) -> list[int]:
        found = own_order(torch_loader(loader), 3, options.get("plan"))
        assert found is not None
        found.epoch = options.get("epoch", 0)
        return list(found)

    assert order(DataLoader(ROWS)) == ROWS
    shuffled = order(DataLoader(ROWS, shuffle=True))
    assert shuffled == shuffled_rows(10, epoch=0, seed=3).tolist()
    assert order(DataLoader(ROWS, shuffle=True), epoch=1) != shuffled
    for shuffle in (True, False):
        # Every rank's share of the rows is dealt here: the sampler's own share plays no part.
        sampler = DistributedSampler(ROWS, num_replicas=2, rank=1, shuffle=shuffle)
        wanted = shuffled if shuffle else ROWS
        assert order(DataLoader(Subset(ROWS, ROWS), sampler=sampler)) == wanted
    planned = order(DataLoader(ROWS, shuffle=True), plan=RS2(fraction=0.5).epoch_plan, epoch=1)
    assert planned == RS2(fraction=0.5).epoch_plan(10, epoch=1, seed=3).tolist()
