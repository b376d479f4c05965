from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel import Chain, Selector, Signals, Strategy, When
from onlinesel.rl.gates import PassRateBand, ZeroVariance, count_outcomes
from onlinesel.types import Selection

NAN, INF = float("nan"), float("inf")


def select(gate: Strategy, *groups: list[float], step: int = 0) -> Selection:
    """Ask the gate itself: a Selector takes the weight off rows without a reward."""
    sizes = torch.tensor([len(group) for group in groups])
    signals = Signals(
        reward=torch.tensor([value for group in groups for value in group]),
        group=torch.arange(len(groups)).repeat_interleave(sizes),
    )
    return gate.select(signals, {}, keep=1, step=step, generator=torch.Generator())[0]


def passing(gate: Strategy, generations: int, step: int = 0) -> list[int]:
    """Return the numbers of successes with which a group passes, asking with groups."""
    groups = [[1.0] * k + [0.0] * (generations - k) for k in range(generations + 1)]
    weights = select(gate, *groups, step=step).weights.view(-1, generations)
    return weights[:, 0].nonzero().flatten().tolist()


def test_counts_by_hand() -> None:
    reward = torch.tensor([1.0, NAN, 0.0, 1.0, 1.0, NAN])
    group = torch.tensor([2**40, -3, -3, 2**40, -3, 8])
    successes, trials, where = count_outcomes(reward, group)
    assert successes.tolist() == [1.0, 0.0, 2.0] and trials.tolist() == [2.0, 0.0, 2.0]
    assert where.tolist() == [2, 0, 0, 2, 0, 1]
    assert successes.dtype == trials.dtype == torch.float32


@pytest.mark.parametrize(
    ("gate", "generations", "counts"),
    [
        (ZeroVariance(), 8, [1, 2, 3, 4, 5, 6, 7]),
        (ZeroVariance(), 2, [1]),
        (ZeroVariance(), 1, []),
        (ZeroVariance(tolerance=1.0), 8, []),
        (PassRateBand(0.25, 0.75), 8, [2, 3, 4, 5, 6]),
        (PassRateBand(0.25, 0.75, inclusive=False), 8, [3, 4, 5]),
        (PassRateBand(0.25, 0.75), 16, list(range(4, 13))),
        (PassRateBand(0.0, 1.0), 8, [1, 2, 3, 4, 5, 6, 7]),
        (PassRateBand(0.0, 1.0, inclusive=False), 8, [1, 2, 3, 4, 5, 6, 7]),
        (PassRateBand(0.0, 0.75), 8, [1, 2, 3, 4, 5, 6]),
        (PassRateBand(0.25, 1.0), 8, [2, 3, 4, 5, 6, 7]),
        (PassRateBand(0.5, 0.5), 8, [4]),
        (PassRateBand(0.5, 0.5), 5, []),
        (PassRateBand(0.5, 0.5, inclusive=False), 8, []),
        (PassRateBand(0.25, 0.75), 1, []),
        # 1 - (1 - 0.1) is not 0.1: the bounds must be those that were given.
        (PassRateBand(0.0, 0.1), 10, [1]),
        (PassRateBand(0.1, 0.3, inclusive=False), 10, [2]),
        (PassRateBand(1 / 3, 2 / 3), 3, [1, 2]),
    ],
)
def test_which_counts_pass(gate: Any, generations: int, counts: list[int]) -> None:
    assert passing(gate, generations) == counts == gate.possible(generations)


@pytest.mark.parametrize("generations", [2, 3, 5, 8, 10, 12, 16, 20, 48, 64])
def test_bounds_on_the_grid_pass_if_and_only_if_they_are_inclusive(generations: int) -> None:
    for k in range(1, generations):
        bound = k / generations
        assert k in PassRateBand(bound, 1.0).possible(generations)
        assert k in PassRateBand(0.0, bound).possible(generations)
        assert k not in PassRateBand(bound, 1.0, inclusive=False).possible(generations)
        assert k not in PassRateBand(0.0, bound, inclusive=False).possible(generations)


@pytest.mark.parametrize(
    ("gate", "generations", "shares"),
    [
        (ZeroVariance(), 8, [0.337, 0.570, 0.942, 0.992]),
        (ZeroVariance(), 16, [0.560, 0.815, 0.997, 1.000]),
        (PassRateBand(0.25, 0.75), 8, [0.057, 0.187, 0.743, 0.930]),
        (PassRateBand(0.25, 0.75), 16, [0.007, 0.068, 0.754, 0.979]),
    ],
)
def test_share_of_groups_that_pass(gate: Any, generations: int, shares: list[float]) -> None:
    passes = passing(gate, generations)
    for p, share in zip((0.05, 0.1, 0.3, 0.5), shares, strict=True):
        found = sum(comb(generations, k) * p**k * (1 - p) ** (generations - k) for k in passes)
        assert found == pytest.approx(share, abs=6e-4)


def test_the_band_closes_linearly() -> None:
    gate = PassRateBand(0.25, 0.75, anneal=100)
    assert gate.band(0) == (0.0, 1.0) and gate.band(100) == gate.band(9999) == (0.25, 0.75)
    assert gate.band(40) == pytest.approx((0.1, 0.9), abs=1e-12)
    # One of eight is 0.125: it passes until step 50, and 2 of 16 at 0.25 from the start.
    assert passing(gate, 8, step=0) == passing(gate, 8, step=50) == [1, 2, 3, 4, 5, 6, 7]
    assert passing(gate, 8, step=51) == passing(gate, 8, step=200) == [2, 3, 4, 5, 6]
    assert gate.possible(8) == [2, 3, 4, 5, 6]
    assert PassRateBand(0.25, 0.75).band(0) == (0.25, 0.75)
    skewed = PassRateBand(0.0, 0.1, anneal=10)
    assert skewed.band(10) == (0.0, 0.1) and skewed.band(5) == pytest.approx((0.0, 0.55))


@given(
    low=st.floats(0, 1), high=st.floats(0, 1), anneal=st.integers(0, 50), step=st.integers(0, 60)
)
def test_the_band_only_narrows_and_ends_where_it_was_asked_to(
    low: float, high: float, anneal: int, step: int
) -> None:
    low, high = min(low, high), max(low, high)
    gate = PassRateBand(low, high, anneal=anneal)
    now, next_ = gate.band(step), gate.band(step + 1)
    assert 0 <= now[0] <= next_[0] + 1e-12 and next_[1] - 1e-12 <= now[1] <= 1
    assert gate.band(anneal) == (low, high)
    if anneal:
        assert gate.band(0) == (0.0, 1.0)


def test_rates_are_of_scorable_completions() -> None:
    # 1 of 3, whatever the five others would have been.
    group = [1.0, 0.0, 0.0, NAN, NAN, NAN, NAN, NAN]
    assert select(PassRateBand(0.25, 0.75), group).weights.tolist() == [1.0] * 8
    assert select(PassRateBand(0.4, 0.75), group).weights.tolist() == [0.0] * 8
    alone = [1.0, NAN, NAN, NAN]
    for gate in (ZeroVariance(), PassRateBand(0.0, 1.0)):
        assert select(gate, alone).weights.tolist() == [0.0] * 4
        assert select(gate, [NAN, NAN]).weights.tolist() == [0.0] * 2


def test_scores_are_what_was_compared() -> None:
    found = select(ZeroVariance(), [0.25, 0.75, NAN], [NAN, NAN, NAN])
    assert found.scores is not None and found.scores.tolist() == [0.5] * 3 + [-INF] * 3
    found = select(PassRateBand(), [1.0, 0.0, 0.0, NAN], [NAN, NAN, NAN, NAN])
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([1 / 3] * 4 + [0.0] * 4)


def test_tolerance_forgives_rounding() -> None:
    noise = [0.1 + 0.2, 0.3, 0.3]
    reward = torch.tensor(noise, dtype=torch.float64).float().tolist()
    reward[1] = torch.nextafter(torch.tensor(reward[0]), torch.tensor(1.0)).item()
    assert select(ZeroVariance(), reward).weights.tolist() == [1.0] * 3
    assert select(ZeroVariance(tolerance=1e-6), reward).weights.tolist() == [0.0] * 3
    # The bound itself does not pass.
    assert select(ZeroVariance(tolerance=0.5), [0.0, 0.5]).weights.tolist() == [0.0] * 2
    assert select(ZeroVariance(tolerance=0.5), [0.0, 0.75]).weights.tolist() == [1.0] * 2


def test_an_infinite_reward_is_no_spread() -> None:
    assert select(ZeroVariance(), [INF, 1.0, 1.0]).weights.tolist() == [0.0] * 3
    assert select(ZeroVariance(), [-INF, 1.0, 0.0]).weights.tolist() == [1.0] * 3
    signals = Signals(reward=torch.tensor([INF, 1.0]), group=torch.tensor([0, 0]))
    assert Selector(ZeroVariance()).select(signals).rows.tolist() == []


def test_graded_rewards_pass_by_their_spread_alone() -> None:
    # A mean inside a band says nothing: these are all equal.
    assert select(ZeroVariance(), [0.5, 0.5, 0.5]).weights.tolist() == [0.0] * 3
    assert select(ZeroVariance(), [0.4, 0.5, 0.6]).weights.tolist() == [1.0] * 3


@given(
    groups=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0, NAN]), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    ),
    low=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5]),
    high=st.sampled_from([0.5, 0.75, 1.0]),
    inclusive=st.booleans(),
)
def test_graded_outcomes_count_as_fractions_of_a_success(
    groups: list[list[float]], low: float, high: float, inclusive: bool
) -> None:
    """Against the exact mean of the decimal fractions that were written down."""
    wanted: list[float] = []
    for group in groups:
        known = [Fraction(str(value)) for value in group if value == value]
        mean = sum(known, Fraction(0)) / max(len(known), 1)
        bounds = Fraction(str(low)), Fraction(str(high))
        inside = bounds[0] <= mean <= bounds[1] if inclusive else bounds[0] < mean < bounds[1]
        wanted += [float(inside and len(set(known)) > 1)] * len(group)
    gate = PassRateBand(low, high, inclusive=inclusive)
    assert select(gate, *groups).weights.tolist() == wanted


def test_equal_graded_outcomes_do_not_pass_by_their_mean() -> None:
    gate = PassRateBand(0.25, 0.75)
    assert select(gate, [0.5] * 4, [0.4, 0.6] * 2).weights.tolist() == [0.0] * 4 + [1.0] * 4
    # The same mean on the bound, summed up in another order, passes or not for all alike.
    assert select(gate, [0.15, 0.35] * 8, [0.35, 0.15] * 8).weights.tolist() == [1.0] * 32


@pytest.mark.parametrize("value", [1.5, -1.0, 2.0, INF])
def test_a_band_refuses_shaped_rewards(value: float) -> None:
    message = (
        rf"^PassRateBand: reward must be an outcome between 0 and 1, got {value:g}\. Name the "
        r"reward function that says right or wrong \(outcome=\), or say above which value an "
        r"answer is right \(success=\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        select(PassRateBand(), [1.0, 0.0], [NAN, value])


def test_gates_combine_as_strategies_do() -> None:
    def rows(strategy: Strategy, step: int) -> list[int]:
        reward: Tensor = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
        signals = Signals(reward=reward, group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        return Selector(strategy).select(signals, step=step).rows.tolist()

    later = When(PassRateBand(0.4, 0.6), start=50)
    assert rows(later, 49) == list(range(8)) and rows(later, 50) == [4, 5, 6, 7]
    assert rows(Chain(ZeroVariance(), later), 50) == [4, 5, 6, 7]


@pytest.mark.parametrize("tolerance", [-1e-9, NAN])
def test_errors_of_zero_variance(tolerance: float) -> None:
    message = rf"^ZeroVariance: tolerance must be at least 0, got {tolerance}\. Use 1e-6 to forgive"
    with pytest.raises(ValueError, match=message):
        ZeroVariance(tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.8, 0.2), r"low and high must be shares with .* <= 1, got 0\.8 and 0\.2\. Use 0\.25"),
        ((-0.1, 0.5), r"low and high must be shares with .* <= 1, got -0\.1 and 0\.5\. Use"),
        ((0.5, 1.1), r"low and high must be shares with .* <= 1, got 0\.5 and 1\.1\. Use"),
        ((NAN, 0.5), r"low and high must be shares with .* <= 1, got nan and 0\.5\. Use"),
        ((0.2, 0.8, True, -1), r"anneal must be at least 0 steps, got -1\. Leave it out"),
    ],
)
def test_errors_of_the_band(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match="^PassRateBand: " + message):
        PassRateBand(*arguments)
