"""What is said before or at the first step: other data, too little of it, missing scores."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import onlinesel
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.data.datasets import DataFacts
from onlinesel.strategies import UDS, LossReweight, RHOLoss, TopLoss, Uniform
from tests.callbacks.hosts import attach, make_model, make_rows, make_trainer
from tests.callbacks.lightning_hosts import QUIET_LIGHTNING, Classifier, classified
from tests.callbacks.lightning_hosts import OnlineSelection as LightningSelection
from tests.callbacks.lightning_hosts import make_trainer as make_lightning
from tests.callbacks.loop_hosts import make_loader, token_losses

SCORER = onlinesel.ClassificationScorer()


# Another dataset than the one that was there ------------------------------------------------


def test_a_trainers_dataset_that_is_swapped_after_attaching(tmp_path: Path) -> None:
    for known in (make_rows(), Dataset.from_list(make_rows())):
        trainer = make_trainer(tmp_path, rows=known)
        callback = attach(trainer, Uniform())
        trainer.train_dataset = make_rows(seed=1)
        before = [p.clone() for p in trainer.model.parameters()]
        with pytest.raises(ValueError, match="train_dataset must be the one that the trainer had"):
            trainer.train()
        pairs = zip(before, trainer.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        callback.detach()
        attach(trainer, Uniform())
        trainer.train()


def test_a_trainers_dataset_that_has_grown(tmp_path: Path) -> None:
    rows = make_rows()
    trainer = make_trainer(tmp_path, rows=rows)
    attach(trainer, Uniform())
    trainer.train()
    trainer.train()  # the same data again is no other
    rows.append(rows[0])
    with pytest.raises(ValueError, match="got 49 rows where there were 48.*call detach"):
        trainer.train()


def test_a_loops_dataset_that_has_changed() -> None:
    rows, model = make_rows(8), make_model()
    steps = onlinesel.steps(make_loader(rows=rows), model, Uniform())
    for change in (lambda: rows.append(rows[0]), lambda: rows.__setitem__(0, rows[1])):
        assert len(list(steps)) == 4
        kept = list(rows)
        change()
        with pytest.raises(
            ValueError, match="dataset must stay as it was .* got (9 rows|other rows)"
        ):
            next(iter(steps))
        rows[:] = kept
        steps = onlinesel.steps(make_loader(rows=rows), model, Uniform())


@pytest.mark.filterwarnings(*[mark.args[0] for mark in QUIET_LIGHTNING])
def test_a_second_fit_over_other_data() -> None:
    def tensors(seed: int, count: int = 16) -> TensorDataset:
        inputs, labels = zip(*classified(count, seed), strict=True)
        return TensorDataset(torch.stack(inputs), torch.tensor(labels))

    trainer, module = make_lightning(LightningSelection(Uniform())), Classifier()
    trainer.fit(module, DataLoader(tensors(0), batch_size=4))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(tensors(0), batch_size=4))  # the same data in another object
    assert trainer.global_step == 8
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(ValueError, match="train_dataloader must be over the dataset .* other rows"):
        trainer.fit(module, DataLoader(tensors(1), batch_size=4))


def test_what_is_known_of_a_dataset_without_reading_it() -> None:
    class Unknown(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            raise AssertionError("a row was read, which may draw random numbers")

    facts = DataFacts.of(Unknown())
    assert facts.difference(facts.dataset) is None
    assert facts.difference(Unknown()) == "another dataset"
    assert facts.difference(Unknown(), alike=True) is None
    named = DataFacts.of(Dataset.from_list([{"a": 1}]))
    assert named.difference(Dataset.from_list([{"a": 2}]), alike=True) == "other rows"


# Candidates beyond the dataset --------------------------------------------------------------


def test_more_candidates_than_rows_are_told(tmp_path: Path) -> None:
    message = "a micro-batch takes 128 candidates and the dataset has 48 rows: every step looks at"
    with pytest.warns(UserWarning, match=f"OnlineSelection: {message}"):
        OnlineSelection(make_trainer(tmp_path), TopLoss(), candidates=64)
    with pytest.warns(UserWarning, match=f"CandidateLoader: {message}"):
        onlinesel.steps(make_loader(), make_model(), TopLoss(), candidates=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnlineSelection(make_trainer(tmp_path), TopLoss(), candidates=24)
        onlinesel.steps(make_loader(), make_model(), TopLoss(), candidates=24)


def test_an_epoch_without_a_step_is_refused() -> None:
    """With drop_last the only window, which is short, was dropped in silence."""
    loader, model = make_loader(drop_last=True), make_model()
    assert len(onlinesel.steps(loader, model, TopLoss(), candidates=12, accumulate=2)) == 1
    with pytest.raises(ValueError, match="at least one step of 52 candidates, got 48 rows. Lower"):
        onlinesel.steps(loader, model, TopLoss(), candidates=13, accumulate=2)


# Scores that nothing gives ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "missing"), [(UDS(), "nuclear_norm, embedding"), (RHOLoss(), "reference_loss")]
)
def test_methods_that_a_classification_scorer_cannot_serve(
    tmp_path: Path, strategy: Any, missing: str
) -> None:
    name = type(strategy).__name__
    message = f"must provide {missing} for {name}, got ClassificationScorer with loss, entropy"
    loader = DataLoader(classified(), batch_size=4)
    with pytest.raises(ValueError, match=f"steps: score {message}"):
        onlinesel.steps(loader, Classifier(), strategy, candidates=2, score=SCORER)
    with pytest.raises(ValueError, match=f"LightningSelection: score {message}"):
        LightningSelection(strategy, candidates=2, score=SCORER)
    with pytest.raises(ValueError, match=f"OnlineSelection: score {message}"):
        OnlineSelection(make_trainer(tmp_path), strategy, candidates=2, score=SCORER)
    onlinesel.steps(loader, Classifier(), TopLoss(), candidates=2, score=SCORER)


# A loop that passes micro.loss by -----------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "refused"),
    [
        (LossReweight(min_rows=2), {}, True),
        (TopLoss(), {"candidates": 2}, False),  # one micro-batch of rows that count alike
        (TopLoss(), {"candidates": 2, "accumulate": 2}, True),
        (TopLoss(), {"candidates": 2, "normalize": "samples"}, True),
        (Uniform(), {}, False),
    ],
)
def test_a_loop_that_never_calls_micro_loss(strategy: Any, options: Any, refused: bool) -> None:
    model = make_model()
    steps = onlinesel.steps(make_loader(batch_size=4), model, strategy, **options)
    done = 0
    try:
        for step in steps:
            for micro in step:
                losses = token_losses(model, micro.batch)
                (losses.sum() / (micro.batch["labels"][:, 1:] != -100).sum()).backward()
            done += 1
    except ValueError as error:
        assert refused and done == 1
        assert str(error).startswith("steps: losses must go through micro.loss(losses) where row w")
    else:
        assert not refused and done > 3


def test_who_weighs_by_hand_or_skips_a_step_is_left_alone() -> None:
    model = make_model()
    steps = onlinesel.steps(make_loader(batch_size=4), model, LossReweight(min_rows=2))
    for number, step in enumerate(steps):
        if number == 1:
            continue
        for micro in step:
            means = token_losses(model, micro.batch).mean(dim=1)
            (means * micro.weights).mean().backward()
    assert number > 3


def test_a_classifier_that_averages_by_itself() -> None:
    module = Classifier()
    loader = DataLoader(classified(), batch_size=4)
    steps = onlinesel.steps(loader, module, LossReweight(min_rows=2), score=SCORER)
    with pytest.raises(ValueError, match="got 1 of 1 micro-batches without"):
        for step in steps:
            for micro in step:
                inputs, labels = micro.batch
                cross_entropy(module(inputs), labels).backward()
