"""Lightning's engines that refuse a processor: FSDP and DeepSpeed, on one GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("lightning")

from lightning.pytorch import Callback
from torch.distributed.fsdp import FullyShardedDataParallel

from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.kernels._shards import gathered
from onlinesel.strategies import UDS, LossReweight, TopLoss
from tests.callbacks.hosts import make_rows, reference_gradient, relative_error
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Language,
    kept,
    make_trainer,
    planned,
    text_loader,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow, *QUIET_LIGHTNING]


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Whole(Callback):
    """Keep the parameters of the language model as they are in the end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        engine = trainer.strategy.model
        together: AbstractContextManager[Any] = gathered(pl_module)
        if isinstance(engine, FullyShardedDataParallel):
            together = FullyShardedDataParallel.summon_full_params(engine)
        with together:
            self.state = {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().cpu().clone()
                for n, p in pl_module.model.named_parameters()
            }


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
STAGES = [pytest.param(f"deepspeed_stage_{n}", marks=needs_deepspeed) for n in (1, 2, 3)]


@pytest.mark.parametrize("batches", [2, 1], ids=["whole", "short"])
@pytest.mark.parametrize("engine", ["fsdp", *STAGES])
@pytest.mark.parametrize("strategy", [TopLoss(), UDS(), LossReweight(min_rows=2)])
def test_the_gradient_of_a_step(strategy: Any, engine: str, batches: int) -> None:
    """Lightning and DeepSpeed both divide by the accumulation, in a shorter last step as well."""
    candidates = 1 if isinstance(strategy, LossReweight) else 2
    rows, reference, whole = make_rows()[: 2 * candidates * batches], Language().model, Whole()
    before = {n: p.detach().clone() for n, p in reference.named_parameters()}
    trainer = make_trainer(
        OnlineSelection(strategy, candidates=candidates), whole, strategy=engine,
        accelerator="gpu", accumulate_grad_batches=2,
    )  # fmt: skip
    with planned() as plans:
        trainer.fit(Language(), text_loader(rows))
    (weights,) = (kept(plan) for plan in plans)
    gradient, _ = reference_gradient(
        reference, rows, list(weights), list(weights.values()), strategy.normalize
    )
    assert relative_error(before, whole.state, gradient) < 1e-5
