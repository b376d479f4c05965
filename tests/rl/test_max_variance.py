from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel import Selector, Signals
from onlinesel.rl.max_variance import MaxVariance, max_variance_rows
from onlinesel.types import Selection

NAN = float("nan")


def rows(reward: list[float], keep: int, ids: list[int] | None = None) -> list[int]:
    where = torch.tensor(ids) if ids else torch.arange(len(reward))
    return max_variance_rows(torch.tensor(reward), keep, where).nonzero().flatten().tolist()


def select(method: MaxVariance, signals: Signals) -> Selection:
    """Ask the strategy itself: a Selector takes the weight off rows without a reward."""
    return method.select(signals, {}, keep=1, step=0, generator=torch.Generator())[0]


def variance(values: Tensor) -> float:
    return values.double().var(correction=0).item()


def test_by_hand() -> None:
    assert rows([0.0, 0.25, 0.5, 1.0], 2) == [0, 3]
    # The third is the one further from the middle of the two.
    assert rows([0.0, 0.25, 0.5, 1.0], 3) == [0, 1, 3]
    assert rows([0.0, 0.5, 0.75, 1.0], 3) == [0, 2, 3]
    assert rows([5.0, 5.0, 5.0, 1.0], 2) == [0, 3]
    # Small differences on a large offset.
    assert rows([1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6 + 1], 3) == [0, 1, 3]


def test_outcomes_are_balanced_where_possible() -> None:
    assert rows([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 4) == [0, 1, 3, 4]
    assert rows([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], 4) == [0, 1, 2, 5]
    assert rows([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 4) == [0, 1, 2, 3]


def test_ties() -> None:
    # An odd number: more high rewards; whatever the scale and the rounding.
    for scale in (1.0, 0.1, 1 / 3, 1e-3):
        assert rows([0.0, scale, 0.0, scale], 3) == [0, 1, 3]
        assert rows([scale + 7, scale, scale + 7, scale], 3) == [0, 1, 2]
    # One row: the highest.
    assert rows([0.3, 0.1, 0.7, 0.7], 1) == [2]
    # Equal rewards: the lower ids, at both ends.
    assert rows([0.1] * 5, 3, [9, 3, 7, 1, 5]) == [1, 3, 4]
    assert rows([0.0, 1.0, 1.0, 0.0], 2, [9, 8, 2, 1]) == [2, 3]
    assert rows([0.0, 1.0, 1.0, 0.0], 4) == [0, 1, 2, 3]


def test_missing_rewards_fill_up_by_id() -> None:
    assert rows([NAN, 1.0, 0.0, 0.5], 2) == [1, 2]
    assert rows([NAN, 1.0, NAN, 0.5], 2) == [1, 3]
    assert rows([NAN, 1.0, NAN, NAN], 2, [9, 8, 3, 5]) == [1, 2]
    assert rows([NAN, NAN, NAN, NAN], 2, [9, 8, 3, 5]) == [2, 3]
    assert rows([float("inf"), 1.0, 0.0, float("-inf")], 2) == [1, 2]
    assert rows([float("inf"), NAN, float("-inf"), 1.0], 2) == [0, 3]


reward = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0]), st.floats(-3, 3, width=32), st.floats(-1e6, 1e6, width=32)
)


@given(
    rewards=st.lists(reward, min_size=1, max_size=9),
    keep=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_against_brute_force(rewards: list[float], keep: int, seed: int) -> None:
    keep = min(keep, len(rewards))
    values = torch.tensor(rewards)
    ids = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    chosen = max_variance_rows(values, keep, ids)
    assert int(chosen.sum()) == keep
    subsets = [values[list(subset)] for subset in combinations(range(len(rewards)), keep)]
    best = max(variance(subset) for subset in subsets)
    spread = (values.double().max() - values.double().min()).item()
    assert variance(values[chosen]) >= best - 1e-11 * spread**2
    # Of equal rewards the lower ids, and the same rows in whatever order they come.
    for value in values.unique():
        same = values == value
        taken = ids[same & chosen].tolist()
        assert sorted(taken) == sorted(ids[same].tolist())[: len(taken)]
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(max_variance_rows(values[order], keep, ids[order]), chosen[order])


@given(
    outcomes=st.lists(st.one_of(reward, st.just(NAN)), min_size=12, max_size=12),
    keep=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_group_keeps_exactly_that_many(outcomes: list[float], keep: int, seed: int) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    group = torch.tensor([2**40, 5, 7]).repeat_interleave(4)[order]
    values = torch.tensor(outcomes)
    weights = select(MaxVariance(keep), Signals(reward=values, group=group)).weights
    assert bool(((weights == 0) | (weights == 1)).all())
    for name in group.unique():
        mine = group == name
        assert int(weights[mine].sum()) == keep
        known = mine & torch.isfinite(values)
        if int(known.sum()) >= keep:
            assert bool((weights[mine & ~known] == 0).all())
        else:
            assert bool((weights[known] == 1).all())
        # The other groups play no part.
        alone = max_variance_rows(values[mine], keep, mine.nonzero().flatten())
        assert torch.equal(alone.float(), weights[mine])


def test_groups_may_differ_in_size_and_ids_decide() -> None:
    signals = Signals(
        ids=torch.tensor([5, 4, 3, 2, 1]),
        reward=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]),
        group=torch.tensor([0, 1, 0, 1, 1]),
    )
    selection = select(MaxVariance(2), signals)
    assert selection.weights.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert selection.scores is not None and torch.equal(selection.scores, signals.reward)


def test_through_a_selector_rows_without_a_reward_lose_their_weight() -> None:
    signals = Signals(
        reward=torch.tensor([1.0, NAN, NAN, 0.0, 1.0, 0.5]), group=torch.tensor([0, 0, 0, 1, 1, 1])
    )
    assert select(MaxVariance(2), signals).rows.tolist() == [0, 1, 3, 4]
    assert Selector(MaxVariance(2)).select(signals).rows.tolist() == [0, 3, 4]


def test_it_is_a_strategy_like_any_other() -> None:
    method = MaxVariance(4)
    assert repr(method) == "MaxVariance(keep=4)" and eval(repr(method)) == method
    assert method.needs == ("reward", "group") and method.init() == {}


@pytest.mark.parametrize("keep", [0, -3])
def test_errors_of_the_settings(keep: int) -> None:
    with pytest.raises(ValueError, match=r"^MaxVariance: keep must be at least 1, got .*\. Say"):
        MaxVariance(keep)


def test_a_group_that_is_too_small() -> None:
    signals = Signals(reward=torch.ones(5), group=torch.tensor([7, 7, 7, 9, 9]))
    message = (
        r"^MaxVariance: keep must be at most the size of every group, got 3 and 2 rows of group 9\."
        " Generate more"
    )
    with pytest.raises(ValueError, match=message):
        select(MaxVariance(3), signals)


@pytest.mark.parametrize("missing", ["reward", "group"])
def test_missing_signals(missing: str) -> None:
    given = {"reward": torch.ones(4), "group": torch.zeros(4, dtype=torch.int64)}
    del given[missing]
    with pytest.raises(ValueError, match=f"^MaxVariance: signals must hold '{missing}'"):
        select(MaxVariance(2), Signals(**given))
