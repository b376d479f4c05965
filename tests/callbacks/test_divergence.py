"""Where no row has a finite score, the loss is shown as nan, as it is without selection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import onlinesel
from onlinesel import Selection, Selector, Signals, Strategy
from onlinesel.step import StepPlanner
from onlinesel.strategies import LossReweight, TopLoss, Uniform
from tests.callbacks.hosts import attach, make_model, make_sft_trainer, make_trainer, parameters
from tests.callbacks.lightning_hosts import Classifier, loader, selection
from tests.callbacks.lightning_hosts import make_trainer as make_lightning
from tests.callbacks.loop_hosts import make_loader, sgd, train
from tests.test_step import make_step


class Finite(Strategy):
    """Train whatever has a finite loss."""

    needs = ("loss",)

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(torch.ones(signals.size)), state


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=3),
       st.sampled_from(["global", "rank", "batch"]))  # fmt: skip
def test_a_step_is_undefined_where_all_its_scores_are(good: list[list[bool]], scope: str) -> None:
    batches, ids = make_step([[3] * len(part) for part in good])
    scores = iter(good)

    def score(batch: Any, needs: Any, hosted: Any) -> Signals:
        return Signals(loss=torch.tensor([1.0 if ok else math.inf for ok in next(scores)]))

    plan = StepPlanner(Selector(Finite()), score, scope=scope).plan(batches, ids, step=0)
    assert plan.undefined == (not any(map(any, good)))
    for m, batch in enumerate(plan.batches):
        losses = torch.ones(len(plan.ids[m]), batch["labels"].shape[1] - 1, requires_grad=True)
        loss = plan.weighing(m)(losses)
        assert bool(torch.isnan(loss)) == plan.undefined
        (gradient,) = torch.autograd.grad(loss, losses)
        assert torch.isfinite(gradient).all() and (bool(gradient.any()) or 0 in plan.weights[m])


def diverging(folder: Path, host: Any, **changes: Any) -> Any:
    changes = {"max_steps": 4, "learning_rate": 1e30, "logging_nan_inf_filter": False, **changes}
    return host(folder, **changes)


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
@pytest.mark.parametrize("nan_filter", [False, True])
def test_a_model_that_diverges_is_seen_in_the_log(
    tmp_path: Path, host: Any, nan_filter: bool
) -> None:
    """Also where the trainer hides it: it would show the mean of no steps, which is 0."""
    plain = diverging(tmp_path / "plain", host)
    plain.train()
    lost = [math.isnan(entry["loss"]) for entry in plain.state.log_history[:-1]]
    assert lost[-1] and not lost[0]
    for strategy, options in ((TopLoss(), {"candidates": 2}), (LossReweight(min_rows=2), {})):
        folder = tmp_path / type(strategy).__name__
        trainer = diverging(folder, host, logging_nan_inf_filter=nan_filter)
        attach(trainer, strategy, **options)
        trainer.train()
        assert [math.isnan(entry["loss"]) for entry in trainer.state.log_history[:-1]] == lost


def test_a_scorer_that_fails_is_seen_and_moves_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    calls: list[int] = []

    def score(model: Any, batch: Any) -> Signals:
        calls.append(len(batch["input_ids"]))
        lost = len(calls) == 2
        return Signals(loss=torch.full((calls[-1],), math.nan if lost else 1.0))

    attach(trainer, TopLoss(), candidates=2, score=score)
    moved = [parameters(trainer.model)]
    end = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        moved.append(parameters(trainer.model))
        return end(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history[:-1]]
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
    after = [moved[2], moved[3], parameters(trainer.model)]
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(moved[1:], after, strict=True)]
    assert same == [False, True, False]


def test_shadow_shows_the_trainers_own_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    lost = lambda model, batch: Signals(loss=torch.full((2,), math.nan))  # noqa: E731
    attach(trainer, TopLoss(), candidates=2, shadow=True, score=lost)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_loop_sees_it() -> None:
    model = make_model()
    lost = lambda model, batch: torch.full((len(batch["labels"]),), math.nan)  # noqa: E731
    steps = onlinesel.steps(make_loader(), model, TopLoss(), candidates=2, score=lost)
    before = parameters(model)
    done = train(steps, model, sgd(model), stop=2)
    assert all(math.isnan(step["loss"]) for step in done)
    after = parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = onlinesel.steps(make_loader(), model, Uniform(), candidates=2)
    assert all(math.isfinite(s["loss"]) for s in train(steps, model, sgd(model), stop=2))


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_lightning_sees_it() -> None:
    shown = []

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            shown.append(super().training_step(batch, batch_idx))
            return shown[-1]

    lost = lambda module, batch: torch.full((len(batch[1]),), math.nan)  # noqa: E731
    callback = selection(TopLoss(), candidates=2, score=lost)
    make_lightning(callback, max_steps=2).fit(Watched(), loader())
    assert len(shown) == 2 and all(torch.isnan(loss) for loss in shown)
