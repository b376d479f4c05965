"""The scoring forward gives the plain formulas, leaves the model alone and makes no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaModel, set_seed

from onlinesel.scoring import CausalLMScorer, evaluating, unwrap
from tests.callbacks.hosts import collate, make_model, make_rows
from tests.kernels.no_logits import LargestTensor


def batch(count: int = 5, side: str = "right") -> dict[str, torch.Tensor]:
    return collate(make_rows(count), side)


def softcapped() -> Any:
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(**sizes, **depth, final_logit_softcapping=0.5, pad_token_id=0)
    return Gemma2ForCausalLM(config).eval()


def plain(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The signals from the logits, in float64, row by row."""
    result: dict[str, list[float]] = {}
    with torch.no_grad():
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.double()
    for z, labels, mask in zip(logits, inputs["labels"], inputs["attention_mask"], strict=True):
        target, known = labels[1:], labels[1:] != -100
        p = z[:-1].softmax(-1)[known]
        y = nn.functional.one_hot(target[known], z.shape[-1])
        errors = (p - y).norm(dim=-1)
        values = {
            "loss": -(p * y).sum(-1).log().mean(),
            "entropy": -(p * p.log()).sum(-1).mean(),
            "el2n": errors.mean(),
            "grad_norm": errors.square().sum().sqrt() / known.sum(),
            "nuclear_norm": torch.linalg.svdvals(z[mask == 1]).sum(),
        }
        for name, value in values.items():
            result.setdefault(name, []).append(float(value))
    return {name: torch.tensor(values) for name, values in result.items()}


@pytest.mark.parametrize("build", [make_model, softcapped])
@pytest.mark.parametrize("side", ["right", "left"])
def test_signals_are_the_plain_formulas(build: Any, side: str) -> None:
    model, inputs = build().eval(), batch(side=side)
    expected = plain(model, inputs)
    found = CausalLMScorer(tuple(expected))(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=2e-5, atol=1e-6)
    assert found.tokens.tolist() == [len(r["input_ids"]) - 2 for r in make_rows(5)]


@pytest.mark.parametrize("rows", ["attention", "response", "all"])
def test_rows_choose_what_enters_the_matrix(rows: str) -> None:
    model, inputs = make_model().eval(), batch()
    with torch.no_grad():
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
    masks = {
        "attention": inputs["attention_mask"] == 1,
        "response": nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100,
        "all": torch.ones_like(inputs["labels"], dtype=torch.bool),
    }
    expected = [torch.linalg.svdvals(z[m]).sum() for z, m in zip(logits, masks[rows], strict=True)]
    found = CausalLMScorer(("nuclear_norm",), rows=rows)(model, inputs).nuclear_norm
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=0)


def test_length_normalisers_divide_by_rows_and_their_root() -> None:
    model, inputs = make_model().eval(), batch()
    norms = {
        length: CausalLMScorer(("nuclear_norm",), length=length)(model, inputs).nuclear_norm
        for length in ("raw", "rows", "sqrt")
    }
    count = inputs["attention_mask"].sum(dim=1)
    torch.testing.assert_close(norms["rows"], norms["raw"] / count)
    torch.testing.assert_close(norms["sqrt"], norms["raw"] / count.sqrt())


@pytest.mark.parametrize("needs", [("loss", "entropy", "el2n"), ("nuclear_norm", "embedding")])
def test_no_logits_are_made(needs: tuple[str, ...]) -> None:
    model, inputs = make_model(vocab_size=16384).eval(), batch(8)
    limit = inputs["input_ids"].numel() * 16384
    scorer = CausalLMScorer(needs, projector={"vocab_dim": 4, "time_dim": 2, "scale": "unit"})
    scorer(model, inputs)  # what depends on the weight alone is built once
    with LargestTensor() as ours:
        scorer(model, inputs)
    with LargestTensor() as naive, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert naive.numel >= limit > 2 * ours.numel


def test_embeddings_do_not_depend_on_padding() -> None:
    options = {"vocab_dim": 8, "time_dim": 2, "scale": "unit"}
    model = make_model().eval()
    found = [
        CausalLMScorer(("embedding",), projector=options)(model, batch(side=side)).embedding
        for side in ("right", "left")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_modes_are_restored_per_submodule_and_no_gradient_remains() -> None:
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    CausalLMScorer(("loss",))(model, batch())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_modes_are_restored_after_an_error() -> None:
    model = make_model().train()
    with pytest.raises(RuntimeError, match="boom"), evaluating(model):
        raise RuntimeError("boom")
    assert model.training and model.lm_head.training and torch.is_grad_enabled()


def test_dropout_does_not_enter_the_scores() -> None:
    model = make_model(attention_dropout=0.9).train()
    scorer = CausalLMScorer(("loss",))
    assert torch.equal(scorer(model, batch()).loss, scorer(model, batch()).loss)


def test_a_head_that_trains_is_read_again_after_a_step() -> None:
    model, scorer = make_model().eval(), CausalLMScorer(("nuclear_norm",))
    before = scorer(model, batch()).nuclear_norm
    model.lm_head.weight.data.mul_(2.0)
    torch.testing.assert_close(scorer(model, batch()).nuclear_norm, before)  # no step was told
    scorer.advance()
    torch.testing.assert_close(scorer(model, batch()).nuclear_norm, 2 * before)


def test_refresh_every_waits_and_a_frozen_head_is_never_rebuilt() -> None:
    for trains, expected in ((True, [1, 1, 2]), (False, [1, 1, 1])):
        model = make_model().eval()
        model.lm_head.weight.requires_grad_(trains)
        scorer = CausalLMScorer(("nuclear_norm",), refresh_every=2)
        before = scorer(model, batch()).nuclear_norm
        model.lm_head.weight.data.mul_(2.0)
        factors = []
        for _ in range(3):
            factors.append(round(float((scorer(model, batch()).nuclear_norm / before).mean())))
            scorer.advance()
        assert factors == expected


def test_rows_without_labels_have_no_loss() -> None:
    inputs = batch()
    inputs["labels"][2] = -100
    found = CausalLMScorer(("loss", "grad_norm"))(make_model(), inputs)
    assert torch.isnan(found.loss).tolist() == [False, False, True, False, False]
    assert torch.isnan(found.grad_norm).tolist() == [False, False, True, False, False]


def test_unwrap_finds_the_core() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = make_model()
    assert unwrap(Wrapper(Wrapper(model))) is model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needs": ("reward",)}, "needs must be among .*, got \\['reward'\\]"),
        ({"needs": ("loss",), "rows": "prompt"}, "rows must be one of attention, response, all"),
        ({"needs": ("loss",), "length": "log"}, "length must be one of raw, rows, sqrt"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CausalLMScorer: {message}"):
        CausalLMScorer(**options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="CausalLMScorer: model must have an LM head"):
        CausalLMScorer(("loss",))(LlamaModel(make_model().config), batch())
    with pytest.raises(ValueError, match="CausalLMScorer: reference must be a model, 'adapter'"):
        CausalLMScorer(("reference_loss",))(make_model(), batch())
