from __future__ import annotations

from math import comb, exp, lgamma
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.prompts import PromptPool
from onlinesel.rl.thompson import InformativeProbability, Thompson, draw_beta

BOTH = pytest.mark.parametrize("method", [Thompson, InformativeProbability])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def beta_function(a: float, b: float) -> float:
    return exp(lgamma(a) + lgamma(b) - lgamma(a + b))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 2.0), (40.0, 3.0), (1.0, 1000.0)])
def test_draws_are_from_the_distribution(a: float, b: float) -> None:
    size = 20000
    draws = draw_beta(torch.full((size,), a), torch.full((size,), b), generator())
    assert draws.dtype == torch.float64 and 0 <= draws.min() and draws.max() <= 1
    mean, total = a / (a + b), a + b
    std = (mean * (1 - mean) / (total + 1)) ** 0.5
    assert draws.mean().item() == pytest.approx(mean, abs=4 * std / size**0.5)
    assert draws.std().item() == pytest.approx(std, rel=0.05)
    skewness = 2 * (b - a) * (total + 1) ** 0.5 / ((total + 2) * (a * b) ** 0.5)
    third = ((draws - mean) / std).pow(3).mean().item()
    assert third == pytest.approx(skewness, rel=0.15, abs=0.08)


def test_draws_are_the_generators_alone() -> None:
    a, b = torch.rand(5, generator=generator()), torch.rand(5, generator=generator(1))
    torch.manual_seed(5)
    first = draw_beta(a, b, generator(2))
    torch.manual_seed(6)
    assert torch.equal(draw_beta(a, b, generator(2)), first)
    # Both gamma draws are as small as they can be here; the quotient is still a number.
    tiny = torch.full((100,), 1e-5)
    assert bool(torch.isfinite(draw_beta(tiny, tiny, generator())).all())


@BOTH
def test_graded_outcomes_are_fractions_of_a_success(method: Any) -> None:
    pool = PromptPool(method(discount=0.5), 2, trials=4)
    for _ in range(2):
        pool.observe(torch.tensor([1]), torch.tensor([0.25 + 0.5 + 1 + 0]), torch.tensor([4]))
    # 1 + 1.75, then half of it, a half, and 1.75 again; failures 2.25 likewise.
    row = pool.table()[1]
    a, b = 0.5 * 2.75 + 0.5 + 1.75, 0.5 * 3.25 + 0.5 + 2.25
    assert row["rate"] == pytest.approx(a / (a + b))
    assert row["std"] == pytest.approx((a * b / ((a + b) ** 2 * (a + b + 1))) ** 0.5)


@BOTH
def test_the_posterior_by_hand(method: Any) -> None:
    sampler = method(discount=0.5)
    state = sampler.init(3)
    assert state["a"].tolist() == state["b"].tolist() == [1.0, 1.0, 1.0]
    state = sampler.observe(torch.tensor([0, 2]), counts(6, 0), counts(8, 8), state)
    # a <- 0.5 * 1 + 0.5 + 6, b <- 0.5 * 1 + 0.5 + 2; an unvisited problem stays.
    assert state["a"].tolist() == [7.0, 1.0, 1.0] and state["b"].tolist() == [3.0, 1.0, 9.0]
    state = sampler.observe(torch.tensor([0]), counts(1), counts(8), state)
    assert state["a"].tolist() == [5.0, 1.0, 1.0]  # 3.5 + 0.5 + 1
    assert state["b"].tolist() == [9.0, 1.0, 9.0]  # 1.5 + 0.5 + 7
    mean, std = sampler.predict(state)
    assert mean.tolist() == pytest.approx([5 / 14, 0.5, 0.1])
    assert std.tolist() == pytest.approx([(45 / 196 / 15) ** 0.5, 12**-0.5, (0.09 / 11) ** 0.5])


@BOTH
def test_without_discount_nothing_is_forgotten_and_with_zero_everything(method: Any) -> None:
    for discount, a, b in ((1.0, 8.0, 13.0), (0.0, 2.0, 9.0)):
        sampler = method(discount=discount)
        state = sampler.init(1)
        for successes in (6, 1):
            trials = 10 if successes == 6 else 9
            state = sampler.observe(torch.tensor([0]), counts(successes), counts(trials), state)
        assert state["a"].item() == a and state["b"].item() == b


@BOTH
def test_a_problem_that_comes_twice_fades_once_and_counts_twice(method: Any) -> None:
    sampler = method(discount=0.5)
    state = {"a": counts(5.0), "b": counts(3.0)}
    state = sampler.observe(torch.tensor([0, 0]), counts(2, 7), counts(8, 8), state)
    assert state["a"].item() == 2.5 + 0.5 + 9 and state["b"].item() == 1.5 + 0.5 + 7


@BOTH
@given(
    discount=st.floats(0, 1),
    visits=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), max_size=30),
)
def test_beliefs_never_fall_below_the_prior(
    method: Any, discount: float, visits: list[tuple[int, int]]
) -> None:
    sampler, total = method(discount=discount), 2.0
    state = sampler.init(1)
    for successes, trials in visits:
        successes = min(successes, trials)
        state = sampler.observe(torch.tensor([0]), counts(successes), counts(trials), state)
        total = discount * total + 2 * (1 - discount) + trials
        assert state["a"].item() >= 1 - 1e-9 and state["b"].item() >= 1 - 1e-9
        assert (state["a"] + state["b"]).item() == pytest.approx(total)


def test_problems_near_the_target_are_wanted() -> None:
    # Certain beliefs: the draws are the rates.
    rates = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    state = {"a": 1e7 * rates, "b": 1e7 * (1 - rates)}
    for target, best in ((0.5, [9, 8, 10]), (0.3, [5, 4, 6])):
        sampler = Thompson(target=target, floor=0.0, candidates=None)
        ids, _ = sampler.propose(
            3, state, free=torch.ones(19, dtype=torch.bool), trials=8, generator=generator()
        )
        assert ids[0] == best[0] and sorted(ids.tolist()) == sorted(best)
        scores = sampler.scores(torch.arange(19), state, trials=8, generator=generator())
        torch.testing.assert_close(scores, -(rates - target).square(), rtol=0, atol=2e-3)


def test_uncertain_problems_are_explored() -> None:
    # Of a problem at the target, a known bad one, and one of which nothing is known.
    state = {"a": counts(50, 1, 1), "b": counts(50, 30, 1)}
    sampler, first, draws = Thompson(floor=0.0, candidates=None), torch.zeros(3), generator()
    for _ in range(1000):
        free = torch.ones(3, dtype=torch.bool)
        ids, _ = sampler.propose(1, state, free=free, trials=8, generator=draws)
        first[ids] += 1
    assert first[0] > 700 and 50 < first[2] < 300 and first[1] < 10


def test_informative_by_hand() -> None:
    # Beta(1, 1): all right and all wrong have 1 / (G + 1) each.
    for trials in (2, 8, 16):
        value = InformativeProbability.informative(counts(1), counts(1), trials)
        assert value.item() == pytest.approx(1 - 2 / (trials + 1), rel=1e-12)
    assert InformativeProbability.informative(counts(3), counts(5), 1).item() == pytest.approx(0)


@given(a=st.floats(0.5, 200), b=st.floats(0.5, 200), trials=st.integers(1, 16))
def test_informative_is_the_beta_binomial_between_its_ends(a: float, b: float, trials: int) -> None:
    direct = sum(
        comb(trials, k) * beta_function(a + k, b + trials - k) / beta_function(a, b)
        for k in range(1, trials)
    )
    found = InformativeProbability.informative(counts(a), counts(b), trials).item()
    assert found == pytest.approx(direct, rel=1e-8, abs=1e-10) and found >= 0
    turned = InformativeProbability.informative(counts(b), counts(a), trials).item()
    assert turned == pytest.approx(found, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.7, 4.0), (20.0, 5.0), (1.0, 60.0)])
def test_informative_is_how_often_a_group_is_mixed(a: float, b: float) -> None:
    size, trials = 40000, 8
    rates = draw_beta(torch.full((size,), a), torch.full((size,), b), generator())
    answers = torch.rand(size, trials, generator=generator(1), dtype=torch.float64)
    right = (answers < rates[:, None]).sum(dim=1)
    mixed = ((right > 0) & (right < trials)).double().mean().item()
    value = InformativeProbability.informative(counts(a), counts(b), trials).item()
    assert mixed == pytest.approx(value, abs=4 * (value * (1 - value) / size) ** 0.5)


def test_informative_keeps_its_digits_for_many_counts() -> None:
    a, b = counts(1e6, 1.0), counts(1e6, 1e6)
    value = InformativeProbability.informative(a, b, 8)
    assert value[0].item() == pytest.approx(1 - 2 / 2**8, abs=1e-5)
    assert value[1].item() == pytest.approx(8e-6, rel=1e-3)
    # float32 beliefs are computed in float64.
    low = InformativeProbability.informative(a.float(), b.float(), 8)
    assert low[1].item() == pytest.approx(8e-6, rel=1e-3)


def test_problems_are_drawn_in_proportion() -> None:
    state = {"a": counts(1, 1, 8, 30), "b": counts(1, 9, 8, 1)}
    sampler, draws = InformativeProbability(floor=0.0, candidates=None), generator()
    value = sampler.informative(state["a"], state["b"], 8)
    size, first = 4000, torch.zeros(4, dtype=torch.float64)
    for _ in range(size):
        free = torch.ones(4, dtype=torch.bool)
        ids, _ = sampler.propose(1, state, free=free, trials=8, generator=draws)
        first[ids] += 1
    share = value / value.sum()
    assert ((first / size - share).abs() < 4 * (share / size).sqrt()).all()
    assert share.min() < 0.1 < 0.35 < share.max()  # the shares do differ


@BOTH
def test_a_problem_that_came_alive_is_found_again_through_the_floor(method: Any) -> None:
    def visits(floor: float) -> int:
        pool = PromptPool(method(floor=floor, candidates=None, discount=1.0), 200, trials=8)
        dead = torch.arange(100)
        for _ in range(40):
            pool.observe(dead, torch.zeros(100), torch.full((100,), 8))
        before = sum(row["visits"] for row in pool.table()[:100])
        for _ in range(50):
            ids = pool.propose(8)
            pool.observe(ids, torch.full((8,), 4), torch.full((8,), 8))
        return sum(row["visits"] for row in pool.table()[:100]) - before

    assert visits(0.0) < 20 and 25 < visits(0.2) < 75  # the floor gives 40


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (Thompson, {"target": 1.5}, r"target must be between 0 and 1, got 1\.5\. Leave it out"),
        (Thompson, {"discount": -0.1}, r"discount must be between 0 and 1, got -0\.1\. Leave"),
        (Thompson, {"floor": float("nan")}, r"floor must be between 0 and 1, got nan\. Leave"),
        (Thompson, {"candidates": 0}, r"candidates must be at least 1 or None, got 0\. Use None"),
        (InformativeProbability, {"discount": 2}, r"discount must be between 0 and 1, got 2\. "),
        (InformativeProbability, {"floor": -1.0}, r"floor must be between 0 and 1, got -1\.0\. "),
        (InformativeProbability, {"candidates": -4}, r"candidates must be at least 1 or None, got"),
    ],
)
def test_errors(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{method.__name__}: " + message):
        method(**arguments)
