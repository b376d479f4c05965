"""A resumed GRPO run is the uninterrupted one; a checkpoint of another run is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.callbacks.grpo.state import load_run
from onlinesel.data.fingerprint import code_digest
from onlinesel.rl import PassRateBand, Refill, SharedDifficulty, Thompson, ZeroVariance
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer, weights
from tests.callbacks.grpo_resuming import assert_same, cases, train
from tests.callbacks.hosts import make_model
from tests.callbacks.test_hf_distributed import torchrun


@pytest.mark.parametrize("name", sorted(cases()))
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    assert_same(tmp_path, name)


@pytest.mark.slow
def test_resume_on_two_processes_is_bit_identical(tmp_path: Path) -> None:
    printed = torchrun("grpo_resuming", str(tmp_path), port=29616)
    assert {f"same {name}" for name in cases()} <= set(printed.splitlines())


def test_the_comparison_sees_a_lost_state(tmp_path: Path) -> None:
    """Meta-test: without its state the resumed run trains other rows."""
    first, _ = train(tmp_path, "thompson", resume=False)
    for file in (tmp_path / "thompson" / "checkpoint-3").glob("rollouts*"):
        file.unlink()
    with pytest.warns(UserWarning, match="RolloutSelection: .* has no state of the selection"):
        second, _ = train(tmp_path, "thompson", resume=True)
    assert not torch.equal(weights(first), weights(second))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run(tmp_path / "first", None)
    return tmp_path / "first" / "checkpoint-2"


def run(folder: Path, checkpoint: Path | None, rights: Any = (2, 1, 0, 4, 2), **parts: Any) -> Any:
    saving = {"save_strategy": "steps", "save_steps": 2} if checkpoint is None else {}
    steps = 2 if checkpoint is None else 3
    trainer = make_grpo_trainer(folder, rights, max_steps=steps, **saving)
    chosen = {"gate": ZeroVariance(), "refill": Refill(), "prompts": Thompson(), **parts}
    callback = attach(trainer, **chosen)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return callback


def test_state_is_json_and_safetensors(checkpoint: Path) -> None:
    names = sorted(p.name for p in checkpoint.glob("rollouts*"))
    assert names == [
        "rollouts-rank0.json", "rollouts-rank0.safetensors", "rollouts.json",
        "rollouts.safetensors",
    ]  # fmt: skip
    facts = json.loads((checkpoint / "rollouts.json").read_text())
    assert facts["step"] == 2 and facts["prompts"] == repr(Thompson())
    assert facts["totals"]["rollouts"] >= 16


def test_counts_go_on_where_they_were(checkpoint: Path, tmp_path: Path) -> None:
    before = json.loads((checkpoint / "rollouts.json").read_text())["totals"]["rollouts"]
    callback = run(tmp_path / "second", checkpoint)
    assert callback.meter.rollouts > before
    visits = sum(row["visits"] for row in callback.prompt_table())
    assert visits * 4 == callback.meter.rollouts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": PassRateBand()}, "gate must be the checkpoint's"),
        ({"prompts": SharedDifficulty()}, "prompts must be the checkpoint's"),
        ({"prompts": None}, "prompts must be the checkpoint's"),
        ({"seed": 1}, r"seed must be the checkpoint's \(0\), got 1"),
        ({"rights": (2, 1, 0, 4, 2, 3)}, "train_dataset must be the checkpoint's .*'rows': 5"),
        ({"rights": (1, 2, 0, 4, 2)}, "train_dataset must be the checkpoint's"),
    ],
)
def test_another_run_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "second", checkpoint, **changes)


def test_a_damaged_state_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "rollouts.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="RolloutSelection: selection state must be whole"):
        run(tmp_path / "second", checkpoint)


def test_a_checkpoint_without_selection_starts_it_afresh(tmp_path: Path) -> None:
    plain = make_grpo_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    with pytest.warns(UserWarning, match="has no state of the selection, which begins anew"):
        callback = run(tmp_path / "second", tmp_path / "checkpoint-2")
    assert sum(row["visits"] for row in callback.prompt_table()) > 0


def test_other_rewards_are_told(checkpoint: Path, tmp_path: Path) -> None:
    def outcome(completions: Any, **columns: Any) -> list[float]:
        return [0.5 for _ in completions]

    trainer = make_grpo_trainer(tmp_path / "second", (2, 1, 0, 4, 2), max_steps=3, rewards=outcome)
    attach(trainer, gate=ZeroVariance(), refill=Refill(), prompts=Thompson())
    with pytest.warns(
        UserWarning, match=r"reward functions are not all those .* \(outcome changed"
    ):
        load_run(trainer, str(checkpoint), {}, "RolloutSelection")


def test_the_code_of_a_reward_is_recognised() -> None:
    """By what it does: not by comments, its place or the address of an object."""

    class Length:
        def __init__(self, most: int) -> None:
            self.most = most

        def __call__(self, completions: Any, **columns: Any) -> list[float]:
            return [float(len(text) < self.most) for text in completions]

    def limited(most: int) -> Any:
        def short(completions: Any, **columns: Any) -> list[float]:
            return [float(len(text) < most) for text in completions]

        return short

    def also_limited(most: int) -> Any:
        def short(completions: Any, **columns: Any) -> list[float]:
            # The same.
            return [float(len(text) < most) for text in completions]

        return short

    same = [
        (Length(3), Length(3)),
        (limited(3), also_limited(3)),
        (partial(max, 1), partial(max, 1)),
    ]
    assert all(code_digest(a) == code_digest(b) for a, b in same)
    other = [(Length(3), Length(4)), (limited(3), limited(4)), (partial(max, 1), partial(max, 2)),
             (partial(max, 1), partial(min, 1)), (make_model(), torch.nn.Linear(1, 1))]  # fmt: skip
    assert all(code_digest(a) != code_digest(b) for a, b in other)
