from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel.mixing import ODM
from onlinesel.mixing.odm import exploration_rate

SIZES = torch.tensor([30, 10])


def rows(*values: float) -> Tensor:
    return torch.tensor(values)


def test_two_steps_by_hand() -> None:
    mixture = ODM(decay=0.5)
    state = mixture.init(SIZES)
    # eps_1 = min(1/2, sqrt(ln 2 / 2) = 0.5887) = 1/2: uniform.
    assert mixture.proportions(state).tolist() == [0.5, 0.5]
    state = mixture.observe(rows(0, 1, 0).long(), rows(2.0, 1.0, 4.0), state)
    # Rewards: half of 3 / 0.5 and half of 1 / 0.5.
    assert state["reward"].tolist() == [3.0, 1.0]
    # eps_2 = sqrt(ln 2 / 4) = 0.4162772992, eps_1 = 0.5: the softmax of 1.5 and 0.5 gives
    # 1 / (1 + e^-1) = 0.7310585786 to domain 0, of which 1 - 2 eps_2 = 0.1674454016 counts.
    first = 0.1674454016 * 0.7310585786 + 0.4162772992
    assert mixture.proportions(state).tolist() == pytest.approx([first, 1 - first])
    state = mixture.observe(rows(1).long(), rows(5.0), state)
    # Domain 0 has no row and keeps its reward; domain 1 is divided by its share.
    second = 0.5 * 1.0 + 0.5 * 5.0 / (1 - first)
    assert state["reward"].tolist() == pytest.approx([3.0, second])
    eps, before = math.sqrt(math.log(2) / 6), 0.4162772992
    share = 1 / (1 + math.exp(before * (second - 3.0)))
    assert mixture.proportions(state)[0].item() == pytest.approx((1 - 2 * eps) * share + eps)


def test_exploration_starts_uniform_and_fades() -> None:
    # Uniform while t <= K ln K, which is 5.5 for 4 domains and 68 for 22.
    assert [exploration_rate(t, 4) for t in (0, 1, 5)] == [0.25] * 3
    assert exploration_rate(6, 4) == pytest.approx(math.sqrt(math.log(4) / 24))
    assert exploration_rate(68, 22) == 1 / 22 > exploration_rate(69, 22)
    assert exploration_rate(10**6, 4) == pytest.approx(0.000588705, rel=1e-5)
    assert exploration_rate(3, 1) == 0.0


def test_one_domain_takes_all() -> None:
    mixture = ODM()
    state = mixture.init(torch.tensor([5]))
    for _ in range(3):
        assert mixture.proportions(state).tolist() == [1.0]
        state = mixture.observe(rows(0).long(), rows(2.0), state)


def test_no_domain_falls_below_the_exploration_rate() -> None:
    mixture = ODM(decay=0.0)
    state = mixture.init(SIZES)
    for _ in range(30):
        state = mixture.observe(rows(0, 1).long(), rows(900.0, 0.0), state)
    assert mixture.proportions(state)[1].item() == pytest.approx(exploration_rate(31, 2))


def test_the_warm_up_draws_as_told_and_gathers_rewards() -> None:
    mixture = ODM(decay=0.0, warmup=2, initial="size")
    state = mixture.init(SIZES)
    for _ in range(2):
        assert mixture.proportions(state).tolist() == [0.75, 0.25]
        state = mixture.observe(rows(0, 1).long(), rows(3.0, 2.0), state)
    assert state["reward"].tolist() == [4.0, 8.0]  # 3 / 0.75 and 2 / 0.25
    eps, before = math.sqrt(math.log(2) / 6), math.sqrt(math.log(2) / 4)
    share = 1 / (1 + math.exp(before * 4.0))
    assert mixture.proportions(state)[0].item() == pytest.approx((1 - 2 * eps) * share + eps)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1\.0\. Use 0\.9, or 0 for no memory\.$"),
        ({"decay": float("nan")}, r"decay must be in \[0, 1\), got nan"),
        ({"warmup": -1}, r"warmup must be at least 0 steps, got -1\. Use 0 for none, or 1 % of"),
        ({"initial": (0.0, 1.0)}, r"initial must be positive numbers, got \(0\.0, 1\.0\)\. Reward"),
        ({"initial": "sizes"}, "initial must be 'size', 'uniform' or one number per domain"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^ODM: {message}"):
        ODM(**kwargs)


def test_settings_must_fit_the_domains() -> None:
    with pytest.raises(ValueError, match=r"^ODM: initial must be one number per domain \(2\)"):
        ODM(initial=(1.0, 1.0, 1.0)).init(SIZES)
