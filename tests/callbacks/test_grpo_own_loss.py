"""A subclass may compute another loss: it trains as before, and what it cannot carry is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from onlinesel.rl import DRPO, HAPO, ZeroVariance
from tests.callbacks.grpo_hosts import (
    GMPOTrainer,
    OwnLoss,
    attach,
    losses,
    make_grpo_trainer,
    weights,
)


@pytest.mark.parametrize("kind", [OwnLoss, GMPOTrainer])
def test_without_parts_a_loss_of_ones_own_trains_as_before(tmp_path: Path, kind: Any) -> None:
    ends = []
    for callback in (False, True):
        trainer = make_grpo_trainer(tmp_path, (2, 1, 3), kind=kind, max_steps=2)
        before = weights(trainer)
        if callback:
            attach(trainer)
        trainer.train()
        ends.append((weights(trainer), losses(trainer)))
        assert not torch.equal(before, ends[-1][0])
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


class Louder(GRPOTrainer):
    """TRL's own loss, twice."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return 2.0 * super()._compute_loss(model, inputs)


class Copying(GRPOTrainer):
    """TRL's own loss, of a copy of the batch."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, dict(inputs))


class Around(GRPOTrainer):
    """A compute_loss that ends at TRL's."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().compute_loss(model, dict(inputs))


@pytest.mark.parametrize("kind", [Louder, Around])
def test_token_weights_are_in_a_loss_that_calls_trls(tmp_path: Path, kind: Any) -> None:
    moved = []
    for each in (GRPOTrainer, kind):
        trainer = make_grpo_trainer(tmp_path, (2, 1, 3), kind=each, max_steps=1)
        attach(trainer, tokens=HAPO())
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    assert (moved[1] - 2.0 * moved[0]).norm() / moved[1].norm() < 1e-4


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        (OwnLoss, {"tokens": HAPO()}, "for tokens=, got OwnLoss, which computes its own"),
        (GMPOTrainer, {"tokens": HAPO()}, r"tokens=, got GMPOTrainer.* Call super\(\)\._compute"),
        (Copying, {"tokens": HAPO()}, "with the same dictionary, or leave tokens= out"),
        (GMPOTrainer, {"advantages": DRPO()}, "for advantages=, got GMPOTrainer"),
        (OwnLoss, {"advantages": DRPO()}, "for advantages=, got OwnLoss"),
        (OwnLoss, {"fused_logprobs": True}, "Call it in the loss, or set fused_logprobs=False"),
    ],
)
def test_parts_that_need_trls_loss_are_refused_before_a_step(
    tmp_path: Path, kind: Any, parts: dict[str, Any], message: str
) -> None:
    trainer = make_grpo_trainer(tmp_path, (2, 1, 3), kind=kind, max_steps=1)
    attach(trainer, **({"gate": ZeroVariance()} | parts))
    before = weights(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert torch.equal(before, weights(trainer))


def test_log_probabilities_of_the_generation_are_not_those_of_the_loss(tmp_path: Path) -> None:
    """Two steps a generation batch: the trainer computes old log-probabilities before the loss."""
    trainer = make_grpo_trainer(
        tmp_path, (2, 1), kind=OwnLoss, steps_per_generation=2, per_device_train_batch_size=4
    )
    attach(trainer, fused_logprobs=True)
    with pytest.raises(ValueError, match="Call it in the loss, or set fused_logprobs=False"):
        trainer.train()


class NoMean(OwnLoss):
    """A mean over tokens that is nan without any."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs)
        return loss * (inputs["completion_mask"].sum() / inputs["completion_mask"].sum())


@pytest.mark.parametrize("rights", [(2, 0, 4), (0, 4, 0)])
def test_a_loss_that_is_nan_without_tokens_trains_what_there_is(
    tmp_path: Path, rights: Any
) -> None:
    moved = []
    for kind in (OwnLoss, NoMean):
        trainer = make_grpo_trainer(
            tmp_path, rights, kind=kind, max_steps=1, steps_per_generation=6,
            per_device_train_batch_size=2, gradient_accumulation_steps=6,
        )  # fmt: skip
        attach(trainer, gate=ZeroVariance())
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    assert bool(moved[0].any()) == (2 in rights)
    assert torch.allclose(moved[0], moved[1], rtol=1e-5, atol=1e-8)
