from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel.rl.prompts import PromptPool, PromptSampler, beta_moments, shuffled
from onlinesel.rl.thompson import Thompson
from onlinesel.rl.uniform_prompts import UniformPrompts
from onlinesel.types import State


@dataclass(frozen=True)
class ById(PromptSampler):
    """Want the problems of the highest numbers, or of the highest tens."""

    floor: float = 0.0
    candidates: int | None = None
    step: int = 1

    def scores(
        self, ids: Tensor, state: State, *, trials: int, generator: torch.Generator
    ) -> Tensor:
        return (ids // self.step).double()

    def observe(self, ids: Tensor, successes: Tensor, trials: Tensor, state: State) -> State:
        return {"ids": ids, "successes": successes, "trials": trials}


def test_moments_by_hand() -> None:
    mean, std = beta_moments(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]))
    assert mean.tolist() == [0.25, 0.75]
    assert std.tolist() == pytest.approx([(3 / 80) ** 0.5] * 2)


def test_the_highest_scores_are_proposed_highest_first() -> None:
    pool = PromptPool(ById(), 10, trials=8)
    assert pool.propose(3).tolist() == [9, 8, 7]
    assert pool.propose(3, taken=torch.tensor([8, 6])).tolist() == [9, 7, 5]


def test_a_share_is_drawn_uniformly() -> None:
    pool, counts = PromptPool(ById(floor=0.25), 100, trials=8), torch.zeros(100)
    for _ in range(500):
        counts[pool.propose(8)] += 1
    # 2 of 8 anywhere: 500 * 2 / 100 = 10 each; some of the highest come twice over.
    assert counts[:92].mean().item() == pytest.approx(10, rel=0.1)
    assert counts[:92].min() > 0 and counts[99] > 490
    everywhere = PromptPool(ById(floor=1.0), 100, trials=8)
    counts = torch.bincount(torch.cat([everywhere.propose(8) for _ in range(500)]), minlength=100)
    assert counts.min() > 15 and counts.max() < 75


def test_few_candidates_are_compared_and_none_twice() -> None:
    # With one each there is no choice: uniform. With 4, the best quarter of what was drawn.
    one = torch.cat([PromptPool(ById(candidates=1), 100, trials=8, seed=s).propose(10)
                     for s in range(200)])  # fmt: skip
    assert one.float().mean().item() == pytest.approx(49.5, abs=3)
    four = [PromptPool(ById(candidates=4), 100, trials=8, seed=s).propose(10) for s in range(200)]
    assert all(ids.min() >= 30 and len(ids.unique()) == 10 for ids in four)
    # The best 10 of 40 drawn from 100 lie at 101 * (31 ... 40) / 41, less one.
    assert torch.cat(four).float().mean().item() == pytest.approx(101 * 35.5 / 41 - 1, abs=1)
    # Fewer are left than would be compared.
    pool = PromptPool(ById(candidates=4), 12, trials=8)
    assert pool.propose(5).tolist() == [11, 10, 9, 8, 7]


def test_problems_of_equal_scores_have_equal_chances() -> None:
    pool = PromptPool(ById(step=1000), 40, trials=8)
    counts = torch.bincount(torch.cat([pool.propose(4) for _ in range(400)]), minlength=40)
    assert counts.min() > 20 and counts.max() < 65  # 40 each, standard deviation 6


def test_shuffled_rows_are_those_of_the_mask() -> None:
    free = torch.tensor([True, False, True, True, False])
    orders = {tuple(shuffled(free, torch.Generator().manual_seed(s)).tolist()) for s in range(60)}
    assert len(orders) == 6 and all(sorted(order) == [0, 2, 3] for order in orders)


def test_counts_reach_the_sampler_as_float64() -> None:
    pool = PromptPool(ById(), 10, trials=8)
    pool.observe(torch.tensor([3, -1, 4], dtype=torch.int32), torch.tensor([5.0, 8.0, 0.0]),
                 torch.tensor([8, 8, 7]))  # fmt: skip
    state = pool.state_dict()
    assert state["sampler.ids"].tolist() == [3, 4]
    assert state["sampler.ids"].dtype == torch.int64
    for name, value in (("successes", [5.0, 0.0]), ("trials", [8.0, 7.0])):
        assert state[f"sampler.{name}"].dtype == torch.float64
        assert state[f"sampler.{name}"].tolist() == value


def test_the_table_by_hand() -> None:
    pool = PromptPool(Thompson(discount=1.0), 3, trials=8)
    pool.observe(torch.tensor([2, 0, 2]), torch.tensor([8, 2, 8]), torch.full((3,), 8), step=7)
    pool.observe(torch.tensor([0]), torch.tensor([0]), torch.tensor([4]), step=9)
    pool.observe(torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))  # outside a run
    mean, std = 4 / 16, (4 / 16 * 12 / 16 / 17) ** 0.5
    assert pool.table() == [
        {"id": 0, "rate": mean, "std": pytest.approx(std), "visits": 3, "last": 9},
        {"id": 1, "rate": 0.5, "std": pytest.approx(12**-0.5), "visits": 0, "last": None},
        {"id": 2, "rate": pytest.approx(17 / 18), "std": pytest.approx(((17 / 18**2) / 19) ** 0.5),
         "visits": 2, "last": 7},
    ]  # fmt: skip
    assert pool.metrics() == {"prompts_seen": pytest.approx(2 / 3)}
    unknown = PromptPool(UniformPrompts(), 1, trials=8).table()
    assert unknown == [{"id": 0, "rate": None, "std": None, "visits": 0, "last": None}]


def test_a_negative_count_asks_for_nothing() -> None:
    assert PromptPool(ById(), 3, trials=8).propose(-1).tolist() == []


@pytest.mark.parametrize("sampler", [Thompson, "Thompson", None])
def test_the_method_itself_is_asked_for(sampler: Any) -> None:
    message = r"^PromptPool: sampler must be a PromptSampler instance, got .*\. Pass the method"
    with pytest.raises(TypeError, match=message):
        PromptPool(sampler, 3, trials=8)


@pytest.mark.parametrize(("prompts", "trials", "name"), [(0, 8, "prompts"), (3, 0, "trials")])
def test_errors_of_the_pool(prompts: int, trials: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^PromptPool: {name} must be at least 1, got 0\. Pass"):
        PromptPool(Thompson(), prompts, trials=trials)


@pytest.mark.parametrize(("successes", "text"), [([3.0, 9.0], "9 of 8"), ([-1.0, 3.0], "-1 of 8")])
def test_impossible_counts(successes: list[float], text: str) -> None:
    pool = PromptPool(Thompson(), 3, trials=8)
    before = pool.state_dict()
    message = rf"^PromptPool: successes must be between 0 and trials, got {text}\. Count right"
    with pytest.raises(ValueError, match=message):
        pool.observe(torch.tensor([0, 1]), torch.tensor(successes), torch.tensor([8, 8]))
    after = pool.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_state_of_another_data_set() -> None:
    pool, other = PromptPool(Thompson(), 3, trials=8), PromptPool(Thompson(), 4, trials=8)
    before = pool.state_dict()
    message = r"^PromptPool: state must be of 3 problems, got 4\. Resume with the data set"
    with pytest.raises(ValueError, match=message):
        pool.load_state_dict(other.state_dict())
    after = pool.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match=message):
        PromptPool(Thompson(), 3, trials=8, state=other.state_dict())
