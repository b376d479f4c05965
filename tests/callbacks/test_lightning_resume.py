"""A run that stops anywhere and continues is the run that never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.mixing import ODM, DomainSampler
from onlinesel.strategies import UDS, InfoBatch, SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.hosts import make_rows
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Batches,
    Classifier,
    Language,
    SaveAt,
    Streamed,
    classified,
    equal,
    kept,
    loader,
    make_trainer,
    planned,
    selection,
    state_of,
    text_loader,
)

pytestmark = QUIET_LIGHTNING

ROWS = 50  # 6 whole windows of 2 * 2 * 2 candidates and one of 2: 13 micro-batches


class Epochs(Callback):
    """Note the epochs that begin."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.current_epoch)


class SaveAtEpochEnd(Callback):
    """Save when an epoch has ended; then stop there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        raise KeyError("stop")


def chosen(plans: list[Any]) -> list[dict[int, float]]:
    return [kept(plan) for plan in plans]


def run(strategy: Any, given: Any, *callbacks: Any, path: Any = None, **options: Any) -> Any:
    """Train a classifier; returns what trained in each step and what came out."""
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, **options}
    module = Classifier()
    callback = selection(strategy, candidates=2 if strategy.needs == ("loss",) else 1)
    trainer = make_trainer(*callbacks, callback, **options)
    with planned() as plans:
        try:
            trainer.fit(module, given(), ckpt_path=path)
        except KeyError:
            pass
    return chosen(plans), state_of(module)


def shuffled() -> Any:
    return loader(classified(ROWS), shuffle=True)


@pytest.mark.parametrize("batches", [6, 13, 17], ids=["mid-epoch", "epoch-end", "second-epoch"])
@pytest.mark.parametrize("strategy", [SelectiveBackprop(), InfoBatch()], ids=["scored", "seen"])
def test_stopping_makes_no_difference(strategy: Any, batches: int, tmp_path: Path) -> None:
    """InfoBatch takes every row, 2 and not 4 in a micro-batch, and has 25 of them."""
    if strategy.needs != ("loss",):
        batches = {6: 6, 13: 25, 17: 29}[batches]
    whole, trained = run(strategy, shuffled)
    path = tmp_path / "last.ckpt"
    before, _ = run(strategy, shuffled, SaveAt(path, batches))
    after, resumed = run(strategy, shuffled, path=path)
    assert len(before) == (batches + 1) // 2
    assert before + after == whole
    assert equal(trained, resumed)


def test_a_step_that_was_cut_in_half_is_decided_and_trained_anew(tmp_path: Path) -> None:
    """The gradient of its first micro-batch is in no checkpoint."""
    whole, trained = run(SelectiveBackprop(), shuffled)
    path = tmp_path / "last.ckpt"
    before, _ = run(SelectiveBackprop(), shuffled, SaveAt(path, 7))
    after, resumed = run(SelectiveBackprop(), shuffled, path=path)
    assert before[:-1] + after == whole
    assert equal(trained, resumed)


WITHOUT_SAVING = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@WITHOUT_SAVING
@pytest.mark.parametrize("when", ["steps", "epochs"])
def test_checkpoints_of_lightnings_own_callback(when: str, tmp_path: Path) -> None:
    whole, trained = run(SelectiveBackprop(), shuffled)
    every = {"every_n_train_steps": 3} if when == "steps" else {"every_n_epochs": 1}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    run(SelectiveBackprop(), shuffled, saving, enable_checkpointing=True)
    for step in (3, 12) if when == "steps" else (7,):
        path = tmp_path / f"step={step}.ckpt"
        after, resumed = run(SelectiveBackprop(), shuffled, path=path)
        assert after == whole[step:]
        assert equal(trained, resumed)


class Rotated:
    """Batches of a stream that begins elsewhere in every epoch."""

    def __init__(self) -> None:
        self.batches, self.epoch = list(loader(classified(ROWS))), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(self.batches[self.epoch :] + self.batches[: self.epoch])


@WITHOUT_SAVING
@pytest.mark.parametrize("given", [shuffled, Rotated])
@pytest.mark.parametrize("steps", [3, 7])
def test_runs_that_count_steps(steps: int, given: Any, tmp_path: Path) -> None:
    counted = {"max_epochs": -1, "max_steps": 10}
    whole, trained = run(SelectiveBackprop(), given, **counted)
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=steps)
    halfway = {**counted, "max_steps": steps, "enable_checkpointing": True}
    before, _ = run(SelectiveBackprop(), given, saving, **halfway)
    after, resumed = run(SelectiveBackprop(), given, path=tmp_path / "last.ckpt", **counted)
    assert before + after == whole
    assert equal(trained, resumed)


@pytest.mark.parametrize("given", [shuffled, Rotated])
@pytest.mark.parametrize("counted", [{}, {"max_epochs": -1, "max_steps": 10}])
def test_checkpoints_between_epochs(counted: Any, given: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole, trained = run(SelectiveBackprop(), given, **counted)
    before, _ = run(SelectiveBackprop(), given, SaveAtEpochEnd(path), **counted)
    epochs: list[int] = []
    after, resumed = run(SelectiveBackprop(), given, Epochs(epochs), path=path, **counted)
    assert before + after == whole and equal(trained, resumed)
    assert epochs == [1]


@pytest.mark.parametrize("kind", ["stream", "length"])
@pytest.mark.parametrize("batches", [6, 13, 17], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_loaders_that_are_left_as_they_are(kind: str, batches: int, tmp_path: Path) -> None:
    def given() -> Any:
        return Rotated() if kind == "stream" else Batches(list(loader(classified(ROWS))), 25)

    whole, trained = run(SelectiveBackprop(), given)
    path = tmp_path / "last.ckpt"
    before, _ = run(SelectiveBackprop(), given, SaveAt(path, batches))
    after, resumed = run(SelectiveBackprop(), given, path=path)
    assert len(whole) == 14 and before + after == whole
    assert equal(trained, resumed)


def test_a_schedule_that_asks_for_the_number_of_steps(tmp_path: Path) -> None:
    """Lightning then builds the loader before it restores anything."""

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            self.estimated = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for given in (shuffled, lambda: loader(Streamed(classified(ROWS)))):
        results = []
        path = tmp_path / "last.ckpt"
        for stop, start in ((None, None), (6, None), (None, path)):
            module = Scheduled()
            saving = [] if stop is None else [SaveAt(path, stop)]
            trainer = make_trainer(
                *saving, selection(SelectiveBackprop(), candidates=2),
                accumulate_grad_batches=2, max_epochs=2,
            )  # fmt: skip
            with planned() as plans:
                try:
                    trainer.fit(module, given(), ckpt_path=start)
                except KeyError:
                    pass
            results.append((chosen(plans), state_of(module)))
        assert module.estimated == (14 if given is shuffled else -1)
        (whole, trained), (before, _), (after, resumed) = results
        assert before + after == whole and equal(trained, resumed)


def test_a_language_model_with_a_strategy_that_remembers(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def fit(*callbacks: Any, start: Any = None) -> Any:
        module = Language()
        trainer = make_trainer(*callbacks, OnlineSelection(UDS(), candidates=2), max_steps=6)
        with planned() as plans:
            try:
                trainer.fit(module, text_loader(make_rows(), shuffle=True), ckpt_path=start)
            except KeyError:
                pass
        return chosen(plans), state_of(module)

    (whole, trained), (before, _) = fit(), fit(SaveAt(path, 3))
    after, resumed = fit(start=path)
    assert len(before) == 3 and before + after == whole
    assert equal(trained, resumed)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_another_batch_size_finishes_the_epoch(batch_size: int, tmp_path: Path) -> None:
    """One global order: what is left of it is read, whatever the windows are then."""
    rows, path = classified(ROWS), tmp_path / "last.ckpt"
    before, _ = run(Uniform(), lambda: loader(rows, shuffle=True), SaveAt(path, 6))
    module, validated = Classifier(), loader(rows[:2])
    trainer = make_trainer(
        selection(Uniform()), accumulate_grad_batches=2, max_epochs=2, num_sanity_val_steps=0
    )
    with planned() as plans:
        trainer.fit(module, loader(rows, batch_size, shuffle=True), validated, ckpt_path=path)
    after = [list(ids) for ids in chosen(plans)]
    rest = sum(after[: -(-38 // (2 * batch_size))], [])
    assert sorted(sum(map(list, before), []) + rest) == list(range(ROWS))
    assert sorted(sum(after, [])[len(rest) :]) == list(range(ROWS))
    assert trainer.global_step == len(before) + len(after)
    assert len(module.validated) == 2  # at the end of both epochs


def test_saving_after_the_fit_and_validating_from_a_checkpoint(tmp_path: Path) -> None:
    path, module = tmp_path / "last.ckpt", Classifier()
    callback = selection(SelectiveBackprop(), candidates=2)
    trainer = make_trainer(callback, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, shuffled())
    trainer.save_checkpoint(path)
    other = selection(Uniform())
    trainer = make_trainer(other, max_steps=1)
    trainer.validate(Classifier(), loader(), ckpt_path=path, verbose=False)
    assert other.state_dict() == {}
    trainer.fit(Classifier(), loader())
    assert other.step == 1
    after, resumed = run(SelectiveBackprop(), shuffled, path=path)
    whole, trained = run(SelectiveBackprop(), shuffled)
    assert after == whole[7:] and equal(trained, resumed)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    run(SelectiveBackprop(), shuffled, SaveAt(path, 6))
    with pytest.raises(ValueError, match="LightningSelection: strategy must be the checkpoint's"):
        run(TopLoss(), shuffled, path=path)


def test_a_checkpoint_without_selection_is_refused_in_mid_epoch(tmp_path: Path) -> None:
    middle, end = tmp_path / "middle.ckpt", tmp_path / "end.ckpt"
    for path, batches in ((middle, 6), (end, 25)):
        with pytest.raises(KeyError, match="stop"):
            make_trainer(SaveAt(path, batches), max_epochs=2).fit(
                Classifier(), loader(classified(ROWS))
            )
    with pytest.raises(ValueError, match="checkpoint must be one of a run with LightningSelection"):
        run(TopLoss(), shuffled, path=middle)
    for counted in ({}, {"max_epochs": -1, "max_steps": 25 + 7}):
        after, _ = run(TopLoss(), shuffled, path=end, **counted)
        assert len(after) == 7


def test_a_checkpoint_holds_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    run(InfoBatch(), shuffled, SaveAt(path, 6))
    found = torch.load(path, weights_only=True)["callbacks"]["onlinesel.OnlineSelection"]
    assert found["over"] is False
    assert found["selection"]["step"] == 3 and found["selection"]["data"]["position"] == 12


def test_a_mixture_that_learns_draws_the_same_rows(tmp_path: Path) -> None:
    path, domains = tmp_path / "last.ckpt", torch.tensor([0] * 30 + [1] * 14 + [2] * 6)

    def fit(*callbacks: Any, start: Any = None) -> Any:
        module, order = Classifier(), DomainSampler(domains, ODM(), seed=0)
        trainer = make_trainer(*callbacks, selection(Uniform(), order=order), max_epochs=2)
        with planned() as plans:
            try:
                trainer.fit(module, loader(classified(ROWS)), ckpt_path=start)
            except KeyError:
                pass
        return chosen(plans), state_of(module)

    (whole, trained), (before, _) = fit(), fit(SaveAt(path, 30))
    after, resumed = fit(start=path)
    assert len(before) == 30 and before + after == whole
    assert equal(trained, resumed)
    drawn = [i for step in whole[:25] for i in step]
    assert [sum(int(domains[i]) == d for i in drawn) for d in range(3)] != [30, 14, 6]
