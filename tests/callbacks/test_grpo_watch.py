"""A run that has nothing to learn from says so, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.rl import Refill, UniformPrompts, ZeroVariance
from tests.callbacks.grpo_hosts import (
    attach,
    losses,
    make_grpo_trainer,
    outcome,
    rows,
    spy,
    weights,
)
from tests.callbacks.test_grpo_filter import ALL, NAN, step


def test_a_gate_that_never_opens_ends_the_run_if_asked_to(tmp_path: Path) -> None:
    options = {"gate": ZeroVariance(), "refill": Refill(max_rounds=0, patience=3)}
    with pytest.raises(ValueError, match="gate must keep a group now and then, got none in 3 batc"):
        step(tmp_path, (0, 4, 0), options, max_steps=5)


@pytest.mark.parametrize("refill", [None, Refill(max_rounds=0, on_short="skip")])
def test_a_gate_that_finds_nothing_for_long_warns_and_goes_on(tmp_path: Path, refill: Any) -> None:
    """The policy solves nothing for 20 batches, then one problem of three."""
    calls: list[int] = []

    def late(completions: list[str], **kwargs: Any) -> list[float | None]:
        calls.append(1)
        values = outcome(completions, **kwargs)
        return values if len(calls) > 20 else [0.0 for _ in values]

    late.__name__ = "outcome"
    trainer = make_grpo_trainer(tmp_path, (2, 2, 2), rewards=late, **{**ALL, "max_steps": 21})
    attach(trainer, gate=ZeroVariance(), refill=refill)
    made, before = spy(trainer), weights(trainer)
    with pytest.warns(UserWarning, match="kept no group in 20 batches in a row .*reward was 0"):
        trainer.train()
    assert losses(trainer)[:20] == [0.0] * 20
    assert [len(rows(batch)) for batch in made] == [0] * 20 + [12]
    alone = make_grpo_trainer(tmp_path, (2, 2, 2), **ALL)
    start = weights(alone)
    alone.train()
    assert torch.equal(before, start)
    assert torch.allclose(before - weights(trainer), start - weights(alone), atol=1e-6)


@pytest.mark.parametrize(
    ("rights", "batches", "told"),
    [(0, 10, "reward was 0"), (4, 10, "reward was 1"), (NAN, 3, "reward was None")],
)
def test_rewards_that_teach_nothing_are_said(
    tmp_path: Path, rights: float, batches: int, told: str
) -> None:
    """Without a gate; once, and not for batches of which some group teaches."""
    for count in (batches - 1, batches):
        trainer = make_grpo_trainer(tmp_path, (rights,) * 3, **{**ALL, "max_steps": count})
        attach(trainer, prompts=UniformPrompts())
        if count < batches:
            trainer.train()
            continue
        with pytest.warns(UserWarning, match=f"{batches} batches in a row .*{told}.*prompts="):
            trainer.train()


def test_batches_that_are_always_too_short_are_said(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (2, 0, 4), **{**ALL, "max_steps": 20})
    attach(trainer, gate=ZeroVariance(), refill=Refill(max_rounds=0, on_short="skip"))
    with pytest.warns(UserWarning, match="20 batches in a row were left too short by the gate"):
        trainer.train()


def test_batches_are_counted_on_after_a_checkpoint(tmp_path: Path) -> None:
    setting = {**ALL, "max_steps": 12, "save_strategy": "steps", "save_steps": 12}
    first = make_grpo_trainer(tmp_path, (0,) * 3, **setting)
    attach(first, gate=ZeroVariance())
    first.train()
    second = make_grpo_trainer(tmp_path, (0,) * 3, **{**ALL, "max_steps": 20})
    attach(second, gate=ZeroVariance())
    with pytest.warns(UserWarning, match="kept no group in 20 batches in a row"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
