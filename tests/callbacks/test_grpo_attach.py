"""Every setting that could not be exact is refused before the first step, with a remedy."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from onlinesel.callbacks._shared import versions as _versions
from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.callbacks.grpo.seams import moved_seams
from onlinesel.rl import (
    DRPO,
    HAPO,
    AdaptiveTemperature,
    MaxVariance,
    PassRateBand,
    Refill,
    SharedDifficulty,
    Thompson,
    ZeroVariance,
)
from onlinesel.strategies import TopLoss
from tests.callbacks.grpo_hosts import (
    attach,
    length_bonus,
    make_grpo_trainer,
    make_problems,
    outcome,
    rows,
    spy,
    word_parity,
)
from tests.callbacks.hosts import make_model, make_trainer


def test_the_trainers_own_parts_are_where_they_were() -> None:
    """On a new TRL, this names exactly what moved."""
    assert moved_seams(GRPOTrainer, sources=True) == []


def test_a_moved_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(GRPOTrainer):
        _calculate_rewards = None

        def _compute_loss(self, model: Any, batch: Any) -> Any:
            return batch["num_items_in_batch"]

    moved = moved_seams(Renamed)
    assert moved == ["method _calculate_rewards", "parameter inputs of _compute_loss"]
    sources = moved_seams(GRPOTrainer, sources=True)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: None)
    found = [what for what in moved_seams(GRPOTrainer, sources=True) if what not in sources]
    assert len(found) == 6 and all(what.endswith("in _compute_loss") for what in found)
    trainer = make_grpo_trainer(tmp_path)
    del trainer.epsilon_low
    with pytest.raises(ValueError, match=r"TRL must be a version .* without attribute epsilon_low"):
        RolloutSelection(trainer)


def test_an_old_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_grpo_trainer(tmp_path)
    monkeypatch.setattr(_versions, "version", lambda name: "1.15.9")
    with pytest.raises(ImportError, match=r"trl must be 1.16 or newer, got 1.15.9. Run pip"):
        RolloutSelection(trainer)


@pytest.mark.parametrize(
    ("setting", "parts", "message"),
    [
        (
            {},
            {"gate": PassRateBand(0.3, 0.45), "success": 0.5},
            "gate must be one that some number of right answers out of 4 can pass",
        ),
        ({}, {"gate": PassRateBand(0.5, 0.5, inclusive=False)}, "Widen the band, or raise num_gen"),
        ({}, {"gate": TopLoss()}, "gate must be a strategy on reward and group, got one that ne"),
        ({}, {"refill": Refill()}, "refill must be used with a gate, got no gate"),
        ({}, {"rollouts": MaxVariance(5)}, "rollouts must be a choice among the 4 completions"),
        (
            {"rewards": [outcome, length_bonus]},
            {"gate": ZeroVariance()},
            "outcome must be named for gate= with 2 reward functions, got None. Say which one",
        ),
        (
            {"rewards": [outcome, length_bonus]},
            {"gate": ZeroVariance(), "outcome": "correct"},
            "outcome must be one of outcome, length_bonus, got 'correct'",
        ),
        (
            {"rewards": [outcome, length_bonus, outcome]},
            {"gate": ZeroVariance(), "outcome": "outcome"},
            "outcome must be one of outcome#1, length_bonus, outcome#2, got 'outcome'. Functions "
            "of one name are counted in their order; or pass the function itself.",
        ),
        (
            {"rewards": [outcome, length_bonus]},
            {"gate": ZeroVariance(), "outcome": ()},
            "outcome must be one or several of outcome, length_bonus, got none",
        ),
        (
            {"rewards": [outcome, length_bonus]},
            {"gate": ZeroVariance(), "outcome": ["outcome", print]},
            "outcome must be among the trainer's reward functions, got print. Name it instead: out",
        ),
        (
            {"rewards": [outcome, length_bonus]},
            {"gate": ZeroVariance(), "outcome": word_parity},
            r"outcome must be a function that can be called with \(rewards by name, row\), got",
        ),
        (
            {"rights": (2, 2)},
            {"gate": ZeroVariance(), "refill": Refill()},
            "train_dataset must be of at least 4 problems for batches of 2, got 2",
        ),
        (
            {"rights": (2, 2), "shuffle_dataset": True},
            {"gate": ZeroVariance(), "refill": Refill()},
            "train_dataset must be of at least 3 problems for batches of 2, got 2",
        ),
        (
            {"rights": (2,)},
            {"prompts": Thompson()},
            "train_dataset must be of at least 2 problems for batches of 2, got 1",
        ),
        ({"loss_type": "cispo"}, {"tokens": HAPO()}, "loss_type must be one of grpo, bnpo, dr_gr"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "grpo"},
            {"tokens": HAPO()},
            "importance_sampling_level must be 'token' for token weights, got 'sequence'",
        ),
        ({"loss_type": "bnpo"}, {"advantages": DRPO()}, "loss_type must be one of grpo, dapo, dr_"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, setting: dict[str, Any], parts: dict[str, Any], message: str
) -> None:
    trainer = make_grpo_trainer(tmp_path, **setting)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=f"RolloutSelection: .*{message}|{message}"):
        RolloutSelection(trainer, **parts)
    assert trainer.__dict__ == before


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"gate": PassRateBand}, "gate must be of type Strategy, got <class"),
        ({"refill": 3}, "refill must be of type Refill, got 3"),
        ({"prompts": "thompson"}, "prompts must be of type PromptSampler, got 'thompson'"),
        ({"tokens": ZeroVariance()}, "tokens must be of type TokenWeights"),
        ({"advantages": HAPO()}, "advantages must be of type Advantages"),
        ({"temperature": 0.9}, "temperature must be of type AdaptiveTemperature"),
        ({"outcome": 3}, "outcome must be a name, several, or a function of .* got 3. Name the re"),
    ],
)
def test_parts_of_another_kind_are_refused(
    tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        RolloutSelection(make_grpo_trainer(tmp_path), **parts)


def test_other_trainers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer must be a TRL GRPOTrainer, got Trainer. Use on"):
        RolloutSelection(make_trainer(tmp_path))


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path)
    attach(trainer, gate=ZeroVariance())
    with pytest.raises(ValueError, match="trainer must be one without a RolloutSelection"):
        RolloutSelection(trainer)


def test_a_callback_that_was_not_added_is_told(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path)
    RolloutSelection(trainer, gate=ZeroVariance())
    with pytest.raises(ValueError, match="callback must be among the trainer's callbacks"):
        trainer.train()


def test_the_callback_of_another_trainer_is_refused(tmp_path: Path) -> None:
    mine, other = make_grpo_trainer(tmp_path / "mine"), make_grpo_trainer(tmp_path / "other")
    callback = RolloutSelection(mine)
    other.add_callback(callback)
    with pytest.raises(ValueError, match="RolloutSelection: trainer must be the one that the call"):
        other.train()
    assert other.state.global_step == 0


def test_a_stream_has_no_problems_to_ask_for(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path)
    trainer.train_dataset = Dataset.from_list(make_problems((2, 2, 2, 2))).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset must be one with row numbers for prompts="):
        RolloutSelection(trainer, prompts=Thompson())


def test_a_stream_can_be_gated(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, max_steps=1)
    stream = Dataset.from_list(make_problems((2, 0, 4, 2))).to_iterable_dataset()
    trainer.train_dataset = stream
    trainer.accelerator.dataloader_config.dispatch_batches = False
    attach(trainer, gate=ZeroVariance())
    made = spy(trainer)
    trainer.train()
    assert len(rows(made[0])) == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": {"attention_bias": True}}, None),
        ({"use_transformers_continuous_batching": True}, "continuous batching"),
    ],
)
def test_temperatures_need_the_trainers_own_generation(
    tmp_path: Path, setting: dict[str, Any], message: str | None
) -> None:
    setting = dict(setting)
    if "model" in setting:
        setting["model"] = make_model(**setting["model"])
    trainer = make_grpo_trainer(tmp_path, **setting)
    if message is None:
        RolloutSelection(trainer, temperature=AdaptiveTemperature())
        return
    with pytest.raises(ValueError, match=f"for temperature=, got {message}"):
        RolloutSelection(trainer, temperature=AdaptiveTemperature())


def test_temperatures_refuse_a_head_with_bias(tmp_path: Path) -> None:
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    trainer = make_grpo_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="a head without bias for temperature=, got a bias"):
        RolloutSelection(trainer, temperature=AdaptiveTemperature())


@pytest.mark.parametrize(
    ("attribute", "parts", "message"),
    [
        ("is_fsdp_enabled", {"prompts": SharedDifficulty()}, "features must be a column of the da"),
        ("is_deepspeed_enabled", {"prompts": SharedDifficulty()}, "features must be a column of"),
        (
            "is_deepspeed_enabled",
            {"gate": ZeroVariance(), "refill": Refill(on_short="skip")},
            "on_short must be partial, top_up or raise with DeepSpeed, got 'skip'",
        ),
    ],
)
def test_sharded_models_are_refused_where_they_would_fail(
    tmp_path: Path, attribute: str, parts: dict[str, Any], message: str
) -> None:
    trainer = make_grpo_trainer(tmp_path)
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=message):
        RolloutSelection(trainer, **parts)


def test_asynchronous_rewards_are_awaited(tmp_path: Path) -> None:
    """Also an object whose call is a coroutine, with some of its arguments bound."""

    class Judge:
        async def __call__(self, completions: list[str], bonus: float, **_: Any) -> list[float]:
            await asyncio.sleep(0)
            return [float(len(text.split()) % 2) + bonus for text in completions]

    judge = functools.partial(Judge(), bonus=0.0)
    trainer = make_grpo_trainer(tmp_path, max_steps=1, rewards=judge, known=False)
    attach(trainer, gate=ZeroVariance())
    made = spy(trainer)
    trainer.train()
    assert len(made) == 1


def test_the_import_says_what_is_missing() -> None:
    code = "import sys; sys.modules['trl'] = None; import onlinesel.callbacks.grpo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'needs TRL: pip install "onlinesel[trl]"' in done.stderr.splitlines()[-1]


def test_a_shaped_outcome_is_refused_when_it_shows(tmp_path: Path) -> None:
    """A single reward function may still return a shaped sum; that shows in its values."""

    def bonus(completions: list[str], **_: Any) -> list[float]:
        return [1.0 + 0.1 * len(text.split()) for text in completions]

    for parts in ({"gate": PassRateBand()}, {"prompts": Thompson()}):
        trainer = make_grpo_trainer(tmp_path, max_steps=1, rewards=bonus)
        attach(trainer, **parts)
        with pytest.raises(ValueError, match=r"(reward|outcome) must be .*0 and 1.*got 1\.\d"):
            trainer.train()


def test_success_turns_a_score_into_an_outcome(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, max_steps=1, rewards=length_bonus)
    callback = attach(trainer, prompts=Thompson(), success=0.35)
    made = spy(trainer)
    trainer.train()
    wanted = [len(answer) - 1 > 3 for _, answer, _ in rows(made[0])]  # without the end of text
    table = callback.prompt_table()
    rate = [row["rate"] for row in table if row["visits"]]
    assert 0 < sum(wanted) < 8
    assert sum(rate) / 2 == pytest.approx((sum(wanted) / 2 + 1) / 6, abs=1e-6)


def none_at_all(completions: list[str], **_: Any) -> Any:
    return None


def too_few(completions: list[str], **_: Any) -> Any:
    return [1.0]


def broken(completions: list[str], **_: Any) -> Any:
    raise KeyError("no such answer")


def words(completions: list[str], **_: Any) -> Any:
    return ["good"] * len(completions)


def slow(completions: list[str], **_: Any) -> Any:
    threading.Event().wait()  # for ever: that the run ends is the timeout's doing


async def slow_async(completions: list[str], **_: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (none_at_all, "TypeError: None instead of one reward for each of 8 completions on rank 0"),
        (too_few, "TypeError: 1 rewards instead of one reward for each of 8 completions"),
        (broken, "KeyError: 'no such answer' on rank 0. Mend it; for a completion"),
        (words, "ValueError: could not convert string to float"),
        (slow, "TimeoutError: no answer within 0.5 seconds"),
        (slow_async, "TimeoutError"),
    ],
)
def test_reward_functions_that_fail_end_the_run(
    tmp_path: Path, function: Any, message: str
) -> None:
    trainer = make_grpo_trainer(tmp_path, max_steps=1, rewards=function)
    limit = 0.5 if function in (slow, slow_async) else 60.0  # the others must not come near it
    attach(trainer, gate=ZeroVariance(), reward_timeout=limit)
    with pytest.raises(RuntimeError, match=f"'{function.__name__}' must return one.*{message}"):
        trainer.train()


def test_features_come_from_a_column(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (0, 2, 4, 2), max_steps=1)
    vectors = [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 1.0]]
    trainer.train_dataset = trainer.train_dataset.add_column("hardness", vectors)
    callback = attach(trainer, prompts=SharedDifficulty(features="hardness"))
    trainer.train()
    assert callback._maker.filler.pool._state["x"].shape == (4, 3)
    for name, message in (("color", "features must be 'policy' or a column"), ("prompt", "vector")):
        trainer = make_grpo_trainer(tmp_path, max_steps=1)
        attach(trainer, prompts=SharedDifficulty(features=name))
        with pytest.raises(ValueError, match=message):
            trainer.train()
