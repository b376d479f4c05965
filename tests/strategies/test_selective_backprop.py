from __future__ import annotations

import math

import pytest
import torch

from onlinesel import Selector, Signals
from onlinesel.strategies import SelectiveBackprop
from onlinesel.strategies.selective_backprop import keep_probability, weighted_rows

NAN = float("nan")


def test_probability_is_the_share_of_losses_that_are_not_larger() -> None:
    loss = torch.tensor([1.0, 5.0, 3.0])
    history = torch.tensor([0.0, 3.0, 4.0, 9.0, 10.0])
    # All eight, sorted: 0 1 3 3 4 5 9 10.
    want = [2 / 8, 6 / 8, 4 / 8]
    assert keep_probability(loss, history, 1.0).tolist() == want
    assert keep_probability(loss, history, 2.0).tolist() == [p * p for p in want]
    assert keep_probability(loss, history, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_rows_that_are_not_finite_do_not_shift_the_ranks() -> None:
    loss = torch.tensor([NAN, 1.0, float("inf"), 2.0])
    found = keep_probability(loss, torch.empty(0), 1.0)
    assert found[1] == 0.5 and found[3] == 1.0 and bool(torch.isnan(found[[0, 2]]).all())


def test_a_flipped_sign_would_prefer_small_losses() -> None:
    kept, selector = torch.zeros(4), Selector(SelectiveBackprop(beta=3.0))
    for _ in range(400):
        kept += selector.select(Signals(loss=torch.tensor([1.0, 2.0, 3.0, 4.0])), keep=2).weights
    assert kept.sum() == 800
    assert kept[0] < 20 < kept[1] < kept[2] < kept[3]


def test_the_exact_draw_has_the_odds_of_drawing_one_row_after_the_other() -> None:
    odds = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    generator, pairs, draws = torch.Generator().manual_seed(0), [0, 0, 0], 4000
    for _ in range(draws):
        left_out = weighted_rows(odds, 2, torch.arange(3), generator).argmin()
        pairs[int(left_out)] += 1
    # Row 0 is left out if 1 and 2 come first: 2 * (1/4 * (1/4)/(3/4)) = 1/6; the others share 5/6.
    for count, share in zip(pairs, (1 / 6, 5 / 12, 5 / 12), strict=True):
        assert abs(count - draws * share) < 4 * math.sqrt(draws * share * (1 - share))


def test_the_papers_draw_keeps_each_row_with_its_probability() -> None:
    selector, draws = Selector(SelectiveBackprop(beta=1.0, exact=False)), 2000
    loss, kept = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.zeros(4)
    counts = set()
    for _ in range(draws):
        weights = selector.select(Signals(loss=loss), keep=1).weights
        kept += weights
        counts.add(int(weights.sum()))
    share = torch.tensor([1.0, 0.25, 0.75, 0.5])
    error = (share * (1 - share) / draws).sqrt()
    assert bool(((kept / draws - share).abs() <= 4 * error).all())
    assert counts == {1, 2, 3, 4}


def test_the_history_is_first_in_first_out_in_the_order_of_the_ids() -> None:
    strategy = SelectiveBackprop(capacity=4)
    state = strategy.init()
    for ids, loss in (([2, 1, 3], [20.0, 10.0, NAN]), ([9, 7, 8], [90.0, 70.0, 80.0])):
        signals = Signals(ids=torch.tensor(ids), loss=torch.tensor(loss))
        generator = torch.Generator().manual_seed(0)
        _, state = strategy.select(signals, state, keep=1, step=0, generator=generator)
    assert state["history"].tolist() == [20.0, 70.0, 80.0, 90.0]


def test_the_history_moves_the_ranks() -> None:
    selector = Selector(SelectiveBackprop(beta=1.0))
    selector.select(Signals(loss=torch.tensor([1.0, 1.0, 1.0])))
    scores = selector.select(Signals(loss=torch.tensor([0.5, 2.0]))).scores
    assert scores.tolist() == [1 / 5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1.0}, r"SelectiveBackprop: beta must be finite and >= 0, got -1\.0\. Use 1 to"),
        ({"beta": NAN}, r"SelectiveBackprop: beta must be finite and >= 0, got nan\. "),
        ({"capacity": 0}, r"SelectiveBackprop: capacity must be at least 1, got 0\. Say how"),
    ],
)
def test_errors(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveBackprop(**arguments)
