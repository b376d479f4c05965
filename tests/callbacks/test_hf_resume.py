"""A resumed run is the uninterrupted one; a checkpoint that cannot be is refused, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onlinesel import Selector
from onlinesel.callbacks._shared.checkpoint import save_selection
from onlinesel.callbacks.hf.state import save_run
from onlinesel.strategies import SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.hosts import attach, make_trainer
from tests.callbacks.resuming import assert_same, cases
from tests.callbacks.test_hf_distributed import torchrun


@pytest.mark.parametrize("name", sorted(cases()))
def test_resume_in_mid_epoch_is_bit_identical(tmp_path: Path, name: str) -> None:
    assert_same(tmp_path, name)


@pytest.mark.slow
def test_resume_on_two_processes_is_bit_identical(tmp_path: Path) -> None:
    printed = torchrun("resuming", str(tmp_path), port=29612)
    assert {f"same {name}" for name in cases()} <= set(printed.splitlines())


def test_the_comparison_sees_a_lost_state(tmp_path: Path) -> None:
    """Meta-test: without its state the resumed run chooses other rows."""
    import tests.callbacks.resuming as resuming

    resuming.train(tmp_path, "SelectiveBackprop", resume=False)
    for file in (tmp_path / "SelectiveBackprop" / f"checkpoint-{resuming.STOP}").glob("selection*"):
        file.unlink()
    _, whole = resuming.train(tmp_path / "again", "SelectiveBackprop", resume=False)
    with pytest.warns(UserWarning, match="has no state of the selection"):
        _, resumed = resuming.train(tmp_path, "SelectiveBackprop", resume=True)
    pairs = zip(whole[resuming.STOP :], resumed, strict=True)
    assert any(not torch.equal(a["weights"], b["weights"]) for a, b in pairs)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    attach(trainer, SelectiveBackprop(), candidates=2)
    trainer.train()
    return tmp_path / "checkpoint-2"


def resume(folder: Path, checkpoint: Path, strategy: object, **options: object) -> None:
    trainer = make_trainer(folder, max_steps=3)
    attach(trainer, strategy, **{"candidates": 2, **options})
    trainer.train(resume_from_checkpoint=str(checkpoint))


def test_state_is_json_and_safetensors(checkpoint: Path) -> None:
    names = sorted(p.name for p in checkpoint.glob("selection*"))
    assert names == ["selection.json", "selection.safetensors"]
    facts = json.loads((checkpoint / "selection.json").read_text())
    assert facts["step"] == 2 and facts["strategy"] == repr(SelectiveBackprop())


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (TopLoss(), {}, "strategy must be the checkpoint's"),
        (SelectiveBackprop(beta=3.0), {}, "strategy must be the checkpoint's"),
        (
            SelectiveBackprop(),
            {"candidates": 3},
            r"candidates must be the checkpoint's \(2\), got 3",
        ),
        (SelectiveBackprop(), {"scope": "batch"}, "scope must be the checkpoint's"),
        (SelectiveBackprop(), {"ids": "hash"}, "ids must be the checkpoint's .auto., got hash"),
        (SelectiveBackprop(), {"normalize": "samples"}, "normalize must be the checkpoint's"),
        (SelectiveBackprop(), {"seed": 1}, r"seed must be the checkpoint's \(0\), got 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, checkpoint: Path, strategy: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "other", checkpoint, strategy, **options)


def test_a_truncated_state_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    file = checkpoint / "selection.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="selection state must be whole"):
        resume(tmp_path / "other", checkpoint, SelectiveBackprop())


def test_half_a_state_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "selection.json").unlink()
    with pytest.raises(ValueError, match="must hold selection.json and selection.safetensors"):
        resume(tmp_path / "other", checkpoint, SelectiveBackprop())


def test_damaged_json_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "selection.json").write_text('{"format": 1, "sha')
    with pytest.raises(ValueError, match="must hold selection.json.*JSONDecodeError"):
        resume(tmp_path / "other", checkpoint, SelectiveBackprop())


def test_a_checkpoint_without_selection_starts_it_afresh(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    trainer = make_trainer(tmp_path / "other", max_steps=3)
    callback = attach(trainer, Uniform(), candidates=2)
    with pytest.warns(UserWarning, match="has no state of the selection, which begins anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.selector.step == 3


def test_states_of_ranks_do_not_fit_one_for_all(tmp_path: Path, checkpoint: Path) -> None:
    for suffix in ("json", "safetensors"):
        (checkpoint / f"selection.{suffix}").rename(checkpoint / f"selection-rank0.{suffix}")
    with pytest.raises(ValueError, match=r"scope must be the checkpoint's \(global\), got rank"):
        resume(tmp_path / "other", checkpoint, SelectiveBackprop(), scope="rank")


@pytest.mark.parametrize("processes", [None, 2])
def test_states_of_another_number_of_processes_are_removed(
    tmp_path: Path, processes: int | None
) -> None:
    """A checkpoint folder that is written again must not hold two truths."""
    tensors = {"generator": torch.zeros(1)}
    for rank in (None, 0, 1, 2):
        save_selection(tmp_path, tensors, {}, rank=rank)
    save_selection(tmp_path, tensors, {}, rank=None, name="selection-of-mine")
    rank, facts = None if processes is None else 0, {"world_size": processes or 1}
    save_run(str(tmp_path), Selector(Uniform()), None, facts, rank)
    stems = {path.stem for path in tmp_path.iterdir()} - {"selection-of-mine"}
    assert stems == ({"selection"} if rank is None else {"selection-rank0", "selection-rank1"})
