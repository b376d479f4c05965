"""One optimizer step applies exactly the weighted mean that the contract promises."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel import Chain, Selection, Signals, Strategy
from onlinesel.strategies import LossReweight, TopLoss, Uniform
from tests.callbacks.hosts import (
    attach,
    choices,
    collate,
    make_model,
    make_rows,
    make_sft_trainer,
    make_trainer,
    parameters,
    reference_gradient,
    relative_error,
)


@dataclass(frozen=True)
class Small(Strategy):
    """Weights whose sum is below 1, which SFTTrainer would not divide by."""

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(0.01 * (1.0 + signals.row_ids())), state


SUBSET = (TopLoss(), {"candidates": 3})
WEIGHTS = (LossReweight(min_rows=2), {})
BOTH = (Chain(TopLoss(), LossReweight(min_rows=2)), {"candidates": 3})


def step_error(folder: Path, trainer: Any, strategy: Any, **options: Any) -> tuple[float, Any]:
    """Train one step; return the error of its gradient, and its record."""
    rows = make_rows()
    callback = attach(trainer, strategy, record=folder / "record", **options)
    before = parameters(trainer.model)
    reference = make_model(lora=hasattr(trainer.model, "peft_config"))
    reference.load_state_dict(trainer.model.state_dict())
    trainer.train()
    choice = choices(folder / "record")[0]
    gradient, loss = reference_gradient(
        reference, rows, choice["ids"], choice["weights"], callback.normalize
    )
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(loss, rel=1e-5)
    return relative_error(before, parameters(trainer.model), gradient), choice


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("normalize", ["tokens", "samples"])
@pytest.mark.parametrize("case", [SUBSET, WEIGHTS, BOTH], ids=["subset", "weights", "both"])
def test_gradient_is_the_contract(
    tmp_path: Path, host: Any, accumulate: int, normalize: str, case: Any
) -> None:
    strategy, options = case
    trainer = host(tmp_path, gradient_accumulation_steps=accumulate)
    error, choice = step_error(tmp_path, trainer, strategy, normalize=normalize, **options)
    assert error < 1e-6
    kept = sum(w > 0 for w in choice["weights"])
    assert kept == 2 * accumulate
    assert len(choice["ids"]) == kept * options.get("candidates", 1)


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
@pytest.mark.parametrize("case", [SUBSET, WEIGHTS], ids=["subset", "weights"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_with_lora(tmp_path: Path, host: Any, case: Any, checkpointing: bool) -> None:
    strategy, options = case
    trainer = host(
        tmp_path,
        model=make_model(lora=True),
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
    )
    error, _ = step_error(tmp_path, trainer, strategy, **options)
    assert error < 1e-6


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
@pytest.mark.parametrize("normalize", ["tokens", "samples"])
def test_gradient_of_weights_that_sum_to_less_than_one(
    tmp_path: Path, host: Any, normalize: str
) -> None:
    error, choice = step_error(tmp_path, host(tmp_path), Small(), normalize=normalize)
    assert error < 1e-6 and sum(choice["weights"]) < 1


@pytest.mark.parametrize("scope", ["global", "rank", "batch"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_in_every_scope_and_padding(tmp_path: Path, scope: str, side: str) -> None:
    trainer = make_trainer(
        tmp_path, gradient_accumulation_steps=2, collator=partial(collate, side=side)
    )
    error, choice = step_error(tmp_path, trainer, TopLoss(), candidates=3, scope=scope)
    assert error < 1e-6
    if scope == "batch":  # six candidates a micro-batch, of which each keeps its own two
        assert [sum(choice["weights"][i : i + 6]) for i in (0, 6)] == [2, 2]


def test_the_reference_would_notice_a_wrong_denominator(tmp_path: Path) -> None:
    """Meta-test: the classic error, half the gradient, is far outside the tolerance."""
    trainer = make_trainer(tmp_path)
    callback = attach(trainer, TopLoss(), candidates=3, record=tmp_path / "record")
    build = callback._plan

    def wrong(device: Any) -> Any:
        planner = build(device)
        count = type(planner)._total
        planner._total = lambda *args: 3 * count(planner, *args)
        return planner

    callback._plan = wrong  # type: ignore[method-assign]
    before, reference = parameters(trainer.model), make_model()
    trainer.train()
    choice = choices(tmp_path / "record")[0]
    gradient, _ = reference_gradient(
        reference, make_rows(), choice["ids"], choice["weights"], "tokens"
    )
    assert relative_error(before, parameters(trainer.model), gradient) > 0.5


def test_the_whole_step_competes_in_global_scope(tmp_path: Path) -> None:
    """The kept rows are the best of all micro-batches by the model's own losses."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3)
    attach(trainer, TopLoss(), candidates=4, record=tmp_path / "record")
    trainer.train()
    choice, rows, model = choices(tmp_path / "record")[0], make_rows(), make_model()
    losses = []
    for i in choice["ids"]:
        _, loss = reference_gradient(model, rows, [i], [1.0], "tokens")
        losses.append(loss)
    best = torch.tensor(losses).topk(6).indices.tolist()
    assert {choice["ids"][i] for i in best} == {
        i for i, w in zip(choice["ids"], choice["weights"], strict=True) if w > 0
    }
    assert choice["scores"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
def test_uniform_with_one_candidate_changes_nothing(tmp_path: Path, host: Any) -> None:
    """Same losses and same weights, bit for bit, as without the callback."""
    plain = host(tmp_path / "plain", max_steps=5, gradient_accumulation_steps=2)
    plain.train()
    chosen = host(tmp_path / "chosen", max_steps=5, gradient_accumulation_steps=2)
    attach(chosen, Uniform())
    chosen.train()
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (plain, chosen)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    for a, b in zip(plain.model.parameters(), chosen.model.parameters(), strict=True):
        assert torch.equal(a, b)
