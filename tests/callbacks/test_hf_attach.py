"""What is refused, with the text that says what to do, and that nothing is lost by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, ModernBertForMaskedLM, Trainer

from onlinesel import Chain, PerGroup, Selection, Signals, Strategy, When
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.strategies import (
    RS2,
    UDS,
    InfoBatch,
    LossReweight,
    RHOLoss,
    TopLoss,
    Uniform,
)
from tests.callbacks.hosts import (
    attach,
    make_model,
    make_rows,
    make_sft_trainer,
    make_tokenizer,
    make_trainer,
)


class NeedsReward(Strategy):
    needs = ("reward",)

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(torch.ones(signals.size)), state


class Encoder(nn.Module):
    """A model whose forward takes loss kwargs but that has no LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **kwargs: Any) -> Any:
        return {"loss": self.layer.weight.sum()}


class Headless(Encoder):
    loss_type = "ForCausalLM"


def masked_model() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 4, "cls_token_id": 1}
    return ModernBertForMaskedLM(ModernBertConfig(**sizes, **depth, sep_token_id=2))


class NoKwargs(Headless):
    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> Any:
        return {"loss": self.layer.weight.sum()}


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (TopLoss(), {"candidates": 0}, "candidates must be an integer >= 1, got 0"),
        (TopLoss(), {"candidates": 2.0}, "candidates must be an integer >= 1, got 2.0"),
        (TopLoss(), {"candidates": True}, "candidates must be an integer >= 1, got True"),
        (TopLoss(), {"scope": "node"}, "scope must be one of global, rank, batch, got 'node'"),
        (TopLoss(), {"normalize": "mean"}, "normalize must be 'tokens', 'samples', 'rows' or None"),
        (TopLoss(), {"ids": "uid"}, "ids must be a column of the training dataset, got 'uid'. Na"),
        (NeedsReward(), {}, "CausalLMScorer: needs must be among .* got \\['reward'\\]"),
        (RHOLoss(), {}, "reference must be a model, 'adapter' or a column"),
        (RHOLoss(), {"reference": "adapter"}, "reference must be a model or a column where no"),
        (RHOLoss(), {"reference": "cached"}, "reference must be a model, 'adapter' or a column of"),
        (RS2(fraction=0.5), {"candidates": 2}, "candidates must be 1 for a method that plans"),
        (RS2(fraction=0.5), {"shadow": True}, "shadow must be off for a method that plans"),
        (TopLoss(), {"ids": "name"}, "ids must be a column of integers, got 'name'"),
        (InfoBatch(), {"shadow": True}, "shadow must be off for a method that learns"),
        ("TopLoss", {}, "strategy must be a Strategy instance, got 'TopLoss'"),
    ],
)
def test_bad_arguments(tmp_path: Path, strategy: Any, options: Any, message: str) -> None:
    rows = [{**row, "name": "x"} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows=Dataset.from_list(rows))
    before = dict(trainer.__dict__)
    with pytest.raises((ValueError, TypeError), match=message):
        OnlineSelection(trainer, strategy, **options)
    assert trainer.__dict__ == before


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        ({"rows": []}, TopLoss(), "train_dataset must be a dataset with rows"),
        ({"auto_find_batch_size": True}, TopLoss(), "auto_find_batch_size must be off"),
        ({"train_sampling_strategy": "batch_rebalance"}, TopLoss(), "not 'batch_rebalance'"),
        ({"label_smoothing_factor": 0.1}, LossReweight(), "got label_smoothing_factor"),
        ({"label_smoothing_factor": 0.1}, InfoBatch(), "got label_smoothing_factor"),
        ({"model": Encoder()}, TopLoss(), "model must be a causal language model with an LM head"),
        (
            {"model": masked_model()},
            Uniform(),
            "whose loss is the shifted causal one, got ModernBe",
        ),
        ({"model": Headless()}, TopLoss(), "model must be a causal language model with an LM head"),
        ({"train_sampling_strategy": "group_by_length"}, RS2(), "must be 'random' for a method"),
        ({"model": NoKwargs()}, Uniform(), "model must be one whose forward takes num_items"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 40},
            TopLoss(),
            "dataset must have at least one step of 80 candidates, got 48 rows",
        ),
    ],
)
def test_bad_trainers(tmp_path: Path, changes: Any, strategy: Any, message: str) -> None:
    trainer = make_trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        OnlineSelection(trainer, strategy, candidates=1 if isinstance(strategy, RS2) else 2)


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu must be at most 1 per process, got 2"):
        OnlineSelection(trainer, TopLoss())


def test_processes_that_the_trainer_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes on a CPU without use_cpu: transformers would train two models apart."""
    monkeypatch.setattr("onlinesel.callbacks.hf.checks.world_size", lambda: 2)
    message = r"processes must be those that the trainer knows of \(1\), got 2.*use_cpu=True"
    with pytest.raises(ValueError, match=message):
        OnlineSelection(make_trainer(tmp_path), TopLoss())


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    attach(trainer, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match="trainer must be without another OnlineSelection"):
        OnlineSelection(trainer, TopLoss())


@pytest.mark.parametrize(
    "strategy",
    [UDS(), RHOLoss(), Chain(TopLoss(), Uniform()), When(TopLoss(), start=9), PerGroup(TopLoss())],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_method_that_only_drops_asks_for_candidates(tmp_path: Path, strategy: Any) -> None:
    rows = [{**row, "group": 0, "reference_loss": 1.0} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows=Dataset.from_list(rows))
    options = {"reference": "reference_loss", "groups": "group"}
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match="candidates must be at least 2 for .*, which only drops"):
        OnlineSelection(trainer, strategy, **options)
    assert trainer.__dict__ == before
    OnlineSelection(trainer, strategy, candidates=2, **options).detach()


def test_the_callback_of_another_trainer_is_refused(tmp_path: Path) -> None:
    mine, other = make_trainer(tmp_path / "mine"), make_trainer(tmp_path / "other")
    callback = attach(mine, Uniform(), candidates=2)
    other.add_callback(callback)
    before = [p.clone() for p in other.model.parameters()]
    message = "OnlineSelection: trainer must be the one that the callback was made for"
    with pytest.raises(ValueError, match=message):
        other.train()
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))
    mine.train()
    assert callback.selector.step == 1
    callback.detach()
    mine.add_callback(callback)  # its methods are not wrapped any more
    with pytest.raises(ValueError, match=message):
        mine.train()


def test_a_callback_that_was_not_added_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    OnlineSelection(trainer, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match="callback must be among the trainer's callbacks"):
        trainer.train()


def test_padding_free_batches_are_refused(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path)
    trainer.padding_free = True
    with pytest.raises(ValueError, match="padding_free must be off.*packing=False"):
        OnlineSelection(trainer, TopLoss())


def test_a_collator_that_merges_rows_is_refused_before_it_trains(tmp_path: Path) -> None:
    def flatten(features: list[Any]) -> dict[str, torch.Tensor]:
        ids = [i for f in features for i in f["input_ids"]]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}

    trainer = make_trainer(tmp_path, collator=flatten)
    attach(trainer, TopLoss(), candidates=2)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match="cannot be selected by row|merges or splits rows"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_dft_loss_refuses_weights(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="got loss_type='dft'"):
        OnlineSelection(trainer, LossReweight())
    OnlineSelection(trainer, TopLoss(), candidates=2).detach()


def test_weights_that_the_model_ignores_are_noticed(tmp_path: Path) -> None:
    """A model that computes its own cross entropy would train unweighted in silence."""
    model = make_model()
    forward = model.forward

    def own_loss(
        input_ids: Any, labels: Any = None, num_items_in_batch: Any = None, **kw: Any
    ) -> Any:
        output = forward(input_ids=input_ids, **kw)
        if labels is not None:
            logits = output.logits[:, :-1].mT
            output["loss"] = (
                cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch
            )
        return output

    model.forward = own_loss
    trainer = make_trainer(tmp_path, model=model)
    attach(trainer, LossReweight(min_rows=2))
    with pytest.raises(RuntimeError, match="must take its loss through 'loss_function'"):
        trainer.train()


def test_detach_restores_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    before = dict(trainer.__dict__)
    callbacks = list(trainer.callback_handler.callbacks)
    callback = attach(trainer, TopLoss(), candidates=2)
    assert trainer.__dict__ != before
    callback.detach()
    assert trainer.__dict__ == before
    assert trainer.callback_handler.callbacks == callbacks
    # And it trains as if the callback had never been there.
    trainer.train()
    plain = make_trainer(tmp_path, max_steps=2)
    plain.train()
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_detach_during_training_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    callback = attach(trainer, TopLoss(), candidates=2)
    score = callback._scorer

    def detaching(*args: Any, **kwargs: Any) -> Signals:
        callback.detach()
        return score(*args, **kwargs)

    callback._scorer = detaching
    with pytest.raises(ValueError, match="detach must be called before or after train"):
        trainer.train()
    callback.detach()


def test_a_loader_that_ignores_the_candidates_is_refused(tmp_path: Path) -> None:
    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            collator = self.data_collator
            return DataLoader(self.train_dataset, batch_size=2, collate_fn=collator)

    made = make_trainer(tmp_path)
    trainer = OwnLoader(
        made.model, made.args, train_dataset=make_rows(), data_collator=made.data_collator
    )
    attach(trainer, TopLoss(), candidates=3)
    with pytest.raises(ValueError, match="train dataloader must be one of 6 candidates .*, got 2"):
        trainer.train()


def test_a_record_is_never_emptied_by_another_run(tmp_path: Path) -> None:
    for strategy in (TopLoss(), Uniform()):
        trainer = make_trainer(tmp_path / "out", max_steps=2)
        callback = attach(trainer, strategy, candidates=2, record=tmp_path / "record")
        if isinstance(strategy, TopLoss):
            trainer.train()
    kept = (tmp_path / "record" / "choices.jsonl").read_text()
    with pytest.raises(ValueError, match="record: folder must hold no run"):
        trainer.train()
    callback.detach()
    assert (tmp_path / "record" / "choices.jsonl").read_text() == kept
    assert "TopLoss" in (tmp_path / "record" / "run.json").read_text()


def test_detach_after_training_leaves_nothing_on_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    callback = attach(trainer, LossReweight(min_rows=2))
    trainer.train()
    callback.detach()
    assert "_loss_function" not in trainer.model.__dict__
    assert not trainer.model.lm_head._forward_pre_hooks and not trainer.model._forward_hooks
    wrapped = {"get_batch_samples", "get_train_dataloader", "compute_loss", "log"}
    assert not wrapped & set(trainer.__dict__)


def test_tokenizer_helper_pads_with_zero() -> None:
    assert make_tokenizer().pad_token_id == 0
