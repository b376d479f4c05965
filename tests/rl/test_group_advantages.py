from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.group_advantages import (
    deviations,
    group_advantages,
    sequence_advantages,
    total_rewards,
)

NAN = float("nan")
SETTINGS = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]
WEIGHTS = torch.tensor([0.7, 1.3])

each_setting = pytest.mark.parametrize(("scale", "aggregation"), SETTINGS)


def std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def test_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, NAN], [NAN, 1.0]])
    weights = torch.tensor([1.0, 0.5])
    total = [1.0, 1.0, 0.5, 0.5]
    assert total_rewards(rewards, weights).tolist() == total
    assert group_advantages(rewards, weights, 2).tolist() == [0.0] * 4
    batch = group_advantages(rewards, weights, 4, scale="group").tolist()
    wanted = [(r - 0.75) / (std(total) + 1e-4) for r in total]
    assert batch == pytest.approx(wanted, rel=1e-6)
    assert batch[0] > 0.5 > -0.5 > batch[3]  # a flipped sign fails
    plain = group_advantages(rewards, weights, 4, scale="none").tolist()
    assert plain == pytest.approx([0.25, 0.25, -0.25, -0.25])


def test_batch_scale_centres_by_group_and_divides_by_the_batch() -> None:
    rewards = torch.tensor([[1.0], [0.0], [4.0], [2.0]])
    found = group_advantages(rewards, torch.ones(1), 2, scale="batch").tolist()
    scale = std([1.0, 0.0, 4.0, 2.0]) + 1e-4
    assert found == pytest.approx([0.5 / scale, -0.5 / scale, 1 / scale, -1 / scale], rel=1e-6)


def test_normalize_then_sum_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 8.0], [0.0, 0.0], [0.0, 8.0]])
    found = group_advantages(
        rewards, torch.tensor([1.0, 0.5]), 2, aggregation="normalize_then_sum"
    ).tolist()
    first = 0.5 / (std([1.0, 0.0]) + 1e-4)
    second = 4.0 / (std([0.0, 8.0]) + 1e-4)
    summed = [first - second / 2, second / 2 - first, -second / 2, second / 2]
    wanted = [s / (std(summed) + 1e-4) for s in summed]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_unscored_completions_get_zero_and_no_part() -> None:
    rewards = torch.tensor([[1.0], [NAN], [0.0], [1.0]])
    found = group_advantages(rewards, torch.ones(1), 4)
    wanted = group_advantages(rewards[[0, 2, 3]], torch.ones(1), 3)
    assert found[1].item() == 0.0
    assert torch.equal(found[[0, 2, 3]], wanted)
    # Scored by one function of two: that one counts.
    rewards = torch.tensor([[1.0, NAN], [0.0, NAN], [3.0, NAN], [NAN, NAN]])
    partly = group_advantages(rewards, WEIGHTS, 4, aggregation="normalize_then_sum")
    assert partly[3].item() == 0.0 and partly[2] > 0.5 and partly[1] < -0.5
    # The only one that was scored has no deviation.
    for scale, aggregation in SETTINGS:
        lonely = torch.tensor([[1.0], [NAN], [NAN], [NAN]])
        arguments = {"scale": scale, "aggregation": aggregation}
        assert group_advantages(lonely, torch.ones(1), 2, **arguments).tolist() == [0.0] * 4
        nothing = torch.full((4, 2), NAN)
        assert group_advantages(nothing, WEIGHTS, 2, **arguments).tolist() == [0.0] * 4
        assert group_advantages(torch.ones(1, 2), WEIGHTS, 1, **arguments).tolist() == [0.0]


def naive(rewards: Tensor, weights: Tensor, size: int, scale: str, aggregation: str) -> Tensor:
    """The same definition, group by group and without any masking."""
    functions = [rewards[:, f] for f in range(rewards.shape[1])]
    if aggregation == "normalize_then_sum":
        functions = [
            torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in values.split(size)])
            for values in functions
        ]
    total = torch.stack(functions, dim=1) @ weights
    if aggregation == "normalize_then_sum":
        return (total - total.mean()) / (total.std() + 1e-4)
    centred = [g - g.mean() for g in total.split(size)]
    if scale == "none":
        return torch.cat(centred)
    groups = total.split(size)
    return torch.cat([
        c / ((g.std() if scale == "group" else total.std()) + 1e-4)
        for c, g in zip(centred, groups, strict=True)
    ])  # fmt: skip


value = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-2, 2, width=16))


@each_setting
@given(values=st.lists(value, min_size=24, max_size=24))
def test_against_a_naive_restatement(scale: str, aggregation: str, values: list[float]) -> None:
    rewards = torch.tensor(values, dtype=torch.float64).view(12, 2)
    found = group_advantages(rewards, WEIGHTS, 4, scale=scale, aggregation=aggregation)
    wanted = naive(rewards, WEIGHTS.double(), 4, scale, aggregation)
    # Bessel's correction is a quotient of integers, float32 as in TRL.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@given(
    values=st.lists(st.one_of(value, st.just(NAN)), min_size=24, max_size=24),
    seed=st.integers(0, 99),
    scaled=st.booleans(),
)
def test_groups_do_not_touch_each_other(values: list[float], seed: int, scaled: bool) -> None:
    rewards = torch.tensor(values).view(3, 4, 2)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))

    def advantages(groups: Tensor) -> Tensor:
        scale = "group" if scaled else "none"
        return group_advantages(groups.reshape(12, 2), WEIGHTS, 4, scale=scale).view(3, 4)

    together = advantages(rewards)
    assert bool(torch.isfinite(together).all())
    assert torch.equal(together[order], advantages(rewards[order]))


def trainer_advantages(folder: Path, scale: str, aggregation: str) -> tuple[Tensor, Tensor]:
    """Return what the reward functions of a real trainer said and the advantages it computed."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.callbacks.hosts import arguments, make_model, make_tokenizer

    given: list[list[float | None]] = []
    generator = torch.Generator().manual_seed(0)

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        values: list[float | None] = torch.rand(len(completions), generator=generator).tolist()
        # Holes: no score of this function; in row 5 of neither.
        for row in (1, 5) if not given else (5, 6, 8, 9, 10):
            values[row] = None
        given.append(values)
        return values

    def second(**everything: Any) -> list[float | None]:
        return reward(**everything)

    config = GRPOConfig(
        **arguments(folder, per_device_train_batch_size=12, bf16=False),
        num_generations=4,
        max_completion_length=3,
        reward_weights=WEIGHTS.tolist(),
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        make_model(),
        [reward, second],
        config,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w7"} for i in range(3, 9)]),
        processing_class=make_tokenizer(),
    )
    found = []
    original = trainer._generate_and_score_completions

    def spy(inputs: Any) -> Any:
        output = original(inputs)
        found.append(output["advantages"].clone())
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    assert len(found) == 1 and len(given) == 2
    columns = [[NAN if v is None else v for v in values] for values in given]
    return torch.tensor(columns).T.contiguous(), found[0]


@each_setting
def test_the_bits_are_those_of_trl(scale: str, aggregation: str, tmp_path: Path) -> None:
    rewards, wanted = trainer_advantages(tmp_path, scale, aggregation)
    assert int(torch.isnan(rewards).sum()) == 7 and wanted[5].item() == 0.0
    assert wanted.unique().numel() > 8
    found = group_advantages(rewards, WEIGHTS, 4, scale=scale, aggregation=aggregation)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_deviations_by_hand() -> None:
    rewards = torch.tensor([[2.0, 0.0, NAN, 7.0], [0.1, 0.1, 0.1, 0.1]])
    weights = torch.tensor([[3, 1, 5, 0], [3, 9, 5, 7]])
    deviation, squares = deviations(rewards, weights)
    assert deviation.tolist() == [[0.5, -1.5, 0.0, 0.0], [0.0] * 4]
    assert squares.tolist() == [[3 * 0.25 + 2.25], [0.0]]


@given(value=st.floats(-10, 10), counts=st.lists(st.integers(0, 99), min_size=3, max_size=3))
def test_equal_rewards_have_no_deviation_not_even_by_rounding(
    value: float, counts: list[int]
) -> None:
    for dtype in (torch.float32, torch.float64):
        deviation, squares = deviations(torch.full((1, 3), value, dtype=dtype),
                                        torch.tensor([counts]))  # fmt: skip
        assert deviation.tolist() == [[0.0] * 3] and squares.tolist() == [[0.0]]


def test_sequence_advantages_by_hand() -> None:
    rewards = torch.tensor([[3.0, 1.0, NAN, 9.0]])
    known = torch.tensor([[True, True, True, False]])
    wanted = [1 / (2**0.5 + 1e-6), -1 / (2**0.5 + 1e-6), 0.0, 0.0]
    assert sequence_advantages(rewards, known)[0].tolist() == pytest.approx(wanted, rel=1e-6)
    assert sequence_advantages(rewards, known, scale=False)[0].tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("generations", "arguments", "message"),
    [
        (2, {"scale": "groups"}, r"scale must be one of group, batch, none, got 'groups'\. Pass"),
        (2, {"aggregation": "sum"}, r"aggregation must be one of sum_then_.*, got 'sum'\. Pass"),
        (3, {}, r"generations must divide the number of rows \(4\), got 3\. Pass whole"),
        (0, {}, r"generations must divide the number of rows \(4\), got 0\. Pass whole"),
    ],
)
def test_errors(generations: int, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="^group_advantages: " + message):
        group_advantages(torch.ones(4, 1), torch.ones(1), generations, **arguments)
