"""With nothing to choose, RolloutSelection trains what TRL trains, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.rl import PassRateBand, Refill, ZeroVariance
from tests.callbacks.grpo_hosts import (
    attach,
    length_bonus,
    losses,
    make_grpo_trainer,
    outcome,
    spy,
    weights,
)
from tests.callbacks.hosts import make_model, make_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sampled": {"known": False, "shuffle_dataset": True},
    "steps-per-generation": {"steps_per_generation": 4, "per_device_train_batch_size": 2},
    "iterations": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "batch-scale": {"scale_rewards": "batch"},
    "no-scale": {"scale_rewards": "none"},
    "objectives": {
        "rewards": [outcome, length_bonus],
        "multi_objective_aggregation": "normalize_then_sum",
        "options": {"outcome": "outcome"},
    },
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "entropy-mask": {"top_entropy_quantile": 0.5},
    "pad-to-multiple": {"pad_to_multiple_of": 8},
}


def trained(folder: Path, setting: dict[str, Any], callback: bool) -> tuple[list[float], Any]:
    setting = dict(setting)
    options = setting.pop("options", {})
    trainer = make_grpo_trainer(folder, (2, 1, 3, 2, 1, 3), max_steps=3, **setting)
    if callback:
        attach(trainer, gate=ZeroVariance(), refill=Refill(), **options)
    trainer.train()
    return losses(trainer), weights(trainer)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "sampled"])
def test_a_gate_that_passes_everything_changes_no_bit(tmp_path: Path, name: str) -> None:
    plain, before = trained(tmp_path / "plain", SETTINGS[name], callback=False)
    chosen, after = trained(tmp_path / "chosen", SETTINGS[name], callback=True)
    assert plain == chosen
    assert torch.equal(before, after)
    assert any(loss != 0 for loss in plain)


def test_without_parts_nothing_changes(tmp_path: Path) -> None:
    setting = SETTINGS["sampled"]
    plain, before = trained(tmp_path / "plain", setting, callback=False)
    trainer = make_grpo_trainer(tmp_path, (2, 1, 3, 2, 1, 3), max_steps=3, **setting)
    attach(trainer)
    trainer.train()
    assert losses(trainer) == plain
    assert torch.equal(weights(trainer), before)


def test_a_reference_model_stays_in_the_loss(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    from transformers import LlamaForCausalLM

    found = []
    for callback in (False, True):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        trainer = make_grpo_trainer(tmp_path, (2, 1, 3, 2), max_steps=3, model=model, beta=0.5)
        if callback:
            attach(trainer, gate=ZeroVariance(), refill=Refill())
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    """Every held-out group is rejected by the gate, and scored all the same."""
    rewards = []
    for callback in (False, True):
        trainer = make_grpo_trainer(
            tmp_path, (2,) * 4, per_device_eval_batch_size=8, eval_strategy="no", max_steps=1
        )
        trainer.eval_dataset = make_grpo_trainer(tmp_path, (0, 4, 4, 0)).train_dataset
        if callback:
            attach(trainer, gate=PassRateBand(0.4, 0.6), refill=Refill(on_short="raise"))
        trainer.train()
        trainer.evaluate()
        rewards.append([e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e])
    assert rewards[0] == rewards[1] == [0.5]


def test_detach_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, max_steps=1)
    before = dict(trainer.__dict__)
    callback = attach(trainer, gate=ZeroVariance())
    assert trainer.__dict__ != before
    callback.detach()
    assert trainer.__dict__ == before
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, RolloutSelection)]
    made = spy(trainer)
    trainer.train()
    assert len(made) == 1


def test_a_trained_callback_can_train_again(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (2, 0, 2, 2), max_steps=2)
    attach(trainer, gate=ZeroVariance())
    trainer.train()
    first = [entry.get("rollouts/kept_share") for entry in trainer.state.log_history][:2]
    trainer.train()
    assert [entry.get("rollouts/kept_share") for entry in trainer.state.log_history][:2] == first
