"""What the Lightning callback trains from: batches of any kind, hooks, loaders, windows."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

import onlinesel
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.strategies import (
    TopLoss,
    Uniform,
)
from tests.callbacks.hosts import make_model
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Batches,
    Classifier,
    Language,
    Streamed,
    classified,
    close,
    kept,
    loader,
    make_trainer,
    naive_steps,
    naive_top,
    planned,
    row_losses,
    selection,
    state_of,
    text_loader,
)

pytestmark = QUIET_LIGHTNING


# Batches ------------------------------------------------------------------------------------


@dataclass
class Pair:
    inputs: torch.Tensor
    labels: torch.Tensor


Named = namedtuple("Named", ["inputs", "labels"])

SHAPES = {
    "dict": (lambda x, y: {"inputs": x, "labels": y}, lambda b: (b["inputs"], b["labels"])),
    "nested": (lambda x, y: [{"x": x}, (y, "text")], lambda b: (b[0]["x"], b[1][0])),
    "dataclass": (Pair, lambda b: (b.inputs, b.labels)),
    "namedtuple": (Named, lambda b: (b.inputs, b.labels)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_keep_their_structure(shape: str) -> None:
    build, take = SHAPES[shape]

    class Shaped(Classifier):
        def losses(self, batch: Any) -> torch.Tensor:
            return super().losses(take(batch))

    def collate(rows: Any) -> Any:
        return build(*torch.utils.data.default_collate(rows))

    def score(module: Any, batch: Any) -> torch.Tensor:
        return module.losses(batch)

    rows, module = classified(), Shaped()
    trainer = make_trainer(selection(TopLoss(), candidates=2, score=score), max_steps=3)
    with planned() as plans:
        trainer.fit(module, loader(rows, collate_fn=collate))
    assert all(type(batch) is type(build(0, 0)) for batch in module.batches)
    assert close(state_of(module), naive_steps(rows, [kept(plan) for plan in plans]))


class Augmented(Classifier):
    """Counts the hooks, and doubles its inputs on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"before {len(batch[1])}")
        return {"x": batch[0], "y": batch[1]}

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"move {len(batch['y'])}")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"after {len(batch['y'])}")
        return batch["x"] * 2, batch["y"]


def test_transfer_hooks_see_every_candidate_once_and_shape_what_is_scored() -> None:
    rows, module = classified(), Augmented()
    trainer = make_trainer(
        selection(TopLoss(), candidates=3), max_steps=1, accumulate_grad_batches=2
    )
    with planned() as plans:
        trainer.fit(module, loader(rows))
    assert module.calls == ["before 6", "move 6", "after 6"] * 2
    doubled = [(x * 2, y) for x, y in rows]
    expected = naive_top(doubled, [range(12)], 3)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(doubled, expected))


class Data(LightningDataModule):
    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> Any:
        return loader(self.rows)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]


def test_a_datamodule_gives_loader_and_hooks() -> None:
    rows, module = classified(), Classifier()
    with planned() as plans:
        make_trainer(selection(TopLoss(), candidates=2), max_steps=2).fit(module, Data(rows))
    doubled = [(x * 2, y) for x, y in rows]
    expected = naive_top(doubled, [range(4), range(4, 8)], 2)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(doubled, expected))


def test_a_loader_of_the_module_itself() -> None:
    class Own(Classifier):
        def train_dataloader(self) -> Any:
            return loader()

    with planned() as plans:
        make_trainer(selection(Uniform()), max_steps=2).fit(Own())
    assert [list(kept(plan)) for plan in plans] == [[0, 1], [2, 3]]


def test_ids_and_groups_come_from_columns_and_leave_the_batch() -> None:
    class Dicts(Classifier):
        def losses(self, batch: Any) -> torch.Tensor:
            return super().losses((batch["x"], batch["y"]))

    rows = [{"x": x, "y": y, "number": 100 + i} for i, (x, y) in enumerate(classified())]
    module = Dicts()
    with planned() as plans:
        make_trainer(selection(Uniform(), ids="number"), max_steps=1).fit(module, loader(rows))
    assert set(module.batches[0]) == {"x", "y"} and list(kept(plans[0])) == [100, 101]


# Loaders without length, limits, windows ----------------------------------------------------


def test_a_loader_without_length_is_decided_at_the_transfer() -> None:
    """Lightning fetches one micro-batch ahead of it; the decision must not be made with it."""
    rows, module = classified(22), Classifier()
    trainer = make_trainer(
        selection(TopLoss(), candidates=2), accumulate_grad_batches=2, max_epochs=2
    )
    with planned() as plans:
        trainer.fit(module, loader(Streamed(rows)))
    windows = [range(0, 8), range(8, 16), range(16, 22)] * 2
    losses = [plan.decisions[0][0].loss for plan in plans]
    module = Classifier()
    steps: list[dict[int, float]] = []
    expected = naive_top(rows, windows, 2)
    for window, found, step in zip(windows, losses, expected, strict=True):
        module.load_state_dict(naive_steps(rows, steps))
        assert torch.allclose(found, row_losses(module, rows, window), atol=1e-5)
        steps.append(step)
    assert trainer.global_step == 6


def test_a_limit_on_batches_cuts_the_last_window() -> None:
    rows, module = classified(), Classifier()
    trainer = make_trainer(
        selection(TopLoss(), candidates=2), accumulate_grad_batches=2, limit_train_batches=3
    )
    with planned() as plans:
        trainer.fit(module, loader(rows))
    expected = naive_top(rows, [range(0, 8), range(8, 12)], 2)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(rows, expected))


def test_a_loader_that_ends_before_its_length_still_steps() -> None:
    rows, module = classified(6), Classifier()
    trainer = make_trainer(
        selection(Uniform(), candidates=1), accumulate_grad_batches=2, max_epochs=1
    )
    trainer.fit(module, Batches(loader(rows), 20))
    assert trainer.global_step == 2
    assert close(
        state_of(module), naive_steps(rows, [dict.fromkeys(range(4), 1.0), {4: 1.0, 5: 1.0}])
    )


def test_accumulation_may_change_between_epochs() -> None:
    rows, module = classified(16), Classifier()
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    trainer = make_trainer(selection(TopLoss(), candidates=2), schedule, max_epochs=2)
    with planned() as plans:
        trainer.fit(module, loader(rows))
    windows = [range(i, i + 4) for i in range(0, 16, 4)] + [range(0, 8), range(8, 16)]
    expected = naive_top(rows, windows, 2)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(rows, expected))


def test_a_module_may_skip_the_rest_of_an_epoch() -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 2 else None

    module = Skipping()
    with planned() as plans:
        make_trainer(selection(Uniform()), max_epochs=2).fit(module, loader(classified(8)))
    assert [list(kept(plan)) for plan in plans] == [[0, 1], [2, 3], [4, 5]] * 2
    assert onlinesel.weighted_mean(torch.tensor([1.0, 3.0])) == 2.0


def test_workers_are_seeded_as_lightning_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    rows, batches = classified(), loader(num_workers=1)
    with planned() as plans:
        make_trainer(selection(TopLoss(), candidates=2), max_steps=2).fit(Classifier(), batches)
    assert batches.worker_init_fn is not None
    assert [kept(plan) for plan in plans] == naive_top(rows, [range(4), range(4, 8)], 2)
    make_trainer(selection(Uniform()), max_steps=1).fit(Classifier(), Batches(list(loader()), 24))


def test_a_copy_of_the_module_copies_no_trainer() -> None:
    """Callbacks that average weights copy the module while it is wrapped."""
    copies = []

    class Copying(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.trainer = None
            copies.append(copy.deepcopy(pl_module))
            pl_module.trainer = trainer

    module = Classifier()
    make_trainer(selection(TopLoss(), candidates=2), Copying(), max_steps=1).fit(module, loader())
    assert close(state_of(copies[0]), naive_steps(classified(), []))
    wrapped = vars(copies[0])["_on_before_batch_transfer"]
    assert wrapped([1], 0) == [1]  # a function, shared and not copied


def test_a_strategy_may_ask_for_the_loader_before_there_is_a_model() -> None:
    """DeepSpeed's does, to learn the batch size, before it shards a model that is not there yet."""

    class Late(Language):
        def __init__(self) -> None:
            super().__init__()
            del self.model

        def configure_model(self) -> None:
            asked.append(self.trainer.fit_loop._data_source.dataloader())
            self.model = make_model()

    asked: list[Any] = []
    trained = []
    for module in (Late(), Language()):
        with planned() as plans:
            trainer = make_trainer(OnlineSelection(TopLoss(), candidates=2), max_steps=2)
            trainer.fit(module, text_loader())
        trained.append([kept(plan) for plan in plans])
    assert len(asked) == 1 and trained[0] == trained[1]
