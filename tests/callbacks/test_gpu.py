"""The hosts on a GPU: the same rows as on a CPU, and the gradient that the contract promises.

Each test runs on the CPU as well, so that what a GPU is asked for is known to work.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel.strategies import UDS, GradNorm, LossReweight, TopLoss
from tests.callbacks import loop_hosts
from tests.callbacks.hosts import (
    attach,
    choices,
    make_model,
    make_rows,
    make_trainer,
    parameters,
    reference_gradient,
    relative_error,
)

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
BOUND = {"cpu": 1e-6, "cuda": 1e-5}
pytestmark = pytest.mark.parametrize("device", DEVICES)


def host_copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in parameters(model).items()}


def step(folder: Path, device: str, strategy: Any, candidates: int, **more: Any) -> Any:
    """Take one step of the Trainer; return the error of its gradient, and what was chosen."""
    reuse = more.pop("reuse_forward", False)
    lora = more.pop("lora", False)
    trainer = make_trainer(folder, model=make_model(lora=lora), use_cpu=device == "cpu", **more)
    callback = attach(
        trainer, strategy, candidates=candidates, record=folder / "record", reuse_forward=reuse
    )
    assert next(trainer.model.parameters()).device.type == device
    before, reference = host_copy(trainer.model), make_model(lora=lora)
    reference.load_state_dict({n: v.cpu() for n, v in trainer.model.state_dict().items()})
    trainer.train()
    choice = choices(folder / "record")[0]
    gradient, _ = reference_gradient(
        reference, make_rows(), choice["ids"], choice["weights"], callback.normalize
    )
    return relative_error(before, host_copy(trainer.model), gradient), choice


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "candidates"),
    [(TopLoss(), 3), (UDS(), 3), (GradNorm(), 3), (LossReweight(min_rows=2), 1)],
    ids=["TopLoss", "UDS", "GradNorm", "LossReweight"],
)
def test_the_gradient_of_a_step_of_the_trainer(
    tmp_path: Path, strategy: Any, candidates: int, accumulate: int, device: str
) -> None:
    error, choice = step(
        tmp_path / device, device, strategy, candidates, gradient_accumulation_steps=accumulate
    )
    assert error < BOUND[device]
    _, expected = step(
        tmp_path / "cpu again", "cpu", strategy, candidates, gradient_accumulation_steps=accumulate
    )
    assert choice["ids"] == expected["ids"]
    assert choice["weights"] == pytest.approx(expected["weights"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradient_with_a_reused_forward(tmp_path: Path, lora: bool, device: str) -> None:
    more = {"gradient_checkpointing": True, "lora": lora, "reuse_forward": True}
    error, _ = step(tmp_path, device, UDS(), 3, **more)
    assert error < 10 * BOUND[device]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision_stays_near_the_gradient(tmp_path: Path, kind: str, device: str) -> None:
    if device == "cpu" and kind == "fp16":
        pytest.skip("the Trainer has no fp16 on a CPU")
    error, _ = step(tmp_path, device, UDS(), 3, **{kind: True})
    assert error < 0.05


def test_the_gradient_of_a_step_of_a_loop(device: str) -> None:
    rows, model = make_rows(), make_model().to(device)
    before, reference = host_copy(model), make_model()
    score = partial(_score, onlinesel.scoring.CausalLMScorer(TopLoss().needs), device)
    steps = onlinesel.steps(
        loop_hosts.make_loader(), model, TopLoss(), candidates=3, accumulate=2, score=score
    )
    optimizer = loop_hosts.sgd(model)
    for planned in steps:
        for micro in planned:
            batch = {name: value.to(device) for name, value in micro.batch.items()}
            micro.loss(loop_hosts.token_losses(model, batch)).backward()
        optimizer.step()
        ids = [int(i) for micro in planned for i in micro.ids]
        weights = [float(w) for micro in planned for w in micro.weights]
        break
    gradient, _ = reference_gradient(reference, rows, ids, weights, "tokens")
    assert len(ids) == 4
    assert relative_error(before, host_copy(model), gradient) < BOUND[device]


def _score(scorer: Any, device: str, model: Any, batch: Any) -> torch.Tensor:
    near = {name: value.to(device) for name, value in batch.items()}
    loss = scorer(model, near).loss
    assert loss is not None
    return loss
