"""What says right or wrong: several tasks, rules, graded outcomes, and completions without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer import grpo_trainer

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.rl import (
    MaxVariance,
    PassRateBand,
    Refill,
    SharedDifficulty,
    Thompson,
    UniformPrompts,
    ZeroVariance,
)
from tests.callbacks.grpo_hosts import (
    attach,
    code_ok,
    first_of_tasks,
    length_bonus,
    losses,
    make_grpo_trainer,
    math_ok,
    outcome,
    rows,
    spy,
    weights,
)
from tests.callbacks.hosts import arguments, make_model, make_tokenizer

TASKS = [math_ok, code_ok, length_bonus]
RIGHTS = (2, 1, 0, 3, 4, 2, 1, 0)
"""Problems 0, 3, 6 are sums, the others programs; mixed are 0, 1, 3, 5, 6."""


def merged(prompts: list[str], **kwargs: Any) -> list[float | None]:
    """The reference: one reward function over both tasks."""
    pairs = zip(math_ok(prompts, **kwargs), code_ok(prompts, **kwargs), strict=True)
    return [code if math is None else math for math, code in pairs]


def train(folder: Path, rewards: Any, setting: Mapping[str, Any], **parts: Any) -> Any:
    values = {"per_device_train_batch_size": 32, "max_steps": 1, **setting}
    trainer = make_grpo_trainer(folder, values.pop("rights", RIGHTS), rewards=rewards, **values)
    callback = attach(trainer, **parts) if parts else None
    made, before = spy(trainer), weights(trainer)
    trainer.train()
    return before - weights(trainer), losses(trainer), made, callback


@pytest.mark.parametrize(
    "which",
    [["math_ok", "code_ok"], ("code_ok", "math_ok"), [math_ok, "code_ok"], first_of_tasks],
    ids=["names", "turned", "function", "rule"],
)
def test_two_tasks_train_as_one_function_over_both_would(tmp_path: Path, which: Any) -> None:
    parts = {"gate": ZeroVariance()}
    found = train(tmp_path, TASKS, {}, outcome=which, **parts)
    wanted = train(tmp_path, [merged, length_bonus], {}, outcome="merged", **parts)
    assert rows(found[2][0]) == rows(wanted[2][0])
    assert len({row[0] for row in rows(found[2][0])}) == 5
    assert torch.equal(found[0], wanted[0]) and bool(found[0].any())
    assert found[1] == wanted[1]


def test_one_task_alone_is_told_that_the_other_never_trains(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"outcome \(math_ok\) is None for every .* 5 of 8 groups"):
        *_, made, _ = train(tmp_path, TASKS, {}, outcome="math_ok", gate=ZeroVariance())
    assert len({row[0] for row in rows(made[0])}) == 3


def test_a_sampler_sees_the_outcome_of_each_task(tmp_path: Path) -> None:
    *_, callback = train(
        tmp_path, TASKS, {}, outcome=["math_ok", "code_ok"], prompts=Thompson(discount=1.0)
    )
    rates = [row["rate"] for row in callback.prompt_table()]
    assert rates == pytest.approx([(1 + right) / 6 for right in RIGHTS])


def test_a_rule_reads_names_and_the_row(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, float | None], dict[str, Any]]] = []

    def rule(rewards: dict[str, float | None], row: Mapping[str, Any]) -> bool | None:
        seen.append((rewards, dict(row)))
        return None if row["rights"] == 2 else rewards["length_bonus"] > 0.35  # type: ignore[operator]

    with pytest.warns(UserWarning, match=r"rule\) is None for every completion of 2 of 8 groups"):
        *_, callback = train(tmp_path, TASKS, {}, outcome=rule, prompts=Thompson(discount=1.0))
    assert len(seen) == 32
    for rewards, row in seen:
        assert set(row) == {"prompt", "rights"}
        assert set(rewards) == {"math_ok", "code_ok", "length_bonus"}
        assert (rewards["math_ok"] is None) == (rewards["code_ok"] is not None)
    wanted = {}
    for rewards, row in seen:
        right, count = wanted.get(row["prompt"], (0, 0))
        known = row["rights"] != 2
        wanted[row["prompt"]] = right + (known and rewards["length_bonus"] > 0.35), count + known
    texts = callback.trainer.train_dataset["prompt"]
    table = {texts[row["id"]]: row for row in callback.prompt_table()}
    for prompt, (right, count) in wanted.items():
        assert table[prompt]["rate"] == pytest.approx((1 + right) / (2 + count))
    assert 0 < sum(right for right, _ in wanted.values()) < 24


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda rewards, row: rewards["color"], "outcome must be a number .* KeyError: 'color' on"),
        (lambda rewards, row: "good", "got ValueError: could not convert string .* on rank 0. Men"),
    ],
)
def test_a_rule_that_fails_ends_the_run(tmp_path: Path, rule: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"RolloutSelection: .*{message}"):
        train(tmp_path, TASKS, {}, outcome=rule, gate=ZeroVariance())


def test_functions_of_one_name_are_told_apart(tmp_path: Path) -> None:
    def other(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    other.__name__ = "outcome"
    for which, kept in (("outcome#1", 5), (outcome, 5), ("outcome#2", 0), (other, 0)):
        parts = {"outcome": which, "gate": ZeroVariance()}
        *_, made, _ = train(tmp_path, [outcome, other], {}, **parts)
        assert len({row[0] for row in rows(made[0])}) == kept


class Sums:
    """An environment that gives its own reward: every second of its answers is right."""

    every, asked = 2, 0

    def reset(self, **row: Any) -> None:
        return None

    def show(self, number: str) -> str:
        """Show a number.

        Args:
            number: Which one.

        Returns:
            It.
        """
        return number

    def get_reward(self) -> float:
        kind = type(self)
        kind.asked += 1
        return float(kind.asked % kind.every == 0)


class Programs(Sums):
    """Every fourth of its answers is right."""

    every, asked = 4, 0


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.filterwarnings("ignore:The tokenizer has a legacy:FutureWarning")
def test_environments_have_names_as_reward_functions_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL gives each environment class a reward column of its name, None on the others' rows."""

    def parsed(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, str]:
        return {"role": "assistant", "content": tokenizer.decode(ids)}

    monkeypatch.setattr(grpo_trainer, "parse_response", parsed)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% for t in m.tool_calls or [] %}"
        "{{ t.function.name }} {{ t.function.arguments }}{% endfor %}{% endfor %}"
        "{% for t in tools or [] %} w5{% endfor %}{% if add_generation_prompt %} w4{% endif %}"
    )
    tokenizer.response_schema = {"type": "object", "properties": {"content": {"type": "string"}}}
    names = ["sums", "programs"] * 4
    rows = [
        {"prompt": [{"role": "user", "content": f"w{2 + i}"}], "environment": name}
        for i, name in enumerate(names)
    ]
    values = {
        "num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 4,
        "bf16": False, "gradient_checkpointing": False, "max_steps": 4,
    }  # fmt: skip
    trainer = grpo_trainer.GRPOTrainer(
        make_model(),
        reward_funcs=None,
        args=grpo_trainer.GRPOConfig(**arguments(tmp_path, **values)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory={"sums": Sums, "programs": Programs},
    )
    parts = {"gate": ZeroVariance(), "prompts": Thompson(discount=1.0)}
    callback = attach(trainer, **parts, outcome=["Sums", "Programs"])
    trainer.train()
    visited = 0
    for name, row in zip(names, callback.prompt_table(), strict=True):
        right = 2 if name == "sums" else 1
        wanted = (1 + right * row["visits"]) / (2 + 4 * row["visits"])
        assert row["rate"] == pytest.approx(wanted)
        visited += row["visits"]
    assert visited == 16


# Graded outcomes ----------------------------------------------------------------------------


def graded(completions: list[str], rights: list[float], **_: Any) -> list[float]:
    """The number of the completion as a share of what the problem is worth."""
    numbers = [int(text.split()[0].removeprefix("w")) - 10 for text in completions]
    return [min(number * right, 8) / 8 for number, right in zip(numbers, rights, strict=True)]


def means(rights: Any) -> list[float]:
    return [sum(min(number * right, 8) / 8 for number in range(4)) / 4 for right in rights]


def test_graded_outcomes_pass_a_band_by_their_mean(tmp_path: Path) -> None:
    pairs = zip(means(RIGHTS), RIGHTS, strict=True)
    wanted = [0.25 <= mean <= 0.6 and right > 0 for mean, right in pairs]
    *_, made, callback = train(tmp_path, graded, {}, gate=PassRateBand(0.25, 0.6))
    prompts = {tuple(callback.trainer.processing_class(row["prompt"])["input_ids"]): i
               for i, row in enumerate(callback.trainer.train_dataset)}  # fmt: skip
    kept = {prompts[row[0]] for row in rows(made[0])}
    assert kept == {i for i, passes in enumerate(wanted) if passes} and 0 < len(kept) < 8


def test_graded_outcomes_are_fractions_in_the_beliefs(tmp_path: Path) -> None:
    *_, callback = train(tmp_path, graded, {}, prompts=Thompson(discount=1.0))
    rates = [row["rate"] for row in callback.prompt_table()]
    assert rates == pytest.approx([(1 + 4 * mean) / 6 for mean in means(RIGHTS)], abs=1e-6)
    *_, callback = train(tmp_path, graded, {}, prompts=Thompson(discount=1.0), success=0.3)
    above = [sum(min(n * right, 8) / 8 > 0.3 for n in range(4)) for right in RIGHTS]
    rates = [row["rate"] for row in callback.prompt_table()]
    assert rates == pytest.approx([(1 + count) / 6 for count in above])


def test_squares_reach_the_regression(tmp_path: Path) -> None:
    *_, callback = train(tmp_path, graded, {}, prompts=SharedDifficulty())
    state = callback._maker.filler.pool.state_dict()
    x = state["sampler.x"].double()
    rate = torch.tensor(means(RIGHTS), dtype=torch.float64)
    precision = torch.eye(x.shape[1]).double() * 1.0 + x.T @ x / 0.15**2
    guess = x @ torch.linalg.solve(precision, x.T @ (rate - 0.5) / 0.15**2) + 0.5
    values = [[min(n * right, 8) / 8 for n in range(4)] for right in RIGHTS]
    products = [[v[i] * v[j] for i in range(4) for j in range(4) if i != j] for v in values]
    square = torch.tensor([sum(pairs) / 12 for pairs in products])
    error = square.double() - 2 * guess * rate + guess**2
    wanted = x.T @ (error - 0.05) / 0.15**2
    torch.testing.assert_close(state["sampler.moments"][:, 1], wanted, rtol=1e-4, atol=1e-4)


def test_uniform_prompts_take_rewards_of_any_kind(tmp_path: Path) -> None:
    def signed(completions: list[str], **kwargs: Any) -> list[float]:
        return [20.0 * value - 10.0 for value in outcome(completions, **kwargs)]

    parts = {"prompts": UniformPrompts(), "gate": ZeroVariance(), "refill": Refill()}
    *_, callback = train(tmp_path, signed, {"per_device_train_batch_size": 8}, **parts)
    assert sum(row["visits"] for row in callback.prompt_table()) >= 2
    with pytest.raises(ValueError, match="outcome must be between 0 and 1 for prompts=, got"):
        train(tmp_path, signed, {}, prompts=Thompson())


def test_a_band_for_graded_outcomes_alone_is_told(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path)
    with pytest.warns(UserWarning, match="no number of right answers out of 4 can pass PassRateB"):
        RolloutSelection(trainer, gate=PassRateBand(0.3, 0.45))


# Completions without an outcome -------------------------------------------------------------


def partly(completions: list[str], **kwargs: Any) -> list[float | None]:
    pairs = zip(completions, outcome(completions, **kwargs), strict=True)
    return [None if "w13" in text.split()[0] else value for text, value in pairs]


@pytest.mark.parametrize("parts", [{"gate": ZeroVariance()}, {"gate": PassRateBand(0.1, 0.9)}])
def test_a_completion_that_others_scored_keeps_the_trainers_advantage(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    """The gate drops nothing, so the step is TRL's own, bit for bit."""
    setting = {"rights": (2, 1, 2), "per_device_train_batch_size": 12}
    rewards = [partly, length_bonus]
    found = train(tmp_path, rewards, setting, outcome="partly", **parts)
    wanted = train(tmp_path, rewards, setting)
    assert rows(found[2][0]) == rows(wanted[2][0])
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    last = [row[2] for row in rows(found[2][0]) if row[1][0] == 13]
    assert len(last) == 3 and all(last)


def test_a_chosen_completion_without_an_outcome_keeps_its_advantage(tmp_path: Path) -> None:
    """Of three known outcomes and one unknown, all four are taken: the step is TRL's own."""
    setting = {"rights": (2, 1, 2), "per_device_train_batch_size": 12}
    rewards = [partly, length_bonus]
    found = train(tmp_path, rewards, setting, outcome="partly", rollouts=MaxVariance(4))
    wanted = train(tmp_path, rewards, setting)
    assert rows(found[2][0]) == rows(wanted[2][0]) and torch.equal(found[0], wanted[0])


def test_without_any_outcome_the_first_completions_are_taken(tmp_path: Path) -> None:
    setting = {"rights": (2, 1, 2), "per_device_train_batch_size": 12}

    def unknown(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    with pytest.warns(UserWarning, match="3 of 3 groups that other reward functions scored"):
        found = train(
            tmp_path, [unknown, length_bonus], setting, outcome="unknown", rollouts=MaxVariance(2)
        )
    # Two of each group; the advantages are those of a pair: +- 0.7071, or 0 if they are equal.
    assert [row[1][0] for row in rows(found[2][0])].count(10) == 3
    assert {row[1][0] for row in rows(found[2][0])} == {10, 11}
    sizes: dict[Any, list[tuple[int, float]]] = {}
    for prompt, answer, value in rows(found[2][0]):
        sizes.setdefault(prompt, []).append((len(answer), value))
    for (short, low), (long, high) in (sorted(pair) for pair in sizes.values()):
        wanted = 0.7071 * (long > short)
        assert (low, high) == pytest.approx((-wanted, wanted), abs=2e-3)


# Rewards of every kind that TRL takes -------------------------------------------------------


def as_generator(completions: list[str], **kwargs: Any) -> Iterator[float | None]:
    yield from outcome(completions, **kwargs)


def as_tensor(completions: list[str], **kwargs: Any) -> torch.Tensor:
    return torch.tensor(outcome(completions, **kwargs))


def as_array(completions: list[str], **kwargs: Any) -> Any:
    return as_tensor(completions, **kwargs).numpy()


async def as_map(completions: list[str], **kwargs: Any) -> Any:
    return map(float, outcome(completions, **kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [as_generator, as_tensor, as_array, as_map])
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_rewards_of_every_kind_are_taken(
    tmp_path: Path, function: Any, timeout: float | None
) -> None:
    parts = {"gate": ZeroVariance(), "reward_timeout": timeout}
    setting = {"per_device_train_batch_size": 16}
    found, wanted = (train(tmp_path, f, setting, **parts) for f in (function, outcome))
    assert rows(found[2][0]) == rows(wanted[2][0]) and torch.equal(found[0], wanted[0])


def test_a_generator_that_breaks_is_an_error_of_its_function(tmp_path: Path) -> None:
    def breaks(completions: list[str], **_: Any) -> Iterator[float]:
        yield 1.0
        raise KeyError("second answer")

    with pytest.raises(RuntimeError, match="'breaks' must return one.*KeyError: 'second answer'"):
        train(tmp_path, breaks, {}, gate=ZeroVariance())
