"""fused_logprobs leaves nothing behind, and is refused where it cannot stand in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer import utils

from onlinesel.callbacks.grpo import RolloutSelection
from tests.callbacks.grpo_hosts import (
    attach,
    make_grpo_trainer,
    outcome,
    spy,
)
from tests.callbacks.hosts import make_model
from tests.callbacks.test_grpo_head import TRLS_OWN, exact, make


def test_outside_a_forward_everything_is_as_it_was(tmp_path: Path) -> None:
    within: list[bool] = []

    def watching(completions: list[str], **kwargs: Any) -> list[float | None]:
        within.append(utils._ChunkedLogProbFunction is TRLS_OWN)
        return outcome(completions, **kwargs)

    trainer, callback = make(tmp_path, True, {"rewards": watching, "num_iterations": 2})
    forward = trainer.model.forward
    trainer.train()
    assert within == [True]
    assert trainer.model.forward is forward and utils._ChunkedLogProbFunction is TRLS_OWN
    ids, mask = torch.randint(2, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
    callback.detach()
    theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
    fresh = make_grpo_trainer(tmp_path, model=trainer.model)
    again = fresh._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
    assert type(theirs.grad_fn).__name__ == type(again.grad_fn).__name__
    assert torch.equal(theirs, again) and not torch.equal(theirs, ours)


def test_a_failed_forward_leaves_nothing(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, True, {})
    forward = trainer.model.forward
    ids = torch.full((2, 9), 64)  # of a vocabulary of 64
    with pytest.raises(IndexError):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)
    assert trainer.model.forward is forward and utils._ChunkedLogProbFunction is TRLS_OWN


def test_another_models_head_stays_trls(tmp_path: Path) -> None:
    """Only forwards in which the trainer computes log-probabilities are changed."""
    trainer, _ = make(tmp_path, True, {})
    ids = torch.randint(2, 64, (2, 9))
    plain = trainer.model(input_ids=ids).logits
    other = make_model()
    utils.add_fused_lm_head(other, outputs=("log_probs", "is_top1"))
    expected = other(input_ids=ids, labels=ids, fused_lm_head=True)
    inside: list[Any] = []
    handle = trainer.model.register_forward_hook(
        lambda *_: inside.append(other(input_ids=ids, labels=ids, fused_lm_head=True))
    )
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 5)
    handle.remove()
    assert torch.equal(inside[0].log_probs, expected.log_probs)
    assert torch.equal(inside[0].is_top1, expected.is_top1)
    assert torch.equal(trainer.model(input_ids=ids).logits, plain)


def test_mixed_precision_wraps_the_forward_once_more(tmp_path: Path) -> None:
    """Of the reference before the callback is made, and of the policy after a first run."""
    case = {"beta": 0.5, "bf16": True, "num_iterations": 2, "max_steps": 2}
    trainer, callback = make(tmp_path, True, case)
    trainer.train()
    callback.detach()
    attach(trainer, fused_logprobs=True)
    made = spy(trainer)
    trainer.train()
    batch = made[0]
    mask = batch["completion_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base = trainer.ref_model.base_model
        states = base(input_ids=ids, attention_mask=attention).last_hidden_state
    weight = trainer.ref_model.lm_head.weight.detach()
    true, _ = exact(
        states[:, -mask.shape[1] - 1 : -1].bfloat16(), weight.bfloat16(), batch["completion_ids"]
    )
    found = batch["ref_per_token_logps"].double()
    torch.testing.assert_close(found[mask], true[mask], rtol=1e-5, atol=1e-5)


# What it does not do --------------------------------------------------------------------------


def asks_for_more(trainer: Any) -> None:
    utils.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))


def has_no_fused_head(trainer: Any) -> None:
    del trainer.model.forward


def is_compiled(trainer: Any) -> None:
    trainer.args.torch_compile = True


@pytest.mark.parametrize(("change", "message"), [
    (asks_for_more, "outputs of the fused head must be log_probs and entropy alone for fused_logp"
     "robs, got is_top1. Ask add_fused_lm_head for fewer"),
    (has_no_fused_head, "model must be one with TRL's fused head for fused_logprobs, got LlamaFor"),
    (is_compiled, "torch_compile must be off for fused_logprobs, got True. A compiled forward has"),
])  # fmt: skip
def test_what_it_cannot_stand_in_for_is_refused(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    trainer = make_grpo_trainer(tmp_path)
    change(trainer)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=f"RolloutSelection: {message}"):
        RolloutSelection(trainer, fused_logprobs=True)
    assert trainer.__dict__ == before
    attach(trainer)  # without it, that is TRL's own business


def test_a_head_of_another_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
            return hidden @ weight.T

    trainer = make_grpo_trainer(tmp_path)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Moved)
    with pytest.raises(ValueError, match=r"fused head takes hidden, .*outputs for fused_logprobs, "
                       r"got hidden, weight. Install the one"):  # fmt: skip
        RolloutSelection(trainer, fused_logprobs=True)
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ValueError, match="got one without _ChunkedLogProbFunction"):
        RolloutSelection(trainer, fused_logprobs=True)


def test_outputs_that_are_asked_for_later_are_refused(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, True, {})
    asks_for_more(trainer)
    with pytest.raises(ValueError, match="log_probs and entropy alone for fused_logprobs, got is"):
        trainer.train()


@pytest.mark.parametrize("value", [1, "trl", None])
def test_the_option_is_true_or_false(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="fused_logprobs must be True or False, got "):
        RolloutSelection(make_grpo_trainer(tmp_path), fused_logprobs=value)
