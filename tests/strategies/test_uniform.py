from __future__ import annotations

import torch

from onlinesel import Selector, Signals
from onlinesel.strategies import Uniform
from onlinesel.strategies.uniform import uniform_rows
from onlinesel.weights import uniform_draws


def test_the_rows_with_the_smallest_draws_are_kept() -> None:
    ids = torch.tensor([5, 3, 9, 1])
    draws = uniform_draws(ids, torch.Generator().manual_seed(7))
    weights = uniform_rows(ids, 2, torch.Generator().manual_seed(7))
    assert weights.nonzero().flatten().tolist() == sorted(draws.argsort()[:2].tolist())


def test_every_row_is_kept_equally_often() -> None:
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(6), 3000
    for _ in range(draws):
        counts += uniform_rows(torch.arange(6), 2, generator)
    error = (draws * (1 / 3) * (2 / 3)) ** 0.5
    assert ((counts - draws / 3).abs() < 4 * error).all()


def test_with_one_candidate_a_row_every_row_trains_and_nothing_is_drawn() -> None:
    selector = Selector(Uniform())
    before = selector.state_dict()["tensors"]["generator"]
    assert selector.select(Signals(ids=torch.arange(3))).weights.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(before, selector.state_dict()["tensors"]["generator"])
