"""A refill goes on in the loader's order, and no problem comes before its turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from onlinesel.rl import Refill, Thompson, UniformPrompts, ZeroVariance
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer, spy, weights

RIGHTS = (2, 0, 1, 4, 3, 0, 2, 2, 0, 4, 1, 3)
GATE = {"gate": ZeroVariance(), "refill": Refill(max_rounds=4, oversample=1.0)}


def rolled_out(trainer: Any) -> list[int]:
    """Note every problem that is generated for, in order, by its prompt."""
    texts = [" ".join(f"w{2 + (7 * i + j) % 60}" for j in range(2 + i % 3)) for i in range(60)]
    seen: list[int] = []
    generate = trainer._generate

    def noted(prompts: list[str]) -> Any:
        seen.extend(texts.index(prompt) for prompt in prompts[:: trainer.num_generations])
        return generate(prompts)

    trainer._generate = noted
    return seen


def run(folder: Path, rights: Sequence[float], gate: bool = True, **setting: Any) -> list[int]:
    trainer = make_grpo_trainer(folder, rights, **setting)
    seen = rolled_out(trainer)
    if gate:
        attach(trainer, **GATE)
    trainer.train()
    return seen


def shuffled_order(rows: int, groups: int) -> Iterator[int]:
    """The reference: TRL's own sampler, each problem of each epoch once."""
    sampler = RepeatSampler(range(rows), 1, batch_size=groups, shuffle=True, seed=5)
    while True:
        yield from sampler


def epochs_without_repeats(seen: list[int], rows: int) -> list[list[int]]:
    """Cut the problems into epochs, in which none may come twice."""
    epochs: list[list[int]] = []
    for start in range(0, len(seen), rows):
        epoch = seen[start : start + rows]
        assert len(set(epoch)) == len(epoch), epoch
        epochs.append(epoch)
    return epochs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("setting", [{}, {"num_iterations": 2, "steps_per_generation": 2}])
def test_a_curriculum_is_rolled_out_in_its_order(
    tmp_path: Path, stream: bool, setting: dict[str, Any]
) -> None:
    steps = 10 if setting else 6
    seen = run(tmp_path, RIGHTS, stream=stream, max_steps=steps, **setting)
    assert len(seen) > 12  # more than an epoch, of which plain training takes less than one
    assert seen == list(islice(cycle(range(12)), len(seen)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_shuffled_loader_is_followed_too(tmp_path: Path, stream: bool) -> None:
    seen = run(tmp_path, RIGHTS, shuffle_dataset=True, max_steps=9, stream=stream, seed=5)
    assert len(seen) > 20
    first, *_ = epochs_without_repeats(seen, 12)
    assert first != sorted(first)
    if not stream:
        assert seen == list(islice(shuffled_order(12, 2), len(seen)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        {"shuffle_dataset": True, "max_steps": 9},
        {"shuffle_dataset": False, "max_steps": 9},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2,
         "per_device_train_batch_size": 4, "shuffle_dataset": True, "max_steps": 9},
    ],
)  # fmt: skip
def test_with_nothing_to_fill_it_is_the_loader(
    tmp_path: Path, stream: bool, setting: dict[str, Any]
) -> None:
    """Two epochs and more; seven problems, one of which fills no batch."""
    found, moved = [], []
    for gate in (True, False):
        trainer = make_grpo_trainer(tmp_path, (2, 1, 3, 2, 1, 3, 2), stream=stream, **setting)
        seen, before = rolled_out(trainer), weights(trainer)
        if gate:
            attach(trainer, **GATE)
        trainer.train()
        found.append(seen)
        moved.append(before - weights(trainer))
    assert found[0] == found[1] and len(found[0]) >= 8
    assert torch.equal(*moved) and bool(moved[0].any())


def test_a_problem_is_rolled_out_once_in_a_batch(tmp_path: Path) -> None:
    """Four problems, shuffled anew in each epoch: the refill passes over those it has had."""
    trainer = make_grpo_trainer(tmp_path, (0, 4, 0, 4), shuffle_dataset=True, max_steps=6)
    seen = rolled_out(trainer)
    attach(trainer, gate=ZeroVariance(), refill=Refill(max_rounds=20, patience=99))
    trainer.train()
    assert len(seen) == 24
    for start in range(0, 24, 4):
        assert sorted(seen[start : start + 4]) == [0, 1, 2, 3]


class ByLength(RepeatSampler):
    """The shortest prompts first."""

    def __init__(self, lengths: list[int], **settings: Any) -> None:
        super().__init__(lengths, shuffle=False, **settings)
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__)

    def __iter__(self) -> Iterator[int]:
        return (self.order[i] for i in super().__iter__())


class OwnSampler(GRPOTrainer):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        assert dataset.column_names == ["prompt", "rights"]
        return ByLength(
            [len(prompt.split()) for prompt in self.train_dataset["prompt"]],
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
        )


@pytest.mark.parametrize("parts", [{}, {"gate": ZeroVariance()}, GATE])
def test_an_own_sampler_reads_columns_and_is_followed(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    trainer = make_grpo_trainer(tmp_path, RIGHTS, kind=OwnSampler, max_steps=5)
    seen = rolled_out(trainer)
    attach(trainer, **parts)
    trainer.train()
    order = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert seen == list(islice(cycle(order), len(seen)))
    assert len(seen) > 10 if "refill" in parts else len(seen) == 10


class Weighted(GRPOTrainer):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return WeightedRandomSampler([1.0] * len(dataset), 64)


def test_a_sampler_that_does_not_repeat_problems_is_refused(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, RIGHTS, kind=Weighted, max_steps=1)
    attach(trainer, **GATE)
    with pytest.raises(ValueError, match="sampler must be one that gives every problem 4 times in"):
        trainer.train()


class OwnLoader(GRPOTrainer):
    def get_train_dataloader(self) -> Any:
        rows = [self.train_dataset[i] for i in reversed(range(12)) for _ in range(4)]
        return DataLoader(rows, batch_size=8, collate_fn=list)


def test_a_loader_in_another_order_is_refused_where_it_is_followed(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, RIGHTS, kind=OwnLoader, max_steps=1)
    attach(trainer, **GATE)
    with pytest.raises(ValueError, match="loader must be in the order of .*_get_train_sampler for"):
        trainer.train()
    for parts in ({"gate": ZeroVariance()}, {**GATE, "prompts": UniformPrompts()}):
        trainer = make_grpo_trainer(tmp_path, RIGHTS, kind=OwnLoader, max_steps=1)
        attach(trainer, **parts)
        made = spy(trainer)
        trainer.train()
        assert len(made) == 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_plain_checkpoint_goes_on_where_its_loader_does(tmp_path: Path, skip: bool) -> None:
    plain = make_grpo_trainer(tmp_path, RIGHTS, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    trainer = make_grpo_trainer(tmp_path, RIGHTS, max_steps=4, ignore_data_skip=skip)
    seen = rolled_out(trainer)
    attach(trainer, **GATE)
    with pytest.warns(UserWarning, match="has no state of the selection"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    start = 0 if skip else 4
    assert seen == list(islice(cycle(range(12)), start, start + len(seen)))


def test_a_stream_can_be_refilled_but_not_asked_for_a_problem(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, RIGHTS, stream=True, max_steps=2)
    with pytest.raises(ValueError, match="train_dataset must be one with row numbers for prompts="):
        attach(trainer, **GATE, prompts=Thompson())
    callback = attach(trainer, **GATE)
    made = spy(trainer)
    trainer.train()
    assert [len(batch["prompt_ids"]) for batch in made] == [8, 8]
    assert callback.prompt_table() == []


def test_a_stream_without_a_whole_batch_is_told(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (2,), stream=True, max_steps=1)
    attach(trainer, **GATE)
    maker = trainer.callback_handler.callbacks[-1]
    maker._begin(None)
    with pytest.raises(ValueError, match="train_dataset must be of at least 2 problems, one gener"):
        maker._maker.filler.order.propose(2)
