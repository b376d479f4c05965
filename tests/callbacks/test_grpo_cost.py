"""What the callback itself costs where it has nothing to choose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from onlinesel.callbacks.grpo import _WRAPPED
from onlinesel.rl import ZeroVariance
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer, word_parity
from tests.callbacks.hosts import make_model


def own_share(folder: Path, **parts: Any) -> float:
    """Return CPU time in our own code over that of the run: 32 completions of a 1.1 M model."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    trainer = make_grpo_trainer(
        folder, (2,) * 32, known=False, rewards=word_parity, model=make_model(**sizes),
        per_device_train_batch_size=32, max_completion_length=16, max_steps=10,
    )  # fmt: skip
    callback = attach(trainer, **parts)
    spent, depth = {"ours": 0.0, "theirs": 0.0}, {"ours": 0, "theirs": 0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[name] += 1
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[name] -= 1
                if not depth[name]:
                    spent[name] += time.process_time() - began

        return call

    for name in _WRAPPED[1:-1]:  # the loader is built once; the last one is the whole run
        callback._call[name] = timed("theirs", callback._call[name])
        setattr(trainer, name, timed("ours", getattr(trainer, name)))
    began = time.process_time()
    trainer.train()
    whole = time.process_time() - began
    assert spent["theirs"] > 0.2 * whole
    return (spent["ours"] - spent["theirs"]) / whole


@pytest.mark.slow
def test_without_parts_it_costs_at_most_one_percent(tmp_path: Path) -> None:
    share = own_share(tmp_path)
    assert 0 <= share < 0.01, share


@pytest.mark.slow
def test_a_gate_costs_at_most_three_percent(tmp_path: Path) -> None:
    share = own_share(tmp_path, gate=ZeroVariance())
    assert share < 0.03, share
