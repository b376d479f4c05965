from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Selector, Signals
from onlinesel.strategies import RS2


def plans(strategy: RS2, rows: int, epochs: int, seed: int = 0) -> list[list[int]]:
    return [strategy.epoch_plan(rows, epoch=e, seed=seed).tolist() for e in range(epochs)]


def test_without_replacement_no_row_comes_back_before_all_chunks_are_used() -> None:
    first, second, third, fourth, fifth, sixth = plans(RS2(0.3), 10, 6)
    assert [len(p) for p in (first, second, third)] == [3, 3, 3]
    assert len({*first, *second, *third}) == 9  # the tenth row is left out
    assert len({*fourth, *fifth, *sixth}) == 9
    assert (first, second, third) != (fourth, fifth, sixth)


def test_a_shuffle_serves_the_whole_epochs_that_fit_the_share() -> None:
    # floor(1 / 0.35) = 2 epochs of 3 rows, although a third one would fit into 10 rows.
    found = [plans(RS2(0.35), 10, 3, seed) for seed in range(30)]
    assert all(not {*first} & {*second} for first, second, _ in found)
    assert any({*third} & {*first, *second} for first, second, third in found)


def test_a_quarter_of_the_data_covers_it_in_four_epochs() -> None:
    assert sorted(sum(plans(RS2(0.25), 8, 4), [])) == list(range(8))


def test_with_replacement_rows_come_back_but_not_within_an_epoch() -> None:
    found = plans(RS2(0.5, replacement=True), 20, 2)
    assert all(len(set(plan)) == 10 for plan in found)
    assert len({*found[0], *found[1]}) < 20


@given(
    rows=st.integers(1, 60),
    fraction=st.floats(0.001, 1.0),
    replacement=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_every_plan_has_the_same_length_and_distinct_rows(
    rows: int, fraction: float, replacement: bool, seed: int
) -> None:
    strategy = RS2(fraction, replacement)
    found = plans(strategy, rows, 7, seed)
    assert {len(plan) for plan in found} == {max(int(fraction * rows + 1e-9), 1)}
    assert all(len(set(plan)) == len(plan) and set(plan) <= set(range(rows)) for plan in found)
    chunks = min(int(1 / fraction), rows // len(found[0]))
    if not replacement and chunks <= 7:
        assert len(set(sum(found[:chunks], []))) == chunks * len(found[0])


@pytest.mark.parametrize("replacement", [False, True])
def test_a_plan_depends_on_seed_and_epoch_alone(replacement: bool) -> None:
    strategy = RS2(0.25, replacement)
    late = strategy.epoch_plan(40, epoch=5, seed=3)
    assert torch.equal(late, plans_tensor(strategy, 5, 3))
    assert not torch.equal(late, plans_tensor(strategy, 5, 4))
    assert not torch.equal(late, plans_tensor(strategy, 6, 3))


def plans_tensor(strategy: RS2, epoch: int, seed: int) -> torch.Tensor:
    for earlier in range(epoch):
        strategy.epoch_plan(40, epoch=earlier, seed=seed)
    return strategy.epoch_plan(40, epoch=epoch, seed=seed)


def test_neighbouring_seeds_do_not_share_shuffles() -> None:
    strategy = RS2(1.0)
    assert plans(strategy, 30, 2, seed=0)[1] not in plans(strategy, 30, 2, seed=1)
    assert plans(strategy, 30, 1, seed=2**32) != plans(strategy, 30, 1, seed=0)


def test_a_share_that_is_not_exact_in_floating_point_is_not_cut() -> None:
    assert len(RS2(0.29).epoch_plan(100, epoch=0, seed=0)) == 29
    assert len(set(sum(plans(RS2(1 / 3), 6, 3), []))) == 6


def test_all_rows_in_random_order_is_the_ordinary_epoch() -> None:
    plan = plans(RS2(1.0), 30, 1)[0]
    assert sorted(plan) == list(range(30)) and plan != sorted(plan)


def test_rows_are_planned_equally_often() -> None:
    counts, epochs = torch.zeros(12), 3000
    for epoch in range(epochs):
        counts[RS2(0.25, replacement=True).epoch_plan(12, epoch=epoch, seed=0)] += 1
    assert bool(((counts - epochs / 4).abs() < 4 * (epochs * 3 / 16) ** 0.5).all())


def test_a_step_trains_every_candidate() -> None:
    weights = Selector(RS2()).select(Signals(ids=torch.arange(3)), keep=1).weights
    assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"RS2: fraction must be in \(0, 1\], got {fraction}\. S"):
        RS2(fraction)


@pytest.mark.parametrize("arguments", [{"rows": 0, "epoch": 0}, {"rows": 5, "epoch": -1}])
def test_a_plan_of_nothing_is_refused(arguments: dict[str, Any]) -> None:
    message = (
        r"RS2: rows must be at least 1 and epoch at least 0, got "
        rf"{arguments['rows']} and {arguments['epoch']}\. Pass the size"
    )
    with pytest.raises(ValueError, match=message):
        RS2().epoch_plan(**arguments, seed=0)
