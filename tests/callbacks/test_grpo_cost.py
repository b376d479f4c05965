"""What the callback itself costs where it has nothing to choose, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onlinesel.callbacks.grpo.attach import _WRAPPED
from onlinesel.rl import ZeroVariance
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer, word_parity
from tests.counting import Work


def own_work(folder: Path, **parts: Any) -> dict[str, float]:
    """Return what our own code does in a step of 32 sampled completions."""
    trainer = make_grpo_trainer(
        folder, (2,) * 32, known=False, rewards=word_parity, per_device_train_batch_size=32,
        max_completion_length=16, max_steps=8,
    )  # fmt: skip
    callback, work = attach(trainer, **parts), Work()
    # What accelerate does to unwrap a model grows with the packages that are installed.
    trainer.accelerator.unwrap_model = work.theirs(trainer.accelerator.unwrap_model)
    for name in _WRAPPED[1:-1]:  # the loader is built once; the last one is the whole run
        callback._call[name] = work.theirs(callback._call[name])
        setattr(trainer, name, work.ours(getattr(trainer, name)))
    training_step = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        work.step()
        return training_step(*args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    return work.each()


def test_without_parts_it_costs_at_most_one_percent(tmp_path: Path) -> None:
    """125 calls took 0.5 ms of a core; a step of 32 completions of 16 tokens by a model of
    1.1 million parameters took 240 ms, of which 1 % is five times as much."""
    found = own_work(tmp_path)
    assert 0 < found["calls"] <= 300, found
    assert found["operations"] <= 10 and found["elements"] <= 1000, found


def test_a_gate_costs_at_most_three_percent(tmp_path: Path) -> None:
    """1,300 calls and 500 operations on small tensors took 4 ms of a core, and the step of
    before 190 ms, of which 3 % is 5.7 ms. The model has 25,000 elements: none of ours reads them.
    """
    found = own_work(tmp_path, gate=ZeroVariance())
    assert 0 < found["calls"] <= 1850 and 0 < found["operations"] <= 700, found
    assert found["elements"] <= 15_000, found
