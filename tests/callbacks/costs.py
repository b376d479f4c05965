"""What our own code does in a run that has nothing to choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onlinesel.strategies import Uniform
from tests.callbacks.hosts import attach, make_rows, make_trainer
from tests.counting import Work

STEPS = 10


def uniform_run(folder: Path) -> dict[str, float]:
    """Train with nothing to choose; return what our code does a step."""
    trainer = make_trainer(folder, rows=make_rows(4 * STEPS), max_steps=STEPS)
    callback, work = attach(trainer, Uniform()), Work()
    callback._call["get_batch_samples"] = work.theirs(callback._call["get_batch_samples"])
    samples = work.ours(trainer.get_batch_samples)

    def counted(*args: Any, **kwargs: Any) -> Any:
        work.step()
        return samples(*args, **kwargs)

    trainer.get_batch_samples = counted
    callback.on_step_end = work.ours(callback.on_step_end)  # type: ignore[method-assign]
    trainer.train()
    return work.each()
