"""A resumed run of the Trainer is the uninterrupted one, whatever the order is drawn from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from onlinesel.strategies import SelectiveBackprop, Uniform
from tests.callbacks.hosts import attach, make_model, make_rows, make_trainer

ROWS = 20


class Shuffled(IterableDataset[Any]):
    """A stream that draws its order anew in each pass, from a generator of the program."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        order = list(range(ROWS))
        if self.kind == "python":
            random.shuffle(order)
        else:
            order = torch.randperm(ROWS).tolist()
        data = make_rows(ROWS)
        return (data[i] for i in order)


class Counted(Shuffled):
    """The same, with a length."""

    def __len__(self) -> int:
        return ROWS


def make_data(kind: str) -> Any:
    if kind == "stream of datasets":
        stream = Dataset.from_list(make_rows(ROWS)).to_iterable_dataset(num_shards=2)
        return stream.shuffle(seed=3, buffer_size=7)
    if kind.startswith("stream"):
        return Shuffled(kind.partition(" ")[2])
    return Counted("torch") if kind == "counted stream" else make_rows(ROWS)


SETTINGS: dict[str, dict[str, Any]] = {
    "length groups": {"train_sampling_strategy": "group_by_length"},
    "unseeded": {"accelerator_config": {"use_seedable_sampler": False}},
    "seeded": {},
    "stream torch": {},
    "stream python": {},
    "stream of datasets": {},
    "counted stream": {},
}


def run(folder: str, kind: str, steps: int, save: int, resume: bool, **options: Any) -> Any:
    """Train; returns the ids and weights of every step, and the final parameters."""
    changes = {k: options.pop(k) for k in ("gradient_accumulation_steps",) if k in options}
    model = make_model(attention_dropout=0.1)
    trainer = make_trainer(
        folder, model=model, rows=make_data(kind), max_steps=steps, save_strategy="steps",
        save_steps=save, save_total_limit=None, learning_rate=0.05, **SETTINGS[kind], **changes,
    )  # fmt: skip
    callback = attach(trainer, **options)
    seen = []
    decided = callback._meter.decided

    def note(plan: Any) -> None:
        seen.extend((s.row_ids().tolist(), w.weights.tolist()) for s, w in plan.decisions)
        decided(plan)

    callback._meter.decided = note  # type: ignore[method-assign]
    torch.manual_seed(0)  # as each process has it that runs the same program
    random.seed(0)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{save}" if resume else None)
    return seen, [p.detach().clone() for p in model.parameters()]


def assert_same(kind: str, stop: int, **options: Any) -> None:
    with TemporaryDirectory() as folder:
        seen, whole = run(folder, kind, 8, stop, False, **options)
        rest, resumed = run(folder, kind, 8, stop, True, **options)
    # A stream's last micro-batches that fill no step are decided about and wait for the next one.
    assert len(rest) >= 8 - stop and rest == seen[len(seen) - len(rest) :]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_goes_on_in_the_second_epoch(kind: str) -> None:
    """An epoch has five steps."""
    assert_same(kind, 7, strategy=SelectiveBackprop(), candidates=2)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(sorted(SETTINGS)),
    stop=st.integers(1, 7),
    candidates=st.integers(1, 3),
    accumulate=st.integers(1, 2),
)
def test_it_goes_on_anywhere(kind: str, stop: int, candidates: int, accumulate: int) -> None:
    assert_same(
        kind, stop, strategy=Uniform(), candidates=candidates,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip


def interrupted(folder: Path, **changes: Any) -> str:
    trainer = make_trainer(folder, max_steps=2, save_strategy="steps", save_steps=2, **changes)
    attach(trainer, SelectiveBackprop(), candidates=2)
    trainer.train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    "other",
    [make_rows()[::-1], make_rows()[1:], [*make_rows(), make_rows()[0]], make_rows(seed=1)],
    ids=["reversed", "fewer", "more", "others"],
)
def test_other_rows_are_refused(tmp_path: Path, other: Any) -> None:
    checkpoint = interrupted(tmp_path)
    trainer = make_trainer(tmp_path / "other", max_steps=3, rows=other)
    attach(trainer, SelectiveBackprop(), candidates=2)
    with pytest.raises(ValueError, match="train_dataset must be the checkpoint's .*, got .*rows"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 0
    anew = make_trainer(tmp_path / "anew", max_steps=3, rows=other, ignore_data_skip=True)
    attach(anew, SelectiveBackprop(), candidates=2)
    with pytest.warns(UserWarning, match="holds other rows than the checkpoint's"):
        anew.train(resume_from_checkpoint=checkpoint)
    assert anew.state.global_step == 3


def test_a_checkpoint_of_the_model_alone_is_said_to_hold_no_selection(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path, save_only_model=True)
    trainer = make_trainer(tmp_path / "other", max_steps=3)
    callback = attach(trainer, SelectiveBackprop(), candidates=2, record=tmp_path / "record")
    with pytest.warns(UserWarning, match="has no state of the selection.*save_only_model"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert callback.selector.step == 3


def test_length_groups_go_on_with_as_many_processes_only(tmp_path: Path) -> None:
    """Two processes with half the batch read as many rows a step, but in another order."""
    changes = {"train_sampling_strategy": "group_by_length"}
    checkpoint = interrupted(tmp_path, **changes)
    trainer = make_trainer(tmp_path / "other", max_steps=3, **changes)
    callback = attach(trainer, SelectiveBackprop(), candidates=2)
    begin = callback._data.begin

    def from_two(facts: Any, *args: Any) -> None:
        begin({**facts, "world_size": 2}, *args)

    callback._data.begin = from_two  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="order of the rows must be a function of seed and epoch"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_workers_that_persist_are_told(tmp_path: Path) -> None:
    changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    checkpoint = interrupted(tmp_path, **changes)
    trainer = make_trainer(tmp_path / "other", max_steps=3, **changes)
    attach(trainer, SelectiveBackprop(), candidates=2)
    with pytest.warns(UserWarning, match="with dataloader_persistent_workers torch draws a number"):
        trainer.train(resume_from_checkpoint=checkpoint)
