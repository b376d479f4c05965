"""Reused forwards in loops of one's own and in Lightning: the same step, counted forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import onlinesel
from onlinesel import Signals, When
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.strategies import LossReweight, TopLoss, Uniform
from tests.callbacks.hosts import ASKED, checkpointed, make_model, make_rows
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Language,
    make_trainer,
    planned,
    state_of,
    text_loader,
)
from tests.callbacks.loop_hosts import make_loader, sgd, token_losses, train

CASES = {
    "subset": (TopLoss(), {"candidates": 4}),
    "weights": (LossReweight(min_rows=2), {}),
}


def watched(model: Any) -> list[int]:
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    checkpointed(model)
    return rows


def close(one: dict[str, Any], two: dict[str, Any]) -> bool:
    first, second = (torch.cat([v.flatten() for v in state.values()]) for state in (one, two))
    return float((first - second).norm() / first.norm()) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_loop_takes_the_same_steps(case: str) -> None:
    strategy, options = CASES[case]
    results, counts = [], []
    for reuse in (False, True):
        model = make_model()
        rows = watched(model.train())
        steps = onlinesel.steps(
            make_loader(), model, strategy, accumulate=2, reuse_forward=reuse, **options
        )  # fmt: skip
        results.append((train(steps, model, sgd(model), stop=3), state_of(model)))
        counts.append(sum(rows))
    assert [step["ids"] for step in results[0][0]] == [step["ids"] for step in results[1][0]]
    assert close(results[0][1], results[1][1])
    candidates = 4 * options.get("candidates", 1)
    assert counts[1] == 3 * 2 * (candidates + 4) + 2 * ASKED  # steps, layers, rows
    assert steps.drain()["selection/reused_share"] == 1.0


def test_a_loop_that_is_left_gives_the_layers_back() -> None:
    model = make_model().train()
    watched(model)
    layer = model.model.layers[0]
    before = layer._gradient_checkpointing_func
    steps = onlinesel.steps(make_loader(), model, TopLoss(), candidates=2, reuse_forward=True)
    for step in steps:
        for micro in step:
            assert layer._gradient_checkpointing_func is not before
            with pytest.raises(KeyError):
                token_losses(model, {**micro.batch, "labels": micro.batch.pop("missing")})
            break
        break
    assert layer._gradient_checkpointing_func is before


def test_a_micro_batch_is_forwarded_once_or_skipped() -> None:
    model = make_model().train()
    watched(model)
    steps = onlinesel.steps(make_loader(), model, TopLoss(), candidates=2, reuse_forward=True)
    for step in steps:
        for micro in step:
            if step.index == 0:
                continue
            with pytest.raises(ValueError, match=r"in the order of .*, got Llama.* number 3 of 2"):
                for _ in range(2):
                    token_losses(model, micro.batch)
        if step.index == 1:
            break


def test_a_batch_that_lightning_skips_leaves_nothing_behind() -> None:
    """Its end never comes, and a later batch must not be given its rows."""

    class Skipping(Checkpointed):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            self.seen = getattr(self, "seen", 0) + 1
            return -1 if self.seen == 2 else None

    states, rows = [], [{k: v[:4] for k, v in row.items()} for row in make_rows()]
    for reuse in (False, True):
        module = Skipping()
        before = [layer._gradient_checkpointing_func for layer in module.model.model.layers]
        strategy = When(TopLoss(), stop=2, otherwise=Uniform())
        selection = OnlineSelection(strategy, candidates=2, reuse_forward=reuse)
        make_trainer(selection, max_steps=4, max_epochs=4).fit(module, text_loader(rows))
        states.append(state_of(module))
        after = [layer._gradient_checkpointing_func for layer in module.model.model.layers]
        assert all(one is two for one, two in zip(before, after, strict=True))
    assert close(*states)


def test_hooks_on_a_layer_act_once() -> None:
    """A trained vector that a hook adds to what a layer gives, as in representation tuning."""
    states = []
    for reuse in (False, True):
        model = make_model().train()
        watched(model)
        model.steering = torch.nn.Parameter(torch.zeros(32))
        model.model.layers[0].register_forward_hook(
            lambda module, args, output, model=model: output + model.steering
        )
        steps = onlinesel.steps(
            make_loader(), model, TopLoss(), candidates=3, reuse_forward=reuse
        )  # fmt: skip
        train(steps, model, sgd(model), stop=3)
        states.append(state_of(model))
    assert states[0]["steering"].norm() > 0.01
    assert close(*states)


def test_a_loop_refuses_what_cannot_be_reused() -> None:
    def score(model: Any, batch: Any) -> Signals:
        return Signals(loss=torch.zeros(2))

    model = make_model()
    with pytest.raises(ValueError, match="reuse_forward: score must be None, got .*Leave one"):
        onlinesel.steps(make_loader(), model, TopLoss(), score=score, reuse_forward=True)
    with pytest.raises(ValueError, match="reuse_forward: reuse_limit must be positive, and None"):
        onlinesel.steps(make_loader(), model, TopLoss(), reuse_limit=1.0)
    steps = onlinesel.steps(make_loader(), model, TopLoss(), candidates=2, reuse_forward=True)
    with pytest.raises(ValueError, match="gradient checkpointing must be on, got False. Turn"):
        next(iter(steps))
    with pytest.raises(ValueError, match="without dropout, noise, batch stat.*, got model.lay"):
        dropping = make_model(attention_dropout=0.5)
        onlinesel.steps(make_loader(), dropping, TopLoss(), reuse_forward=True)


class Checkpointed(Language):
    def __init__(self) -> None:
        super().__init__()
        self.rows = watched(self.model)


@pytest.mark.parametrize("case", CASES)
def test_lightning_takes_the_same_steps(case: str) -> None:
    strategy, options = CASES[case]
    plans, states = [], []
    for reuse in (False, True):
        module = Checkpointed()
        callback = OnlineSelection(strategy, reuse_forward=reuse, **options)
        trainer = make_trainer(callback, max_steps=3, accumulate_grad_batches=2)
        with planned() as found:
            trainer.fit(module, text_loader())
        plans.append([torch.cat(plan.ids).tolist() for plan in found[:3]])
        states.append(state_of(module))
    assert plans[0] == plans[1]
    assert close(*states)
    candidates = 4 * options.get("candidates", 1)
    assert sum(module.rows) == 3 * 2 * (candidates + 4) + 2 * ASKED


def test_lightning_gives_the_layers_back_after_an_error() -> None:
    class Failing(Checkpointed):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.replaced = layer._gradient_checkpointing_func is not before
            raise KeyError("stop")

    module = Failing()
    layer = module.model.model.layers[0]
    before = layer._gradient_checkpointing_func
    trainer = make_trainer(OnlineSelection(TopLoss(), candidates=2, reuse_forward=True))
    with pytest.raises(KeyError, match="stop"):
        trainer.fit(module, text_loader())
    assert module.replaced and layer._gradient_checkpointing_func is before


pytestmark = QUIET_LIGHTNING
