from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.prompts import PromptPool, PromptSampler
from onlinesel.rl.shared_difficulty import SharedDifficulty
from onlinesel.rl.uniform_prompts import UniformPrompts
from tests.counting import Operations

TRIALS = 8
NAN = float("nan")
EVERY = SharedDifficulty(candidates=None, floor=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def observe(pool: PromptPool, ids: Tensor, rate: Tensor, seed: int = 0, times: int = 1) -> None:
    """Let problems be answered as often right as their rates say."""
    draws = generator(seed)
    for _ in range(times):
        right = torch.rand(len(ids), TRIALS, generator=draws) < rate[ids][:, None]
        pool.observe(ids, right.sum(dim=1), torch.full((len(ids),), TRIALS))


def beliefs(pool: PromptPool) -> tuple[Tensor, Tensor]:
    table = pool.table()
    return tuple(torch.tensor([row[name] for row in table]) for name in ("rate", "std"))  # type: ignore[return-value]


# Prediction ---------------------------------------------------------------------------------


def test_a_linear_rate_is_recovered_from_a_few_observations() -> None:
    x = torch.linspace(-1, 1, 101)[:, None]
    rate = 0.5 + 0.4 * x[:, 0]
    pool = PromptPool(EVERY, 101, trials=TRIALS, features=x)
    observe(pool, torch.tensor([0, 15, 35, 50, 65, 85, 100]), rate)
    believed, std = beliefs(pool)
    assert (believed - rate).abs().max() < 0.15 and (believed - rate).abs().mean() < 0.08
    observe(pool, torch.arange(0, 101, 10), rate, seed=1, times=30)
    believed, _ = beliefs(pool)
    unseen = torch.arange(101) % 10 != 0
    assert (believed - rate)[unseen].abs().max() < 0.06
    assert bool((std < 0.5).all())


@pytest.mark.parametrize("target", [0.3, 0.5])
def test_problems_near_the_target_are_proposed_though_never_seen(target: float) -> None:
    x = randn(400, 1)
    rate = (0.5 + 0.2 * x[:, 0]).clamp(0, 1)
    sampler = SharedDifficulty(target=target, candidates=None, floor=0.0)
    pool = PromptPool(sampler, 400, trials=TRIALS, features=x)
    seen = torch.arange(60)
    observe(pool, seen, rate, times=3)
    ids = pool.propose(20, taken=seen)
    assert ids.min() >= 60
    assert (rate[ids] - target).abs().max() < 0.1 < 0.15 < (rate - target).abs().mean()


def test_one_half_is_told_from_a_mixture_of_easy_and_hard() -> None:
    # Problems of the first kind are solved half of the time; of the second, half of the problems
    # always and half never, which no feature tells apart. Both kinds have mean rate one half.
    kind = (torch.arange(400) < 200).float()
    rate = torch.where(kind == 1, 0.5, (torch.arange(400) % 2).float())
    pool = PromptPool(EVERY, 400, trials=TRIALS, features=kind[:, None])
    for step in range(4):
        observe(pool, torch.arange(step, 400, 6), rate, seed=step)
    unseen = torch.tensor([row["visits"] for row in pool.table()]) == 0
    believed, std = beliefs(pool)
    first, second = unseen & (kind == 1), unseen & (kind == 0)
    assert int(first.sum()) > 40 and int(second.sum()) > 40
    assert believed[first].mean().item() == pytest.approx(0.5, abs=0.1)
    assert believed[second].mean().item() == pytest.approx(0.5, abs=0.1)
    assert std[first].max() < 0.25 and std[second].min() > 0.35
    ids = pool.propose(40, taken=(~unseen).nonzero().flatten())
    assert (kind[ids] == 1).float().mean() > 0.9


def state_of(sampler: SharedDifficulty, features: Tensor) -> dict[str, Tensor]:
    return sampler.init(len(features), features)


def learn(
    sampler: SharedDifficulty, state: dict[str, Tensor], *groups: tuple[int, float, float]
) -> dict[str, Tensor]:
    ids, successes, trials = zip(*groups, strict=True)
    counts = (torch.tensor(values, dtype=torch.float64) for values in (successes, trials))
    return sampler.observe(torch.tensor(ids), *counts, state)


def test_the_regressions_by_hand() -> None:
    # Without features the constant is all there is: one weight, ridge regression of a mean.
    sampler = SharedDifficulty(forgetting=0.9, half_life=None)
    state = learn(sampler, state_of(sampler, torch.zeros(3, 1)), (0, 6, 8), (1, 8, 8))
    keep, noise = 0.9**2, 0.15**2
    precision = keep + (1 - keep) + 2 / noise
    weight = (0.25 + 0.5) / noise / precision
    assert state["precision"].item() == pytest.approx(precision)
    assert state["moments"][0, 0].item() == pytest.approx(0.75 / noise)
    guess = 0.5 + weight
    errors = [6 * 5 / 56 - 2 * guess * 0.75 + guess**2, 1 - 2 * guess + guess**2]
    moment = sum(error - 0.05 for error in errors) / noise
    assert state["moments"][0, 1].item() == pytest.approx(moment)
    # The belief about the problem that was not seen: its prior.
    v = max(moment / precision + 0.05, 1e-6)
    s = min(max(guess * (1 - guess) / v - 1, 0.1), 8.0)
    mean, std = sampler.predict(state)
    assert mean[2].item() == pytest.approx(guess)
    assert std[2].item() == pytest.approx((guess * (1 - guess) / (s + 1)) ** 0.5)
    assert mean[0].item() == pytest.approx((s * guess + 6) / (s + 8))
    # A third group later: the old ones count 0.9.
    state = learn(sampler, state, (2, 0, 8))
    assert state["precision"].item() == pytest.approx(0.9 * precision + 0.1 + 1 / noise)
    assert state["moments"][0, 0].item() == pytest.approx((0.9 * 0.75 - 0.5) / noise)


def test_the_squared_error_has_no_bias_by_chance() -> None:
    # Groups of 4 of a problem of rate 0.3, guessed at 0.5: 0.04, not 0.04 + 0.21 / 4.
    size = 4000
    sampler = SharedDifficulty(target=0.5, forgetting=1.0)
    state = state_of(sampler, torch.zeros(size, 1))
    right = (torch.rand(size, 4, generator=generator()) < 0.3).sum(dim=1).double()
    # One regression knows already that the mean is 0.5, from as many problems of rate 0.7.
    both = torch.cat([right, 4 - right])
    ids = torch.arange(size).repeat(2)
    state = sampler.observe(ids, both, torch.full((2 * size,), 4.0).double(), state)
    weights = state["moments"] / state["precision"]
    assert weights[0, 0].item() == pytest.approx(0.0, abs=1e-9)
    assert weights[0, 1].item() + 0.05 == pytest.approx(0.04, abs=0.01)
    # A single completion cannot tell its own chance from the problem's: 0.04 + 0.21.
    single = torch.cat([(right > 2).double(), (right <= 2).double()])
    state = state_of(sampler, torch.zeros(size, 1))
    state = sampler.observe(ids, single, torch.ones(2 * size).double(), state)
    error = (state["moments"] / state["precision"])[0, 1].item() + 0.05
    assert error == pytest.approx(0.25, rel=1e-4)


@given(
    groups=st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5), min_size=1, max_size=4
    )
)
@settings(max_examples=30)
def test_graded_outcomes_against_every_pair_of_completions(groups: list[list[float]]) -> None:
    """The second regression sees the mean product of two different completions less the guess."""
    sampler, features = SharedDifficulty(candidates=None, components=1), randn(6, 1)
    ids = torch.arange(len(groups))
    outcomes = [torch.tensor(group, dtype=torch.float64) for group in groups]
    sums, squares = (torch.stack([(g**p).sum() for g in outcomes]) for p in (1, 2))
    sizes = torch.tensor([float(len(g)) for g in outcomes], dtype=torch.float64)
    before = state_of(sampler, features)
    after = sampler.observe(ids, sums, sizes, before, squares=squares)
    x = before["x"][ids].double()
    guess = x @ sampler._weights(after, None)[:, 0] + 0.5
    wanted = torch.zeros(2, dtype=torch.float64)
    for i, group in enumerate(groups):
        pairs = [a * b for j, a in enumerate(group) for k, b in enumerate(group) if j != k]
        square = sum(pairs) / len(pairs) if pairs else group[0]
        error = square - 2 * guess[i] * (sum(group) / len(group)) + guess[i] ** 2
        wanted += x[i] * (error - 0.05) / 0.15**2
    torch.testing.assert_close(after["moments"][:, 1], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after["successes"][ids], sums)
    torch.testing.assert_close(after["failures"][ids], sizes - sums)


def test_squares_of_right_and_wrong_are_the_outcomes_themselves() -> None:
    first, second = (PromptPool(EVERY, 5, trials=8, features=randn(5, 2)) for _ in range(2))
    ids, right = torch.tensor([0, 3, 4]), torch.tensor([0, 3, 8])
    first.observe(ids, right, torch.full((3,), 8))
    second.observe(ids, right, torch.full((3,), 8), squares=right)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_own_outcomes_override_a_wrong_prediction() -> None:
    x = torch.linspace(-1, 1, 51)[:, None]
    rate = 0.5 + 0.4 * x[:, 0]
    rate[25] = 0.0  # the features say one half
    pool = PromptPool(EVERY, 51, trials=TRIALS, features=x)
    others = torch.tensor([i for i in range(51) if i != 25])
    observe(pool, others, rate, times=3)
    believed, _ = beliefs(pool)
    assert believed[25].item() == pytest.approx(0.5, abs=0.08)
    assert 25 in pool.propose(25).tolist()
    found = []
    for seed in range(4):
        observe(pool, torch.tensor([25]), rate, seed=seed)
        found.append(beliefs(pool)[0][25].item())
    # Eight completions weigh as much as the prediction at its strongest.
    assert 0.2 < found[0] < 0.33 and found == sorted(found, reverse=True) and found[-1] < 0.15
    assert 25 not in pool.propose(25).tolist()
    assert beliefs(pool)[0][24].item() == pytest.approx(rate[24].item(), abs=0.1)


def test_a_weak_prediction_yields_sooner() -> None:
    for strength, rate in ((1.0, 0.5 / 9), (8.0, 4 / 16)):
        sampler = SharedDifficulty(strength=strength, half_life=None)
        state = {**state_of(sampler, torch.zeros(2, 1)), "failures": torch.tensor([8.0, 0.0])}
        # Nothing but the prior: rate one half with the error 0.05 that it starts from, s <= 4.
        mean, _ = sampler.predict(state)
        s = min(strength, 0.25 / 0.05 - 1)
        assert mean[0].item() == pytest.approx(0.5 * s / (s + 8))
        assert strength != 1.0 or mean[0].item() == pytest.approx(rate)


def test_own_outcomes_fade_with_every_scored_batch() -> None:
    sampler = SharedDifficulty(half_life=2.0)
    state = learn(sampler, state_of(sampler, torch.zeros(3, 1)), (0, 6, 8))
    assert (state["successes"][0].item(), state["failures"][0].item()) == (6.0, 2.0)
    for _ in range(2):
        state = learn(sampler, state, (1, 0, 8))
    assert state["successes"].tolist() == pytest.approx([3.0, 0.0, 0.0])
    assert state["failures"].tolist() == pytest.approx([1.0, 8 + 8 * 0.5**0.5, 0.0])
    lasting = SharedDifficulty(half_life=None)
    state = learn(lasting, state_of(lasting, torch.zeros(2, 1)), (0, 6, 8))
    for _ in range(5):
        state = learn(lasting, state, (1, 0, 8), (1, 8, 8))
    assert state["successes"].tolist() == [6.0, 40.0]


def test_a_regression_that_forgets_follows_the_policy() -> None:
    x = randn(60, 1)
    before, after = 0.5 + 0.15 * x[:, 0], 0.5 - 0.15 * x[:, 0]
    errors = {}
    for forgetting in (1.0, 0.99):
        sampler = SharedDifficulty(forgetting=forgetting, half_life=1.0)
        pool = PromptPool(sampler, 60, trials=TRIALS, features=x)
        observe(pool, torch.arange(30), before.clamp(0, 1), times=20)
        observe(pool, torch.arange(30), after.clamp(0, 1), times=10, seed=1)
        errors[forgetting] = (beliefs(pool)[0][30:] - after[30:]).abs().mean().item()
    assert errors[0.99] < 0.06 < 0.12 < errors[1.0]


# Odd data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [torch.zeros(20, 3), torch.full((20, 1), 0.1)])
def test_without_features_it_is_a_memory_of_its_own(features: Tensor) -> None:
    pool = PromptPool(EVERY, 20, trials=TRIALS, features=features)
    rate = torch.where(torch.arange(20) < 5, 0.5, 0.0)
    # With nothing to tell problems apart all have equal chances, not the first ones.
    firsts = torch.cat([
        PromptPool(EVERY, 20, trials=TRIALS, seed=s, features=features).propose(2)
        for s in range(200)
    ])  # fmt: skip
    assert torch.bincount(firsts, minlength=20).min() > 5
    observe(pool, torch.arange(20), rate, times=3)
    assert sorted(pool.propose(5).tolist()) == [0, 1, 2, 3, 4]


def test_one_problem() -> None:
    pool = PromptPool(SharedDifficulty(), 1, trials=TRIALS, features=randn(1, 5))
    assert pool.propose(4).tolist() == [0]
    pool.observe(torch.tensor([0]), torch.tensor([8]), torch.tensor([8]))
    assert pool.propose(1).tolist() == [0] and pool.table()[0]["rate"] > 0.7


def test_fewer_problems_than_components_and_wide_features() -> None:
    x = randn(6, 2000)
    pool = PromptPool(EVERY, 6, trials=TRIALS, features=x)
    rate = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.5])
    observe(pool, torch.arange(6), rate, times=5)
    believed, _ = beliefs(pool)
    assert (believed - rate).abs().max() < 0.2
    assert sorted(pool.propose(2).tolist()) == [2, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_the_dtype_of_the_features_does_not_matter(dtype: torch.dtype) -> None:
    x = (randn(40, 4) * 8).round()  # exact in all of them
    one, other = (
        PromptPool(EVERY, 40, trials=TRIALS, features=features) for features in (x, x.to(dtype))
    )
    for pool in (one, other):
        observe(pool, torch.arange(20), torch.sigmoid(x[:, 0]))
    assert one.propose(10).tolist() == other.propose(10).tolist()
    assert one.table() == other.table()


@given(
    groups=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 64)), min_size=1, max_size=40),
    forgetting=st.sampled_from([0.0, 0.5, 0.9995, 1.0]),
    outlier=st.sampled_from([1.0, 1e6, 1e30]),
)
def test_the_posterior_stays_regular(
    groups: list[tuple[int, int]], forgetting: float, outlier: float
) -> None:
    sampler = SharedDifficulty(forgetting=forgetting, candidates=None)
    features = randn(5, 3)
    features[0, 0] = outlier
    pool = PromptPool(sampler, 5, trials=64, features=features)
    for i, successes in groups:
        # The same problem many times in one call.
        size = 1 + successes
        pool.observe(
            torch.full((size,), i), torch.full((size,), successes), torch.full((size,), 64)
        )
        assert len(pool.propose(3)) == 3
    values = torch.linalg.eigvalsh(pool.state_dict()["sampler.precision"])
    assert values.min() > 1 - 1e-6
    rate, std = beliefs(pool)
    assert bool((torch.isfinite(rate) & (rate > 0) & (rate < 1) & (std > 0)).all())


def test_before_anything_is_known_the_choice_is_nearly_uniform() -> None:
    x, size = randn(64, 8), 64
    ids = [
        PromptPool(SharedDifficulty(), size, trials=TRIALS, seed=s, features=x).propose(4)
        for s in range(400)
    ]
    counts = torch.bincount(torch.cat(ids), minlength=size)  # 25 each
    assert counts.min() > 4 and counts.max() < 75


# As a whole ---------------------------------------------------------------------------------


def informative_share(sampler: PromptSampler, features: Tensor, rate: Tensor) -> float:
    """Return the share of mixed groups over 25 batches of 16."""
    pool, draws = PromptPool(sampler, len(rate), trials=TRIALS, features=features), generator(5)
    mixed = 0
    for _ in range(25):
        ids = pool.propose(16)
        right = (torch.rand(16, TRIALS, generator=draws) < rate[ids][:, None]).sum(dim=1)
        pool.observe(ids, right, torch.full((16,), TRIALS))
        mixed += int(((right > 0) & (right < TRIALS)).sum())
    return mixed / 400


def test_it_finds_the_problems_worth_rolling_out() -> None:
    # Four of five problems are hopeless; eight of forty features are a little larger in the rest.
    alive = torch.rand(2000, generator=generator(1)) < 0.2
    x = randn(2000, 40, seed=2)
    x[:, :8] += 1.5 * alive[:, None]
    rate = torch.where(alive, 0.5, 0.0)
    uniform = informative_share(UniformPrompts(), x, rate)
    assert uniform == pytest.approx(0.2, abs=0.06)
    assert informative_share(SharedDifficulty(), x, rate) > 0.7 > 3 * uniform
    # Where nothing in the prompt tells its difficulty, it does not do worse.
    blind = randn(2000, 40, seed=3)
    assert informative_share(SharedDifficulty(), blind, rate) > uniform - 0.03


def test_a_hundred_thousand_problems_take_milliseconds() -> None:
    """Counted: 121 operations on 35 elements a problem took 3 ms of a core."""
    size = 100_000
    pool = PromptPool(SharedDifficulty(), size, trials=TRIALS, features=randn(size, 8))
    ids = torch.arange(64)
    for _ in range(3):
        seen: Counter[str] = Counter()
        with Operations(seen):
            pool.propose(64)
            pool.observe(ids, torch.full((64,), 4), torch.full((64,), TRIALS))
        assert seen["operations"] <= 200 and seen["elements"] <= 50 * size, seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": -0.1}, r"target must be between 0 and 1, got -0\.1\. Leave it out"),
        ({"floor": 2}, r"floor must be between 0 and 1, got 2\. Leave it out"),
        ({"forgetting": NAN}, r"forgetting must be between 0 and 1, got nan\. Leave it out"),
        ({"components": 0}, r"components must be above 0, got 0\. Leave it out"),
        ({"strength": 0.0}, r"strength must be above 0, got 0\.0\. Leave it out"),
        ({"half_life": -1.0}, r"half_life must be above 0, got -1\.0\. Leave it out"),
        ({"candidates": 0}, r"candidates must be at least 1 or None, got 0\. Use None"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^SharedDifficulty: " + message):
        SharedDifficulty(**arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"a matrix of 3 rows, got None\. Give every problem one vector"),
        (torch.zeros(2, 4), r"a matrix of 3 rows, got \(2, 4\)\. Give"),
        (torch.zeros(3), r"a matrix of 3 rows, got \(3,\)\. Give"),
        (torch.zeros(3, 0), r"a matrix of 3 rows, got \(3, 0\)\. Give"),
        (torch.tensor([[0.0], [NAN], [float("inf")]]),
         r"finite, got others in 2 of 3 rows, the first is 1\. Leave these pro"),
    ],
)  # fmt: skip
def test_errors_of_the_features(features: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match="^SharedDifficulty: features must be " + message):
        PromptPool(SharedDifficulty(), 3, trials=TRIALS, features=features)
