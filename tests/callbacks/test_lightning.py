"""The Lightning callback: the gradient of a step, and what stays as it was."""

from __future__ import annotations

import csv
import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger

import onlinesel
from onlinesel.callbacks import lightning as host
from onlinesel.callbacks._shared.meter import StepMeter
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.ledger import Ledger
from onlinesel.strategies import (
    UDS,
    InfoBatch,
    LossReweight,
    SelectiveBackprop,
    TopLoss,
    Uniform,
)
from tests.callbacks.hosts import LEARNING_RATE, choices, make_rows, reference_gradient
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Batches,
    Classifier,
    Language,
    Manual,
    Streamed,
    classified,
    close,
    equal,
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


# The gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_subset_applies_the_gradient_of_a_naive_loop(candidates: int, accumulate: int) -> None:
    """50 rows are no whole number of windows: the last one is shorter."""
    rows, module = classified(50), Classifier()
    callback = selection(TopLoss(), candidates=candidates)
    trainer = make_trainer(callback, accumulate_grad_batches=accumulate)
    with planned() as plans:
        trainer.fit(module, loader(rows))
    size = 2 * candidates * accumulate
    windows = [range(i, min(i + size, 50)) for i in range(0, 50, size)]
    expected = naive_top(rows, windows, candidates)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(rows, expected))
    assert trainer.global_step == callback.step == callback.selector.step == len(windows)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_apply_the_gradient_of_a_naive_loop(accumulate: int) -> None:
    rows, module = classified(46), Classifier()
    trainer = make_trainer(selection(LossReweight(min_rows=2)), accumulate_grad_batches=accumulate)
    with planned() as plans:
        trainer.fit(module, loader(rows, batch_size=4))
    steps = [kept(plan) for plan in plans]
    assert len({round(w, 3) for step in steps for w in step.values()}) > 1
    assert sorted(i for step in steps for i in step) == list(range(46))
    assert close(state_of(module), naive_steps(rows, steps))


@pytest.mark.parametrize("normalize", ["tokens", "samples"])
def test_a_language_model_applies_the_loss_contract(normalize: str) -> None:
    rows, module = make_rows(), Language()
    before = state_of(module.model)
    callback = OnlineSelection(TopLoss(), candidates=2, normalize=normalize)
    trainer = make_trainer(callback, accumulate_grad_batches=3, max_steps=1)
    with planned() as plans:
        trainer.fit(module, text_loader(rows))
    weights = kept(plans[0])
    after = state_of(module.model)
    assert len(weights) == 6 and not set(weights) - set(range(12))
    module.model.load_state_dict(before)
    gradient, _ = reference_gradient(
        module.model, rows, list(weights), list(weights.values()), normalize
    )
    for name, part in gradient.items():
        moved = (before[name] - after[name]) / LEARNING_RATE
        assert torch.allclose(moved, part, rtol=1e-4, atol=1e-6)


def test_methods_that_need_no_logits_choose_as_in_a_plain_loop() -> None:
    rows = make_rows()
    with planned() as here:
        make_trainer(OnlineSelection(UDS(), candidates=2), max_steps=3).fit(
            Language(), text_loader(rows, shuffle=True)
        )
    from tests.callbacks.loop_hosts import make_loader, make_model, sgd, train

    model = make_model()
    steps = onlinesel.steps(make_loader(rows=rows), model, UDS(), candidates=2)
    with planned() as there:
        train(steps, model, sgd(model), stop=3)
    assert [kept(plan) for plan in here] == [kept(plan) for plan in there]


def test_uniform_with_one_candidate_changes_nothing() -> None:
    plain, chosen = Classifier(weighs=False), Classifier()
    make_trainer(max_epochs=2).fit(plain, loader())
    make_trainer(selection(Uniform()), max_epochs=2).fit(chosen, loader())
    assert equal(state_of(plain), state_of(chosen))
    pairs = zip(plain.batches, chosen.batches, strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_shuffled_rows_come_once_an_epoch_in_an_order_of_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        with planned() as plans:
            trainer = make_trainer(selection(Uniform(), seed=seed), max_epochs=2)
            trainer.fit(Classifier(), loader(shuffle=True))
        return [list(kept(plan)) for plan in plans]

    first = order(0)
    assert first == order(0) != order(1)
    assert sorted(sum(first[:24], [])) == sorted(sum(first[24:], [])) == list(range(48))
    assert first[:24] != first[24:]


def test_a_step_without_rows_moves_nothing() -> None:
    def nothing(module: Any, batch: Any) -> torch.Tensor:
        return torch.full((len(batch[1]),), torch.nan)

    module = Classifier()
    before = state_of(module)
    make_trainer(selection(TopLoss(), candidates=2, score=nothing), max_steps=2).fit(
        module, loader()
    )
    assert equal(before, state_of(module)) and [len(b[1]) for b in module.batches] == [1, 1]


def test_a_method_learns_from_the_rows_that_trained() -> None:
    rows, callback = classified(), selection(InfoBatch())
    make_trainer(callback, accumulate_grad_batches=2).fit(Classifier(), loader(rows))
    tensors = callback.selector.state_dict()["tensors"]
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    ledger = Ledger.from_state(state)
    first = row_losses(Classifier(), rows, range(4)).detach()  # of the first step, both parts
    assert torch.allclose(ledger.lookup(torch.arange(4), "loss"), first, atol=1e-5)
    assert torch.isfinite(ledger.lookup(torch.arange(48), "loss")).all()


# Optimization -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization(every: int) -> None:
    rows, module = classified(16), Manual(every)
    callback = selection(TopLoss(), candidates=2, accumulate=None if every == 1 else every)
    with planned() as plans:
        make_trainer(callback).fit(module, loader(rows))
    size = 4 * every
    expected = naive_top(rows, [range(i, i + size) for i in range(0, 16, size)], 2)
    assert [kept(plan) for plan in plans] == expected
    assert close(state_of(module), naive_steps(rows, expected))


def test_a_plain_mean_is_fine_where_it_is_exact() -> None:
    rows, module = classified(16), Classifier(weighs=False)
    make_trainer(selection(TopLoss(), candidates=2)).fit(module, loader(rows))
    expected = naive_top(rows, [range(i, i + 4) for i in range(0, 16, 4)], 2)
    assert close(state_of(module), naive_steps(rows, expected))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [(Uniform(), {"accumulate_grad_batches": 2}), (LossReweight(min_rows=2), {})],
)
def test_a_loss_of_its_own_is_refused_where_it_is_not(strategy: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="training_step must be one that returns onlinesel"):
        make_trainer(selection(strategy), **options).fit(Classifier(weighs=False), loader())


def test_manual_optimization_without_the_weights_is_refused_too() -> None:
    class Own(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.losses(batch).mean())
            self.optimizers().step()

    with pytest.raises(ValueError, match="training_step must be one that returns onlinesel"):
        make_trainer(selection(LossReweight(min_rows=2))).fit(Own(), loader())


def test_a_mean_over_tokens_is_no_mean_over_rows() -> None:
    class Plain(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

    per_token, per_row = (
        OnlineSelection(TopLoss(), candidates=2, normalize=n) for n in ("tokens", "samples")
    )
    make_trainer(per_token, max_steps=1).fit(Plain(), text_loader())
    with pytest.raises(ValueError, match="training_step must be one that returns onlinesel"):
        make_trainer(per_row, max_steps=1).fit(Plain(), text_loader())


# What stays as it was -----------------------------------------------------------------------


def names_of(module: Any) -> set[str]:
    return set(vars(module)) - {"_hparams"}  # which Lightning adds


def test_validation_gets_the_plain_mean_and_its_own_batches() -> None:
    rows, module = classified(), Classifier()
    trainer = make_trainer(
        selection(LossReweight(min_rows=2), candidates=1),
        num_sanity_val_steps=1, limit_val_batches=2, val_check_interval=3, max_steps=6,
        accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, loader(rows, batch_size=4), loader(rows, batch_size=8))
    reference = Classifier()
    first = reference.losses(torch.utils.data.default_collate(rows[:8])).mean()
    assert module.validated[0] == pytest.approx(first.item())
    assert len(module.validated) == 1 + 2 * 4
    before, names = len(module.validated), names_of(module)
    found = trainer.validate(module, loader(rows, batch_size=48), verbose=False)
    expected = module.losses(torch.utils.data.default_collate(rows)).mean()
    assert found[0]["val_loss"] == pytest.approx(expected.item())
    assert len(module.validated) == before + 1 and names_of(module) == names


def test_everything_is_put_back_and_a_second_fit_begins_anew() -> None:
    module, callback = Classifier(), selection(TopLoss(), candidates=2)
    names = names_of(module)
    trainer = make_trainer(callback, max_steps=2)
    trainer.fit(module, loader())
    assert names_of(module) == names
    assert "batch_to_device" not in vars(trainer.strategy)
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    assert module.batches[0][0].shape[0] == 2
    module.load_state_dict(Classifier().state_dict())
    with planned() as plans:
        make_trainer(callback, max_steps=2).fit(module, loader())
    assert callback.step == 2
    assert [kept(p) for p in plans] == naive_top(classified(), [range(4), range(4, 8)], 2)


def test_a_trainer_that_fits_again_goes_on() -> None:
    module, callback = Classifier(), selection(Uniform())
    trainer = make_trainer(callback)
    with planned() as plans:
        trainer.fit(module, loader(classified(8), shuffle=True))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(classified(8), shuffle=True))
    with planned() as whole:
        make_trainer(selection(Uniform()), max_epochs=2).fit(
            Classifier(), loader(classified(8), shuffle=True)
        )
    assert [list(kept(p)) for p in plans] == [list(kept(p)) for p in whole]
    assert callback.step == 8


def test_an_error_in_the_step_leaves_nothing_behind() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no")

    module, callback = Failing(), selection(TopLoss(), candidates=2)
    names = names_of(module)
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(callback).fit(module, loader())
    assert names_of(module) == names
    assert onlinesel.weighted_mean(torch.tensor([1.0, 3.0])) == 2.0


def test_the_callers_generator_is_left_alone() -> None:
    states = []
    for callbacks in ([], [selection(SelectiveBackprop(), candidates=2)]):
        torch.manual_seed(3)
        rows, module = loader(), Classifier()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, Batches(list(rows), 24))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Logs and the record ------------------------------------------------------------------------


def test_metrics_are_logged_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        selection(TopLoss(), candidates=4), logger=logger, log_every_n_steps=2, max_steps=6,
        accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Classifier(), loader(classified(200)))
    with open(Path(logger.log_dir) / "metrics.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert all(row["selection/kept_share"] == "0.25" for row in rows)
    assert all(0 < float(row["selection/score_share"]) < 1 for row in rows)


@pytest.mark.parametrize("rows", [classified(16), Streamed(classified(16))])
def test_a_step_is_timed_from_reading_to_its_end(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fetch", "decided", "end"):
        original = getattr(StepMeter, name)

        def noting(self: Any, *args: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(self, *args)

        monkeypatch.setattr(StepMeter, name, noting)
    trainer = make_trainer(selection(TopLoss(), candidates=2), accumulate_grad_batches=2)
    trainer.fit(Classifier(), loader(rows))
    # What is fetched ahead counts where the time passed.
    assert re.fullmatch("((fetch )+decided end ?)+(fetch ?)*", " ".join(calls))
    assert calls.count("end") == 2


def test_the_record_holds_every_decision_and_the_validation(tmp_path: Path) -> None:
    module, folder = Classifier(), tmp_path / "run"
    trainer = make_trainer(selection(TopLoss(), candidates=2, record=folder), max_steps=2)
    with planned() as plans:
        trainer.fit(module, loader(classified(8)), loader(classified(8)))
    found = choices(folder)
    assert [c["step"] for c in found] == [1, 2]
    weights = [{i: w for i, w in zip(c["ids"], c["weights"], strict=True) if w > 0} for c in found]
    assert weights == [kept(plan) for plan in plans]
    evaluation = json.loads((folder / "evals.jsonl").read_text())
    assert evaluation["step"] == 2
    assert evaluation["loss"] == pytest.approx(sum(module.validated[-4:]) / 4)


def test_the_docstrings_run() -> None:
    assert doctest.testmod(host).failed == 0
