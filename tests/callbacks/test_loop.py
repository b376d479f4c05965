"""A plain loop in one process: exact gradients, any structure of batch, resume, designed errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import onlinesel
from onlinesel import ClassificationScorer, PerGroup, Selection, Signals, Strategy
from onlinesel.callbacks.loop.iterate import _factor_of
from onlinesel.data.order import shuffled_rows
from onlinesel.mixing import ODM, DomainSampler, DoReMi, FixedMixture
from onlinesel.strategies import (
    RS2,
    GradNorm,
    InfoBatch,
    LossReweight,
    RHOLoss,
    SelectiveBackprop,
    TopLoss,
    Uniform,
)
from onlinesel.weights import top_rows
from tests.callbacks.hosts import make_rows, reference_gradient, relative_error
from tests.callbacks.loop_hosts import (
    kept,
    make_loader,
    make_model,
    parameters,
    sgd,
    token_losses,
    train,
)
from tests.callbacks.two_ranks import KeepIds


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("normalize", ["tokens", "samples"])
@pytest.mark.parametrize(
    ("strategy", "candidates"), [(TopLoss(), 3), (LossReweight(min_rows=2), 1), (Uniform(), 1)]
)
def test_a_step_applies_the_reference_gradient(
    strategy: Strategy, candidates: int, normalize: str, accumulate: int
) -> None:
    model = make_model()
    before = parameters(model)
    steps = onlinesel.steps(
        make_loader(), model, strategy, candidates=candidates, accumulate=accumulate,
        normalize=normalize,
    )  # fmt: skip
    (done,) = train(steps, model, sgd(model), stop=1)
    rows, reference = kept(done), make_model()
    assert len(rows) == 2 * accumulate
    gradient, loss = reference_gradient(
        reference, make_rows(), list(rows), list(rows.values()), normalize
    )
    assert relative_error(before, parameters(model), gradient) < 1e-6
    assert done["loss"] == pytest.approx(loss, rel=1e-6)


def test_row_means_give_the_gradient_of_token_losses() -> None:
    models = [make_model(), make_model()]
    for model, per_row in zip(models, (False, True), strict=True):
        loader = make_loader()
        optimizer = sgd(model)
        for step in onlinesel.steps(loader, model, LossReweight(min_rows=2), accumulate=2):
            for micro in step:
                losses = token_losses(model, micro.batch)
                if per_row:
                    losses = losses.sum(1) / micro.batch["labels"][:, 1:].ne(-100).sum(1)
                micro.loss(losses).backward()
            optimizer.step()
            break
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


POINTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = (POINTS[:, 0] > 0).long()


@dataclass(frozen=True)
class Example:
    """A batch that is neither dict nor tuple."""

    inputs: torch.Tensor
    labels: torch.Tensor


def as_example(rows: list[Any]) -> Example:
    return Example(torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))


def as_dict(rows: list[Any]) -> dict[str, torch.Tensor]:
    return vars(as_example(rows))


STRUCTURES: dict[str, tuple[Any, Callable[[Any], tuple[torch.Tensor, torch.Tensor]]]] = {
    "tuple": (None, lambda batch: (batch[0], batch[1])),
    "dict": (as_dict, lambda batch: (batch["inputs"], batch["labels"])),
    "dataclass": (as_example, lambda batch: (batch.inputs, batch.labels)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scores", ["signals", "losses"])
def test_a_classifier_with_batches_of_any_structure(structure: str, scores: str) -> None:
    collator, parts = STRUCTURES[structure]
    dataset = list(zip(POINTS, LABELS.tolist(), strict=True))
    loader = DataLoader(dataset, batch_size=5, collate_fn=collator)
    model = torch.nn.Linear(4, 2)

    def losses(model: Any, batch: Any) -> torch.Tensor:
        inputs, labels = parts(batch)
        return cross_entropy(model(inputs), labels, reduction="none")

    def forward(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = parts(batch)
        return model(inputs), labels

    score: Any = losses if scores == "losses" else ClassificationScorer(forward)
    every = losses(model, as_example(dataset) if structure == "dataclass" else
                   as_dict(dataset) if structure == "dict" else (POINTS, LABELS))  # fmt: skip
    wanted = top_rows(every.detach(), 5, torch.arange(20)).nonzero().flatten()
    model.zero_grad()
    every[wanted].mean().backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (step,) = onlinesel.steps(loader, model, TopLoss(), candidates=4, score=score)
    (micro,) = step
    assert sorted(micro.ids.tolist()) == wanted.tolist()
    micro.loss(losses(model, micro.batch)).backward()
    for p, g in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_ready_scorer_gives_what_it_says() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, -100, 1])
    signals = ClassificationScorer()(lambda x: x, (logits, labels))
    p = logits.detach().double().softmax(1)
    for i in (0, 1, 2, 3, 5):
        (gradient,) = torch.autograd.grad(cross_entropy(logits[i], labels[i]), logits)
        assert signals.el2n[i] == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert signals.grad_norm[i] == signals.el2n[i]
        assert signals.loss[i] == pytest.approx(-float(p[i, labels[i]].log()), rel=1e-5)
        assert signals.entropy[i] == pytest.approx(-float((p[i] * p[i].log()).sum()), rel=1e-5)
    assert all(torch.isnan(value[4]) for value in signals.present().values())
    with pytest.raises(ValueError, match=r"ClassificationScorer: logits must be .* \(N, C\)"):
        ClassificationScorer()(lambda x: x, (logits[None], labels))


def test_what_trained_moves_the_proportions_of_the_next_epoch() -> None:
    """Domain 2 has the hardest rows; a bandit whose warm-up is over turns to it."""
    domains = torch.arange(48) % 3
    order = DomainSampler(domains, ODM(warmup=0), seed=1)
    model = make_model()
    steps = onlinesel.steps(make_loader(), model, Uniform(), accumulate=2, order=order)
    seen = []
    for step in steps:
        for micro in step:
            micro.loss(domains[micro.ids].float() * 5 + 1)
            assert torch.equal(step.decisions[0][0].group, domains[step.decisions[0][0].ids])
        seen.append(order.proportions.tolist())
    assert seen[0] == [1 / 3] * 3
    assert seen[-1][2] > seen[-1][1] > seen[-1][0]


def test_quotas_by_domain_come_from_a_column() -> None:
    rows = [{**row, "domain": i % 2} for i, row in enumerate(make_rows())]

    def collate_with(features: list[dict[str, Any]]) -> dict[str, Any]:
        from tests.callbacks.hosts import collate

        return {**collate(features), "domain": torch.tensor([f["domain"] for f in features])}

    loader = DataLoader(rows, batch_size=4, collate_fn=collate_with)
    model = make_model()
    quota = PerGroup(TopLoss(), shares={0: 0.75, 1: 0.25})
    steps = onlinesel.steps(loader, model, quota, candidates=3, groups="domain")
    (done,) = train(steps, model, sgd(model), stop=1)
    assert [i % 2 for i in sorted(kept(done), key=lambda i: i % 2)] == [0, 0, 0, 1]


def test_a_record_becomes_a_report(tmp_path: Path) -> None:
    from onlinesel.cli import main

    model = make_model()
    folder = tmp_path / "run"
    steps = onlinesel.steps(make_loader(), model, TopLoss(), candidates=2, record=folder)
    train(steps, model, sgd(model))
    steps.evaluated(4.0)
    steps.close()
    lines = (folder / "choices.jsonl").read_text().splitlines()
    ids = [i for line in lines for i in json.loads(line)["ids"]]
    assert sorted(ids) == list(range(48)) and len(lines) == len(steps) == steps.step == 12
    evaluation = json.loads((folder / "evals.jsonl").read_text())
    assert evaluation["loss"] == 4.0 and evaluation["step"] == 12
    logged = steps.drain()
    assert logged["selection/kept_share"] == 0.5 and 0 < logged["selection/score_share"] < 1
    page = tmp_path / "report.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    assert "TopLoss" in page.read_text()


def test_a_loop_that_was_left_has_trained_its_last_step() -> None:
    model = make_model()
    steps = onlinesel.steps(make_loader(), model, Uniform())
    for expected in (0, 2):
        for step in steps:
            assert step.index in (expected, expected + 1)
            if step.index == expected + 1:
                break
    assert steps.state_dict()["step"] == 4
    # Loading forgets a step that is open.
    state = steps.state_dict()
    next(iter(steps))
    steps.load_state_dict(state)
    assert steps.state_dict()["data"] == state["data"] and steps.step == 4


def test_steps_that_are_over_are_freed() -> None:
    import gc
    import weakref

    model = make_model()
    gc.disable()
    try:
        held = []
        for step in onlinesel.steps(make_loader(), model, InfoBatch(), accumulate=2):
            for micro in step:
                held.append(weakref.ref(micro))
                micro.loss(token_losses(model, micro.batch))
        assert [ref() for ref in held[:-2]] == [None] * (len(held) - 2)
    finally:
        gc.enable()


def test_a_row_that_keeps_step_cannot_poison_a_mean_of_ones_own() -> None:
    """One row trains; the other micro-batches hold a row of weight 0, whose mean is a number."""
    model = make_model()
    kept_one = KeepIds((int(shuffled_rows(48, epoch=0, seed=0)[0]),))
    step = next(iter(onlinesel.steps(make_loader(), model, kept_one, accumulate=3)))
    assert [micro.weights.tolist() for micro in step] == [[1.0], [0.0], [0.0]]
    for micro in step:
        mask = micro.batch["labels"][:, 1:] != -100
        losses = token_losses(model, micro.batch)
        micro.loss((losses * mask).sum(1) / mask.sum(1)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)


def test_accelerate_prepares_the_model_and_may_prepare_the_loader() -> None:
    from accelerate import Accelerator

    trained = []
    for prepares_loader in (False, True):
        accelerator = Accelerator(cpu=True)
        model, loader = make_model(), make_loader(shuffle=False)
        model, optimizer = accelerator.prepare(model, sgd(model))
        loader = accelerator.prepare(loader) if prepares_loader else loader
        steps = onlinesel.steps(loader, model, TopLoss(), candidates=3, accumulate=2)
        accelerator.register_for_checkpointing(steps)
        done = []
        for step in steps:
            for micro in step:
                accelerator.backward(micro.loss(token_losses(model, micro.batch)))
            optimizer.step()
            optimizer.zero_grad()
            done.append(sorted(i for micro in step for i in micro.ids.tolist()))
        trained.append((done, parameters(accelerator.unwrap_model(model))))
    (first, own), (second, prepared) = trained
    assert first == second and len(first) == 4
    assert all(torch.equal(own[name], prepared[name]) for name in own)


def test_accelerate_saves_and_loads_the_steps_with_its_own_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def start_over() -> tuple[Any, Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = make_model()
        model, optimizer = accelerator.prepare(model, sgd(model))
        steps = onlinesel.steps(make_loader(), model, SelectiveBackprop(), candidates=2)
        accelerator.register_for_checkpointing(steps)
        return accelerator, model, optimizer, steps

    _, model, optimizer, steps = start_over()
    whole = train(steps, model, optimizer, stop=5)
    accelerator, model, optimizer, steps = start_over()
    train(steps, model, optimizer, stop=2)
    accelerator.save_state(str(tmp_path))
    accelerator, again, optimizer, steps = start_over()
    accelerator.load_state(str(tmp_path))
    assert train(steps, again, optimizer, stop=5) == whole[2:]


def test_what_engines_divide_by() -> None:
    class DeepSpeedEngine(torch.nn.Linear):
        def gradient_accumulation_steps(self) -> int:
            return 8

    assert _factor_of(torch.nn.Linear(1, 1)) == 1.0
    assert _factor_of(DeepSpeedEngine(1, 1)) == 8.0


def test_an_engine_is_told_where_a_step_ends() -> None:
    told = []

    class Engine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = make_model()

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

        def set_gradient_accumulation_boundary(self, last: bool) -> None:
            told.append(last)

    engine = Engine()
    for step in onlinesel.steps(make_loader(20), engine, Uniform(), accumulate=2):
        for micro in step:
            assert told[-1] == micro.last
            micro.loss(torch.zeros(micro.ids.shape[0]))
    assert told == [False, True, True]


class Needy(Strategy):
    """Needs a signal that no scorer gives."""

    needs = ("reward",)

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(torch.ones(signals.size)), state


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (TopLoss(), {"accumulate": 0}, "steps: accumulate must be an integer >= 1, got 0"),
        (TopLoss(), {"candidates": 0}, "steps: candidates must be an integer >= 1, got 0"),
        (TopLoss(), {"scope": "world"}, "steps: scope must be one of global, rank, batch, got 'w"),
        (TopLoss(), {"normalize": "mean"}, "steps: normalize must be 'tokens', 'samples', 'rows'"),
        (RHOLoss(), {}, "steps: reference must be a model or 'adapter', got None. RHOLoss compar"),
        (Needy(), {}, "CausalLMScorer: needs must be among"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    strategy: Strategy, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        onlinesel.steps(make_loader(), make_model(), strategy, **options)


def test_a_mixture_that_compares_with_a_reference_needs_its_losses() -> None:
    domains = torch.arange(48) % 3
    model, loader = make_model(), make_loader()
    with pytest.raises(ValueError, match="order must be of a mixture that needs no losses of a r"):
        onlinesel.steps(loader, model, Uniform(), order=DomainSampler(domains, DoReMi(), seed=0))
    given = DomainSampler(domains, DoReMi(reference=(4.0, 4.0, 4.0)), seed=0)
    onlinesel.steps(loader, model, Uniform(), order=given)
    fixed = DomainSampler(domains, FixedMixture((1.0, 0.0, 0.0)), seed=0)
    for step in onlinesel.steps(loader, model, Uniform(), order=fixed):  # learns from no loss
        assert all(int(i) % 3 == 0 for micro in step for i in micro.ids)


def test_designed_errors() -> None:
    linear = torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match="score must be given for a model that is no causal lang"):
        onlinesel.steps(make_loader(), linear, GradNorm())
    two_columns = lambda *_: torch.ones(2, 1)  # noqa: E731
    square = onlinesel.steps(make_loader(), linear, GradNorm(mode="unbiased"), score=two_columns)
    with pytest.raises(ValueError, match=r"score must be a function .*, got shape \(2, 1\)"):
        next(iter(square))
    model = make_model()
    loader = make_loader(shuffle=False, sampler=torch.utils.data.WeightedRandomSampler([1.0], 4))
    with pytest.raises(ValueError, match="loader must be a torch DataLoader .* got WeightedRandom"):
        onlinesel.steps(loader, model, RS2())
    steps = onlinesel.steps(make_loader(), model, InfoBatch())
    with pytest.raises(ValueError, match="losses must be passed through .*, got none. InfoBatch"):
        for step in steps:
            assert step.micro_batches
    state = onlinesel.steps(make_loader(), model, Uniform()).state_dict()
    other = onlinesel.steps(make_loader(), model, Uniform(), candidates=2)
    with pytest.raises(ValueError, match=r"candidates must be the checkpoint's \(1\), got 2"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of format 1, got None"):
        other.load_state_dict({})
    with pytest.raises(AttributeError, match="module 'onlinesel' has no attribute 'stepping'"):
        _ = onlinesel.stepping
