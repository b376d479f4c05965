"""What our own code costs in a run: CPU time, and how often it talks to the other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onlinesel.strategies import Uniform
from tests.callbacks.hosts import attach, make_model, make_trainer

STEPS = 12
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "barrier")


class Spent:
    """CPU seconds in our code and in what it calls of the trainer; collectives in our code."""

    def __init__(self) -> None:
        self.ours = self.theirs = 0.0
        self.collectives = 0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            before = self.collectives
            try:
                return function(*args, **kwargs)
            finally:
                setattr(self, name, getattr(self, name) + time.process_time() - began)
                if name == "theirs":
                    self.collectives = before

        return call

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.collectives += 1
            return function(*args, **kwargs)

        return call


def uniform_run(folder: Path, batch: int = 8) -> dict[str, float]:
    """Train 1.1 M parameters with nothing to choose, on rows of 128 tokens."""
    count = 2 * batch * STEPS
    tokens = torch.randint(1, 2048, (count, 128), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    model = make_model(vocab_size=2048, max_position_embeddings=128, **sizes)
    trainer = make_trainer(
        folder, model=model, rows=rows, per_device_train_batch_size=batch, max_steps=STEPS
    )
    callback, spent = attach(trainer, Uniform()), Spent()
    theirs = callback._call["get_batch_samples"]
    callback._call["get_batch_samples"] = spent.timed("theirs", theirs)
    ours, end = trainer.get_batch_samples, callback.on_step_end
    before = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for name, collective in before.items():
                setattr(dist, name, spent.counted(collective))
            try:
                return function(*args, **kwargs)
            finally:
                for name, collective in before.items():
                    setattr(dist, name, collective)

        return call

    trainer.get_batch_samples = counting(spent.timed("ours", ours))
    callback.on_step_end = counting(spent.timed("ours", end))  # type: ignore[method-assign]
    began = time.process_time()
    trainer.train()
    whole = time.process_time() - began
    assert spent.theirs > 0 and spent.ours > spent.theirs
    return {
        "ours": spent.ours - spent.theirs, "whole": whole, "collectives": spent.collectives / STEPS
    }  # fmt: skip
