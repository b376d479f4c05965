"""Which models train: those whose loss is the shifted causal one, whatever they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import onlinesel
from onlinesel.strategies import LossReweight, TopLoss, Uniform
from tests.callbacks.hosts import (
    attach,
    collate,
    make_rows,
    make_trainer,
    parameters,
    reference_gradient,
    relative_error,
)

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0,
                        "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "CTRLLMHeadModel": ("CTRLConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 32,
                        "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4,
                             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "BertLMHeadModel": ("BertConfig", {"hidden_size": 32, "num_hidden_layers": 1,
                        "num_attention_heads": 4, "intermediate_size": 32, "is_decoder": True,
                        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "BartForCausalLM": ("BartConfig", {"d_model": 32, "decoder_layers": 1,
                        "decoder_attention_heads": 4, "decoder_ffn_dim": 32}),
    "XLMWithLMHeadModel": ("XLMConfig", {"emb_dim": 32, "n_layers": 1, "n_heads": 4}),
    "XLNetLMHeadModel": ("XLNetConfig", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}),
    "GPT2DoubleHeadsModel": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    "BertForMaskedLM": ("BertConfig", {"hidden_size": 32, "num_hidden_layers": 1,
                        "num_attention_heads": 4, "intermediate_size": 32,
                        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 32, "d_ff": 32, "num_layers": 1,
                                   "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0,
                                   "dropout_rate": 0.0}),
}  # fmt: skip


def tiny(name: str) -> Any:
    config, sizes = TINY[name]
    transformers.set_seed(0)
    return getattr(transformers, name)(
        getattr(transformers, config)(vocab_size=64, pad_token_id=0, **sizes)
    )


def full_rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows whose first token is labelled as well, which shifts and counts differ about."""
    return [{**row, "labels": row["input_ids"]} for row in make_rows(count)]


@pytest.mark.parametrize("strategy", [TopLoss(), LossReweight(min_rows=2)], ids=["top", "weights"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "CTRLLMHeadModel", "OpenAIGPTLMHeadModel",
                                  "BertLMHeadModel"])  # fmt: skip
def test_models_of_an_unlisted_name_are_exact(tmp_path: Path, name: str, strategy: Any) -> None:
    """The plain trainer counts their first labels, and trains a part of the mean."""
    model, rows = tiny(name), full_rows()
    trainer = make_trainer(tmp_path, model=model, rows=rows, gradient_accumulation_steps=2)
    weighs = isinstance(strategy, LossReweight)
    callback = attach(trainer, strategy, candidates=1 if weighs else 2)
    plans: list[Any] = []
    build = callback._plan

    def spying(device: Any) -> Any:
        planner = build(device)
        original = type(planner).plan

        def plan(*args: Any, **kwargs: Any) -> Any:
            plans.append(original(planner, *args, **kwargs))
            return plans[-1]

        planner.plan = plan  # type: ignore[method-assign]
        return planner

    callback._plan = spying  # type: ignore[method-assign]
    before = parameters(model)
    trainer.train()
    after = parameters(model)
    ids = [i for part in plans[0].ids for i in part.tolist()]
    weights = [w for part in plans[0].weights for w in part.tolist()]
    model.load_state_dict(before, strict=False)
    gradient, loss = reference_gradient(model, rows, ids, weights, callback.normalize)
    assert relative_error(before, after, gradient) < 1e-5
    assert abs(trainer.state.log_history[0]["loss"] - loss) < 1e-3


@pytest.mark.parametrize("name", ["BartForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
                                  "BertForMaskedLM", "T5ForConditionalGeneration"])  # fmt: skip
def test_losses_that_do_not_shift_are_refused(tmp_path: Path, name: str) -> None:
    """Three of these are called causal, or have a loss of their own that no attribute shows."""
    model = tiny(name)
    trainer = make_trainer(tmp_path, model=model, rows=full_rows())
    before = parameters(model)
    with pytest.raises(ValueError, match=f"model must be one whose loss is the shifted .* {name}"):
        attach(trainer, Uniform())
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.parameters(), strict=False))


def test_a_loss_that_ignores_the_number_is_refused_where_it_counts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=tiny("GPT2DoubleHeadsModel"))
    attach(trainer, TopLoss(), candidates=2)
    trainer.train()  # one micro-batch: its mean is the step's
    again = make_trainer(
        tmp_path, model=tiny("GPT2DoubleHeadsModel"), gradient_accumulation_steps=2
    )
    attach(again, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match="loss must be divided by num_items_in_batch .* got that"):
        again.train()


def averaging(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])


def unshifted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return cross_entropy(outputs.logits.mT, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("function", "message"),
    [(averaging, "must be divided by num_items_in_batch"), (unshifted, "counts the first label")],
)
def test_a_loss_function_of_ones_own_is_asked(tmp_path: Path, function: Any, message: str) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.compute_loss_func = function
    attach(trainer, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()


class Scaled(transformers.LlamaForCausalLM):
    """Scales its logits after the head, where no configuration says so."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        items = kwargs.pop("num_items_in_batch", None)
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 50
        if labels is not None:
            output.loss = self.loss_function(
                output.logits, labels, self.config.vocab_size, num_items_in_batch=items
            )
        return output


def scaled() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    transformers.set_seed(0)
    return Scaled(transformers.LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))


def test_scores_are_those_of_the_models_own_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=scaled(), remove_unused_columns=False)
    attach(trainer, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match="score must be given for Scaled, whose loss of a token"):
        trainer.train()
    free = make_trainer(tmp_path, model=scaled(), remove_unused_columns=False)
    attach(free, Uniform())
    free.train()
    model = scaled()
    loader: DataLoader[Any] = DataLoader(full_rows(), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match="score must be given for Scaled, whose loss of a token"):
        next(iter(onlinesel.steps(loader, model, TopLoss(), candidates=2)))


# Plain loops --------------------------------------------------------------------------------


def masked_losses(model: Any, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits.mT, batch["labels"], reduction="none")


def test_masked_models_count_all_their_labels_in_a_loop() -> None:
    """Their first label counts, so the denominator has it."""
    model, rows = tiny("BertForMaskedLM"), full_rows(4)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=2, collate_fn=collate)
    (step,) = onlinesel.steps(loader, model, Uniform(), accumulate=2)
    for micro in step:
        micro.loss(masked_losses(model, micro.batch)).backward()
    moved = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole: Any = collate(rows)
    losses = masked_losses(model, whole)
    (losses.sum() / sum(len(r["labels"]) for r in rows)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "XLNetLMHeadModel"])
def test_the_default_scorer_is_not_for_losses_that_do_not_shift(name: str) -> None:
    loader: DataLoader[Any] = DataLoader(full_rows(), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match="score must be given for a model whose loss does not sh"):
        next(iter(onlinesel.steps(loader, tiny(name), TopLoss(), candidates=2)))


def test_an_encoder_decoder_does_not_change_its_kind_by_the_sizes_of_a_batch() -> None:
    model = tiny("T5ForConditionalGeneration")
    sizes = [(5, 5), (6, 3), (4, 4), (7, 2)]
    rows = [{"input_ids": torch.arange(1, s + 1), "labels": torch.arange(2, n + 2)}
            for s, n in sizes]  # fmt: skip
    loader: DataLoader[Any] = DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    seen = []
    for step in onlinesel.steps(loader, model, Uniform()):
        for micro in step:
            assert micro.weighing.counts is not None
            seen.append(micro.weighing.counts.tolist())
            micro.loss(torch.zeros(1, micro.batch["labels"].shape[1]))
    assert seen == [[n] for _, n in sizes]


def test_labels_of_a_model_that_tells_nothing_keep_their_kind() -> None:
    model = torch.nn.Linear(2, 2)
    batches = [{"input_ids": torch.ones(1, s).long(), "labels": torch.ones(1, n).long()}
               for s, n in ((4, 4), (5, 3))]  # fmt: skip
    steps = iter(onlinesel.steps(batches, model, Uniform()))
    next(steps)
    with pytest.raises(
        ValueError, match="labels must have the shape of 'input_ids' in every batch"
    ):
        next(steps)
