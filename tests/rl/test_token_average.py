from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.group_advantages import sequence_advantages
from onlinesel.rl.token_average import TokenAverage, token_average
from onlinesel.rl.types import Advantages, Rollouts

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "hapo.json").read_text("utf-8"))
NAN = float("nan")

each_case = pytest.mark.parametrize("case", ["main", "fallback"])


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rewards and lengths by group, and the wanted advantages by token and by sequence."""
    golden = GOLDEN[case]
    assert golden["inputs"]["groups"] == [0, 0, 0, 0, 1, 1, 1, 1]
    rewards = torch.tensor(golden["inputs"]["rewards"], dtype=torch.float64).view(2, 4)
    mask = torch.tensor(golden["inputs"]["mask"]) > 0
    wanted = []
    for name in ("token_level", "sequence_level_grpo"):
        values = torch.tensor(golden["advantages"][name], dtype=torch.float64)
        # Constant over the tokens of a completion, as the (Q, G) result presumes.
        first = values[:, :1]
        assert torch.equal(torch.where(mask, values, first), first.expand_as(values))
        wanted.append(first.view(2, 4))
    return rewards, mask.sum(dim=1).view(2, 4), wanted[0], wanted[1]


def make(rewards: list[float], lengths: list[int]) -> Rollouts:
    values = torch.tensor([rewards])
    return Rollouts(values, values, torch.tensor([lengths]), longest=99)


@each_case
def test_golden_vectors(case: str) -> None:
    rewards, lengths, by_token, by_sequence = inputs(case)
    torch.testing.assert_close(token_average(rewards, lengths), by_token, rtol=1e-9, atol=0)
    found = sequence_advantages(rewards, lengths > 0)
    torch.testing.assert_close(found, by_sequence, rtol=1e-9, atol=1e-15)
    method: Advantages = TokenAverage()
    through = method.compute(Rollouts(rewards.float(), rewards.float(), lengths))
    assert through.dtype == torch.float32
    torch.testing.assert_close(through.double(), by_token, rtol=2e-5, atol=0)


@each_case
def test_the_golden_groups_fall_back_as_they_should(case: str) -> None:
    rewards, lengths, by_token, by_sequence = inputs(case)
    never = token_average(rewards, lengths, limit=float("inf"))
    for g, said in GOLDEN[case]["advantages"]["per_group"].items():
        row = int(g)
        found = token_average(rewards, lengths)[row]
        expected = by_sequence[row] if said["fallback_valid_tokens_only"] else never[row]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        largest = never[row].abs().max().item()
        assert largest == pytest.approx(said["max_abs_candidate"], rel=1e-9)
        summed = (found * lengths[row]).sum().item()
        assert summed == pytest.approx(said["token_sum_of_advantages"], rel=1e-9, abs=1e-12)


def test_by_hand() -> None:
    # 1 token of reward 1, 4 of reward 0: mean 0.2, deviation 0.4.
    found = TokenAverage().compute(make([1.0, 0.0], [1, 4]))
    assert found[0].tolist() == pytest.approx([0.8 / 0.400001, -0.2 / 0.400001], rel=1e-6)
    found = TokenAverage(scale=False).compute(make([1.0, 0.0], [1, 4]))
    assert found[0].tolist() == pytest.approx([0.8, -0.2], rel=1e-6)


def test_a_flipped_sign_would_punish_success() -> None:
    advantages = TokenAverage().compute(make([1.0, 0.0, 1.0], [3, 9, 4]))[0]
    assert advantages[0] > 0.5 and advantages[2] > 0.5 and advantages[1] < -0.5
    one_long = TokenAverage().compute(make([1.0, 0.0], [1, 40]))[0]  # falls back
    assert one_long.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


def test_the_limit_itself_falls_back() -> None:
    # One token in 26: (1 - f) / f = 25, so the largest advantage is 5 (less the epsilon).
    method = TokenAverage(limit=4.9999)
    high = method.compute(make([1.0, 0.0], [1, 25]))[0, 0].item()
    assert high == pytest.approx(0.5**0.5, rel=1e-5)
    method = TokenAverage(limit=5.0001)
    assert method.compute(make([1.0, 0.0], [1, 25]))[0, 0].item() == pytest.approx(5.0, rel=1e-4)
    # As far below: one failing token among 25 that are right.
    method = TokenAverage(limit=4.9999)
    low = method.compute(make([1.0, 0.0], [25, 1]))[0, 1].item()
    assert low == pytest.approx(-(0.5**0.5), rel=1e-5)


def test_without_scale_the_fallback_is_not_scaled_either() -> None:
    # Rewards of 0 and 20: the deviation from the token mean exceeds 5.
    found = TokenAverage(scale=False).compute(make([20.0, 0.0], [1, 3]))
    assert found[0].tolist() == [10.0, -10.0]


def test_rows_without_tokens_or_reward_take_no_part() -> None:
    plain = TokenAverage().compute(make([1.0, 0.0, 0.0], [2, 3, 4]))[0]
    found = TokenAverage().compute(make([1.0, 5.0, 0.0, NAN, 0.0], [2, 0, 3, 7, 4]))[0]
    assert found[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(found[[0, 2, 4]], plain)
    # Nor in the statistics of the fallback.
    plain = TokenAverage(limit=0.1).compute(make([1.0, 0.0, 0.0], [2, 3, 4]))[0]
    found = TokenAverage(limit=0.1).compute(make([1.0, 5.0, 0.0, NAN, 0.0], [2, 0, 3, 7, 4]))[0]
    assert torch.equal(found, torch.stack([plain[0], *plain.new_zeros(1), plain[1],
                                           *plain.new_zeros(1), plain[2]]))  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [
        ([NAN, NAN], [3, 4]),
        ([1.0, 0.0], [0, 0]),
        ([1.0, NAN], [3, 4]),
        ([1.0, 0.0], [3, 0]),
        ([0.1, 0.1], [3, 7]),  # 0.1 has a rounding error, the same in each
    ],
)
def test_groups_that_say_nothing_get_zero(rewards: list[float], lengths: list[int]) -> None:
    for method in (TokenAverage(), TokenAverage(scale=False), TokenAverage(limit=1e-30)):
        assert method.compute(make(rewards, lengths)).tolist() == [[0.0, 0.0]]


rewards = st.one_of(st.sampled_from([0.0, 1.0, NAN]), st.floats(-2, 2, width=32))
group = st.lists(st.tuples(rewards, st.integers(0, 50)), min_size=4, max_size=4)


@given(groups=st.lists(group, min_size=1, max_size=4), scale=st.booleans())
def test_the_advantages_sum_to_zero_over_the_tokens(groups: Any, scale: bool) -> None:
    values = torch.tensor([[r for r, _ in g] for g in groups], dtype=torch.float64)
    lengths = torch.tensor([[n for _, n in g] for g in groups])
    found = token_average(values, lengths, limit=float("inf"), scale=scale)
    assert bool(torch.isfinite(found).all())
    scaled = (found.abs() * lengths).sum(dim=1)
    assert bool(((found * lengths).sum(dim=1).abs() <= 1e-12 * scaled).all())


@given(groups=st.lists(group, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_groups_do_not_touch_each_other(groups: Any, seed: int) -> None:
    values = torch.tensor([[r for r, _ in g] for g in groups])
    lengths = torch.tensor([[n for _, n in g] for g in groups])
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    method = TokenAverage()
    together = method.compute(Rollouts(values, values, lengths))
    permuted = method.compute(Rollouts(values[order], values[order], lengths[order]))
    assert torch.equal(together[order], permuted)


@pytest.mark.parametrize("limit", [0.0, -1.0, NAN])
def test_errors(limit: float) -> None:
    with pytest.raises(ValueError, match=r"^TokenAverage: limit must be positive, got .*\. Use 5"):
        TokenAverage(limit=limit)


def test_what_the_host_must_know() -> None:
    assert not TokenAverage.needs_scores and not TokenAverage.per_sequence
