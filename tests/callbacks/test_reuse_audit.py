"""A layer that gives its rows something else than when they were scored stops the run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, TrainerCallback, set_seed

from onlinesel.callbacks._shared.replay import Audit
from onlinesel.strategies import TopLoss
from tests.callbacks.hosts import attach, collate, make_model, make_rows, make_trainer


def train(folder: Path, change: Any, **options: Any) -> None:
    trainer = make_trainer(folder, gradient_checkpointing=True, **options)
    attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    change(trainer.model)
    trainer.train()


def wrap_mlps(model: Any, wrapped: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = wrapped(layer.mlp.forward)


def add_mean(share: float) -> Any:
    """Mixes the rows of a batch: the mean over those that train is another one."""
    return lambda forward: lambda x: forward(x) + share * x.mean(dim=0, keepdim=True)


APART = r"reuse_forward: layers must .* tokens of LlamaDecoderLayer that are .*% apart"


def test_a_layer_that_mixes_rows_stops_the_first_backward(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=APART):
        train(tmp_path, lambda model: wrap_mlps(model, add_mean(1.0)))


def test_a_layer_that_draws_numbers_stops_the_first_backward(tmp_path: Path) -> None:
    def noisy(forward: Any) -> Any:
        return lambda x: forward(x) + 0.1 * torch.randn_like(x)

    with pytest.raises(ValueError, match=APART):
        train(tmp_path, lambda model: wrap_mlps(model, noisy))


def test_a_channel_that_is_large_hides_nothing(tmp_path: Path) -> None:
    """As that of the first token in language models: one norm over all tokens would see it only."""

    def change(model: Any) -> None:
        wrap_mlps(model, add_mean(0.02))
        with torch.no_grad():
            model.model.embed_tokens.weight[1, 0] = 50.0

    rows = [
        {"input_ids": [1, *row["input_ids"]], "labels": [-100, *row["input_ids"]]}
        for row in make_rows()
    ]
    with pytest.raises(ValueError, match=APART):
        train(tmp_path, change, rows=rows)


def test_what_shows_later_stops_the_step_in_which_it_shows(tmp_path: Path) -> None:
    """Weights that change between scoring and training, in the third step."""

    class Change(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].model.layers[0].mlp.up_proj.weight.mul_(20.0)

    trainer = make_trainer(tmp_path, gradient_checkpointing=True, max_steps=4)
    attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    trainer.add_callback(Change())
    with pytest.raises(ValueError, match=r"on what changes between scoring and training"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_positions_that_follow_the_padding_stop_the_step(tmp_path: Path) -> None:
    """Learned positions and left padding: rows of one width at first, for which all is right."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    set_seed(0)
    config = GPTBigCodeConfig(**sizes, **rates, pad_token_id=0, initializer_range=0.3)
    wide = [{name: tokens[:4] for name, tokens in row.items()} for row in make_rows()[:6]]
    trainer = make_trainer(
        tmp_path, model=GPTBigCodeForCausalLM(config), rows=wide + make_rows()[6:], max_steps=8,
        collator=partial(collate, side="left"), train_sampling_strategy="sequential",
        gradient_checkpointing=True, learning_rate=0.01,
    )  # fmt: skip
    attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    with pytest.raises(ValueError, match="positions follow the padding. Pad on the right"):
        trainer.train()
    assert trainer.state.global_step > 1


def test_16_bits_under_autocast_may_differ_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are float32 there, and what the layers multiply is not."""
    errors, check = [], Audit.check

    def spy(audit: Audit) -> None:
        errors.extend(float(error) for error in audit._worst.values())
        check(audit)

    monkeypatch.setattr(Audit, "check", spy)
    train(
        tmp_path, lambda model: None, model=make_model(initializer_range=0.3), bf16=True,
        collator=partial(collate, side="left"), max_steps=4, learning_rate=1e-3,
    )  # fmt: skip
    assert 5e-3 < max(errors) < 5e-2


def test_padding_and_rows_of_other_ranks_do_not_count() -> None:
    audit, before = Audit(), torch.ones(2, 3, 4)
    now, known = before.clone(), torch.tensor([[True, True, False], [True, False, False]])
    now[0, 2] = now[1, 1:] = float("nan")
    audit.compare("Layer", before, now, known, torch.float32)
    now[1, 0, 0] += 0.1  # one of three tokens, by 0.1 of a norm of 2: 1.7 % on average
    with pytest.raises(ValueError, match="got tokens of Layer that are 1.7% apart. The layer"):
        audit.compare("Layer", before, now, known, torch.float32)
    audit.compare("Layer", before, now, known, torch.bfloat16)
