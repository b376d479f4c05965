"""What PreferenceSelection refuses, with the text that says what to do, and what detach leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.callbacks.dpo import PreferenceSelection
from onlinesel.rl.preference import TARS, PreferenceTerms, PreferenceTokens
from tests.callbacks.dpo_hosts import (
    HIDE,
    ByColumn,
    Ones,
    attach,
    history,
    make_dpo_trainer,
    same_parameters,
    with_columns,
)
from tests.callbacks.hosts import make_trainer


def test_detach_restores_the_trainer(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path, max_steps=2)
    before, callbacks = dict(trainer.__dict__), list(trainer.callback_handler.callbacks)
    callback = attach(trainer, HIDE)
    assert trainer.__dict__ != before
    callback.detach()
    assert trainer.__dict__ == before
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    plain = make_dpo_trainer(tmp_path, max_steps=2)
    plain.train()
    assert history(trainer) == history(plain) and same_parameters(trainer, plain)


def test_training_leaves_nothing_but_the_wrapped_methods(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    callback = attach(trainer, HIDE)
    trainer.train()
    assert trainer.precompute_ref_logps is False
    callback.detach()
    wrapped = {"compute_loss", "get_train_dataloader", "_save_rng_state", "_inner_training_loop"}
    assert not wrapped & set(trainer.__dict__)


def test_detach_during_training_is_refused(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)

    class Detaching(Ones):
        def weigh(self, *args: Any, **kwargs: Any) -> PreferenceTerms:
            callback.detach()
            return super().weigh(*args, **kwargs)

    callback = attach(trainer, Detaching())
    with pytest.raises(ValueError, match="detach must be called before or after train"):
        trainer.train()
    callback.detach()


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    attach(trainer, HIDE)
    with pytest.raises(ValueError, match="trainer must be without another callback on its loss"):
        PreferenceSelection(trainer, HIDE)


def test_the_callback_of_another_trainer_is_refused(tmp_path: Path) -> None:
    mine, other = make_dpo_trainer(tmp_path / "mine"), make_dpo_trainer(tmp_path / "other")
    other.add_callback(PreferenceSelection(mine, HIDE))
    with pytest.raises(ValueError, match="PreferenceSelection: trainer must be the one that the c"):
        other.train()
    assert other.state.global_step == 0


def test_a_callback_that_was_not_added_is_refused(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    PreferenceSelection(trainer, HIDE)
    with pytest.raises(ValueError, match="callback must be among the trainer's callbacks"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be off, got True. Set"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type must be none of ipo, .*, got sft. They"),
        ({"loss_type": ["ipo", "sigmoid_norm"]}, "loss_type must be none .* got ipo, sigmoid_norm"),
        ({"use_weighting": True}, "use_weighting must be off, got True. Set it"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be off, got True. A retried"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    trainer = make_dpo_trainer(tmp_path, **changes)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match="^PreferenceSelection: " + message):
        PreferenceSelection(trainer, HIDE)
    assert trainer.__dict__ == before


def test_bad_trainers_and_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer must be TRL's DPOTrainer, got Trainer. Use on"):
        PreferenceSelection(make_trainer(tmp_path), HIDE)
    trainer = make_dpo_trainer(tmp_path)
    with pytest.raises(TypeError, match="weights must be a PreferenceWeights instance, got <class"):
        PreferenceSelection(trainer, TARS)  # type: ignore[arg-type]
    trainer._is_vision_dataset = True
    with pytest.raises(ValueError, match="train_dataset must be of text, got images. Train on"):
        PreferenceSelection(trainer, HIDE)
    trainer._is_vision_dataset = False
    trainer.get_tp_size = lambda: 2
    with pytest.raises(ValueError, match="sequence parallel sizes must be 1, got {'tp': 2, 'cp'"):
        PreferenceSelection(trainer, HIDE)


def test_bad_answers_are_refused(tmp_path: Path) -> None:
    class Short(Ones):
        def weigh(self, tokens: PreferenceTokens, **_: Any) -> PreferenceTerms:
            return PreferenceTerms(torch.ones(tokens.ids.shape)[:, 1:])

    class Late(Ones):
        def weigh(self, tokens: PreferenceTokens, **_: Any) -> PreferenceTerms:
            return PreferenceTerms(torch.ones(tokens.ids.shape), tokens.ids)

    for weights, message in (
        (Short(), r"weights must be of the batch's shape \(4, \d+\), got \(4, \d+\). Let"),
        (Late(("policy",)), "inputs must be None from weights that need 'policy', got token ids"),
    ):
        trainer = make_dpo_trainer(tmp_path)
        attach(trainer, weights)
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_models_without_the_fused_head_are_refused(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    attach(trainer, Ones())
    forward = type(trainer.ref_model).forward
    trainer.ref_model.forward = lambda fused_lm_head, **kw: forward(trainer.ref_model, **kw)
    with pytest.raises(ValueError, match="whose models give log_probs, got CausalLMOutputWithPast"):
        trainer.train()


def test_columns_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    trainer = with_columns(make_dpo_trainer(tmp_path), drop=1)
    attach(trainer, ByColumn())
    with pytest.raises(
        ValueError, match=r"chosen_clarity must be one value for each of the \d+ chosen_ids, got"
    ):
        trainer.train()


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"needs must be .* got no column 'chosen_clarity'\. The columns are prom"
    ):
        PreferenceSelection(trainer, ByColumn())
