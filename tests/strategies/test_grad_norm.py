from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinesel import Selector, Signals
from onlinesel.strategies import GradNorm
from onlinesel.strategies.grad_norm import importance_probability, importance_weights

NAN = float("nan")


def test_a_flipped_sign_would_keep_the_smallest_norms() -> None:
    signals = Signals(grad_norm=torch.tensor([0.5, 2.0, 0.1, 1.0]))
    assert Selector(GradNorm()).select(signals, keep=2).rows.tolist() == [1, 3]


def test_the_signal_names_what_is_needed() -> None:
    strategy = GradNorm(signal="el2n")
    assert strategy.needs == ("el2n",) and GradNorm().needs == ("grad_norm",)
    signals = Signals(el2n=torch.tensor([0.5, 2.0]), grad_norm=torch.tensor([2.0, 0.5]))
    assert Selector(strategy).select(signals, keep=1).rows.tolist() == [1]
    assert Selector(GradNorm()).select(signals, keep=1).rows.tolist() == [0]


def test_the_mode_names_the_normaliser() -> None:
    assert (GradNorm().normalize, GradNorm(mode="unbiased").normalize) == ("tokens", "samples")


def test_odds_are_in_proportion_to_the_norm_with_a_uniform_share() -> None:
    norms, ids = torch.tensor([6.0, NAN, 2.0, 0.0]), torch.arange(4)
    assert importance_probability(norms, ids, 0.0).tolist() == [0.75, 0.0, 0.25, 0.0]
    mixed = [0.5 * 0.75 + 0.5 / 3, 0.0, 0.5 * 0.25 + 0.5 / 3, 0.5 / 3]
    assert importance_probability(norms, ids, 0.5).tolist() == pytest.approx(mixed)
    even = importance_probability(torch.tensor([0.0, 0.0, NAN, -1.0]), ids, 0.1)
    assert even.tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])


def test_the_odds_do_not_depend_on_the_order_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = 10 ** (torch.rand(30, generator=generator) * 30 - 15)
    ids = torch.randperm(30, generator=generator)
    odds = importance_probability(norms, ids, 0.1)
    for _ in range(30):
        moved = torch.randperm(30, generator=generator)
        assert torch.equal(importance_probability(norms[moved], ids[moved], 0.1), odds[moved])


def test_a_weight_is_the_count_over_the_expected_count() -> None:
    # Two pointers half a unit apart: row 0 is hit at least once, and row 1 at most once.
    odds = torch.tensor([0.75, 0.25], dtype=torch.float64)
    seen = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weights = importance_weights(odds, 2, torch.arange(2), generator)
        seen.add(tuple(round(w, 6) for w in weights.tolist()))
    assert seen == {(round(2 / 1.5, 6), 0.0), (round(1 / 1.5, 6), 2.0)}


def test_no_odds_give_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    assert importance_weights(torch.zeros(2), 3, torch.arange(2), generator).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_every_row_has_the_expected_weight_one(floor: float) -> None:
    norms = torch.tensor([0.1, 4.0, 1.0, 0.5, 2.0])
    draws = []
    for seed in range(3000):
        selector = Selector(GradNorm(mode="unbiased", floor=floor), seed=seed)
        draws.append(selector.select(Signals(grad_norm=norms), keep=3).weights)
    weights = torch.stack(draws).double()
    error = weights.std(dim=0) / len(draws) ** 0.5
    assert bool((error > 0).all())
    assert bool(((weights.mean(dim=0) - 1).abs() < 4 * error).all())


def test_the_estimated_mean_is_unbiased_and_better_than_uniform() -> None:
    norms = torch.tensor([0.1, 4.0, 1.0, 0.5, 2.0, 0.2, 0.3, 6.0])
    values = norms.double() * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    found: dict[float, torch.Tensor] = {}
    for floor in (0.0, 1.0):  # 1.0 draws uniformly
        estimates = []
        for seed in range(2000):
            selector = Selector(GradNorm(mode="unbiased", floor=floor), seed=seed)
            weights = selector.select(Signals(grad_norm=norms), keep=2).weights
            estimates.append((weights.double() * values).mean())
        found[floor] = torch.stack(estimates)
        error = found[floor].std() / 2000**0.5
        assert abs(found[floor].mean() - values.mean()) < 4 * error
    assert found[0.0].std() < 0.8 * found[1.0].std()


def test_unbiased_mode_never_trains_more_distinct_rows_than_draws() -> None:
    selector = Selector(GradNorm(mode="unbiased"))
    norms = torch.tensor([100.0, 1.0, 1.0, 1.0])
    for _ in range(50):
        assert 1 <= selector.select(Signals(grad_norm=norms), keep=3).rows.numel() <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signal": "loss"}, r"GradNorm: signal must be one of el2n, grad_norm, got 'loss'\. Lea"),
        ({"mode": "best"}, r"GradNorm: mode must be one of top, unbiased, got 'best'\. Leave"),
        ({"floor": 1.5}, r"GradNorm: floor must be in \[0, 1\], got 1\.5\. Use 0\.1"),
        ({"floor": NAN}, r"GradNorm: floor must be in \[0, 1\], got nan\. "),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradNorm(**arguments)
