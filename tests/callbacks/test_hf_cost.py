"""What the callback itself costs, where it has nothing to choose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.strategies import Uniform
from tests.callbacks.hosts import attach, make_model, make_trainer


@pytest.mark.slow
def test_uniform_with_one_candidate_costs_at_most_two_percent_of_a_step(tmp_path: Path) -> None:
    """CPU time spent in our own code over that of the whole run: 8 rows of 128 tokens, 1.1 M."""
    tokens = torch.randint(1, 2048, (200, 128), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    model = make_model(vocab_size=2048, max_position_embeddings=128, **sizes)
    trainer = make_trainer(
        tmp_path, model=model, rows=rows, per_device_train_batch_size=8, max_steps=20
    )
    callback = attach(trainer, Uniform())
    spent = {"ours": 0.0, "theirs": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - began

        return call

    callback._call["get_batch_samples"] = timed("theirs", callback._call["get_batch_samples"])
    trainer.get_batch_samples = timed("ours", trainer.get_batch_samples)
    callback.on_step_end = timed("ours", callback.on_step_end)  # type: ignore[method-assign]
    began = time.process_time()
    trainer.train()
    whole = time.process_time() - began
    ours = spent["ours"] - spent["theirs"]
    assert spent["theirs"] > 0 and ours > 0
    assert ours < 0.02 * whole, f"{ours:.3f} s of {whole:.3f} s"
