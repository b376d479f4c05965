from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.rl.group_advantages import sequence_advantages
from onlinesel.rl.one_sided import OneSided, one_sided
from onlinesel.rl.types import Rollouts

NAN = float("nan")


def advantages(rewards: list[float], outcome: list[float]) -> torch.Tensor:
    size = len(rewards)
    given = Rollouts(torch.tensor([rewards]), torch.tensor([outcome]), torch.ones(1, size).long())
    return OneSided().compute(given)[0]


def test_by_hand() -> None:
    # Mean 0.7; the worst right answer has 0.6, which becomes the baseline of the right ones only.
    found = advantages([1.0, 0.6, 0.5], [1.0, 1.0, 0.0])
    std = torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64).std().item() + 1e-6
    assert found.tolist() == pytest.approx([0.4 / std, 0.0, -0.2 / std], rel=1e-5)


def test_a_mean_below_the_worst_right_answer_stays_the_baseline() -> None:
    found = advantages([1.0, 0.9, 0.0], [1.0, 1.0, 0.0])
    rewards = torch.tensor([[1.0, 0.9, 0.0]])
    wanted = sequence_advantages(rewards, rewards >= 0)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert found[0] > found[1] > 0 > found[2]


def test_a_group_that_is_all_right_is_measured_against_its_worst() -> None:
    found = advantages([0.75, 0.5, 1.0], [1.0, 1.0, 1.0])
    assert found.tolist() == pytest.approx([1.0, 0.0, 2.0], rel=1e-5)


def test_outcomes_as_rewards_are_plain_grpo() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = OneSided().compute(Rollouts(rewards, rewards, torch.ones(2, 4).long()))
    known = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(found, sequence_advantages(rewards, known), rtol=1e-5, atol=0)
    assert found[0, 0] > 0.5 and found[0, 1] < -0.5 and found[1].tolist() == [0.0] * 4


def test_a_wrong_answer_can_be_above_the_mean_and_does_not_move_the_baseline() -> None:
    # The wrong one has the larger reward (a bonus), the right one the smaller.
    found = advantages([0.9, 0.1], [0.0, 1.0])
    assert found.tolist() == pytest.approx([0.5**0.5, 0.0], rel=1e-4)


def test_unknown_outcomes_are_not_right_and_rewardless_rows_count_for_nothing() -> None:
    assert advantages([1.0, 0.0], [1.0, NAN])[1] < -0.5
    # Unknown, with the smallest reward: it would be the baseline of right answers if it were one.
    assert advantages([0.6, 1.0, 0.5], [1.0, 1.0, NAN])[0].item() == 0.0
    with_nan = advantages([1.0, NAN, 0.6, 0.5], [1.0, 1.0, 1.0, 0.0])
    assert with_nan[1].item() == 0.0
    without = advantages([1.0, 0.6, 0.5], [1.0, 1.0, 0.0])
    assert torch.equal(with_nan[[0, 2, 3]], without)


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [NAN, NAN, NAN], [NAN, 0.3, NAN]])
def test_groups_that_say_nothing_get_zero(rewards: list[float]) -> None:
    assert advantages(rewards, [1.0, 1.0, 0.0]).tolist() == [0.0] * 3


row = st.tuples(
    st.one_of(st.just(NAN), st.floats(-2, 2, width=32)), st.sampled_from([0.0, 1.0, NAN])
)
group = st.lists(row, min_size=4, max_size=4)


@given(groups=st.lists(group, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_properties(groups: Any, seed: int) -> None:
    rewards = torch.tensor([[r for r, _ in g] for g in groups])
    outcome = torch.tensor([[o for _, o in g] for g in groups])
    lengths = torch.ones_like(rewards).long()
    found = OneSided().compute(Rollouts(rewards, outcome, lengths))
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all())
    assert bool((found[outcome == 1] >= 0).all())
    # Never lower than GRPO's, and the same where the answer is not right.
    plain = sequence_advantages(rewards.double(), torch.isfinite(rewards)).float()
    assert bool((found >= plain).all())
    assert torch.equal(found[outcome != 1], plain[outcome != 1])
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    permuted = OneSided().compute(Rollouts(rewards[order], outcome[order], lengths))
    assert torch.equal(found[order], permuted)


def test_the_function_keeps_its_dtype() -> None:
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert one_sided(rewards, rewards == 1).dtype == torch.float64


def test_what_the_host_must_know() -> None:
    assert not OneSided.needs_scores and not OneSided.per_sequence
