"""Rows of quantised weights against the dequantisation of the whole weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlinesel.kernels import HeadGram, LMHead, policy_logprobs, token_scores
from onlinesel.kernels._quantized import quantized_rows
from tests.kernels.made_heads import in_memory
from tests.kernels.no_logits import LargestTensor
from tests.kernels.test_lm_head import build
from tests.kernels.test_token_scores import NUMBERS, naive

V, D = 203, 96  # rows that end inside a block of 64, and a last block that is not full
RANGES = [(0, V), (0, 1), (1, 2), (31, 33), (160, 180), (V - 1, V)]


def four_bit(v: int = V, d: int = D, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(d, v, bias=False, compute_dtype=torch.float32)
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to("cpu")


def eight_bit(v: int = V, d: int = D) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(d, v, bias=False, has_fp16_weights=False)
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    return layer.to("cpu")


def torchao(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():  # it imports what it will not need
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        layer = nn.Sequential(nn.Linear(D, V, bias=False)).requires_grad_(False)
        quantization.quantize_(layer, getattr(quantization, name)(**options))
    return layer[0]


def whole_four_bit(layer: Any) -> Tensor:
    """By the definition: bitsandbytes 0.50 errs on a CPU where a block crosses the end of a row."""
    functional, state = pytest.importorskip("bitsandbytes.functional"), layer.weight.quant_state
    codes = layer.weight.data.reshape(-1).view(torch.uint8)
    halves = torch.stack((codes >> 4, codes & 15), 1).flatten().long()
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return (state.code[halves[: state.shape.numel()]] * scales).reshape(state.shape).to(state.dtype)


def whole_eight_bit(layer: Any) -> Tensor:
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "nf4": (lambda: four_bit(quant_type="nf4"), whole_four_bit),
    "fp4": (lambda: four_bit(quant_type="fp4", compress_statistics=False), whole_four_bit),
    "nf4 bfloat16": (
        lambda: four_bit(dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.bfloat16),
        whole_four_bit,
    ),
    "nf4 blocks": (lambda: four_bit(quant_type="nf4", blocksize=128, v=700), whole_four_bit),
    "int8": (eight_bit, whole_eight_bit),
    "torchao int8": (
        lambda: torchao("Int8WeightOnlyConfig"), lambda layer: layer.weight.dequantize()
    ),
    "torchao float8": (
        lambda: torchao("Float8WeightOnlyConfig"), lambda layer: layer.weight.dequantize()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_any_range_of_rows_is_that_of_the_whole(name: str) -> None:
    make, dequantise = LAYERS[name]
    layer = make()
    rows, true = quantized_rows(layer), dequantise(layer)
    assert rows is not None and rows.dtype == true.dtype
    assert tuple(rows.shape) == tuple(true.shape) and true.std() > 0.05
    for start, stop in (*RANGES, (0, len(true))):
        found = rows.rows(start, stop)
        assert found.shape == (stop - start, D)
        torch.testing.assert_close(found, true[start:stop], rtol=1e-6, atol=0)


def test_eight_bits_after_the_layer_has_run() -> None:
    layer = eight_bit()
    before = quantized_rows(layer).rows(3, 9)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cast of its inputs
        layer(torch.ones(2, D))
    assert layer.state.SCB is not None
    assert torch.equal(quantized_rows(layer).rows(3, 9), before)  # type: ignore[union-attr]
    layer.state.SCB = layer.weight.SCB = None
    with pytest.raises(TypeError, match=r"got Int8Params without row scales \(SCB\) in Linear8bit"):
        quantized_rows(layer)


@pytest.mark.parametrize("nested", [False, True])
def test_the_layout_that_evaluation_makes_on_a_cpu(nested: bool) -> None:
    layer = four_bit(224, 128, quant_type="nf4", compress_statistics=nested)
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU does not multiply bfloat16")
    before, rows = whole_four_bit(layer), quantized_rows(layer)
    assert rows is not None
    with torch.no_grad():
        layer.eval()(torch.ones(2, 128))  # which changes the weight under the rows
    assert layer.weight.quant_state.packing_format_for_cpu
    for start, stop in ((0, 224), (0, 1), (31, 33), (60, 130), (223, 224)):
        # Its scales are rounded to bfloat16, and so are the rows.
        torch.testing.assert_close(
            rows.rows(start, stop).float(), before[start:stop], rtol=2**-7, atol=0
        )
    layer.state_dict()  # changes it back
    assert not layer.weight.quant_state.packing_format_for_cpu
    for start, stop in ((31, 33), (60, 130)):  # nested scales are quantised a second time
        torch.testing.assert_close(
            rows.rows(start, stop), before[start:stop], rtol=0.05 if nested else 2**-7, atol=0
        )


def test_where_rows_are_blocks_that_is_what_the_library_gives() -> None:
    layer = four_bit(203, 128, quant_type="nf4")
    functional = pytest.importorskip("bitsandbytes.functional")
    given = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(whole_four_bit(layer), given, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_scores_and_gram_of_a_quantised_head(make: Callable[..., Any]) -> None:
    layer = make(v=20_000, d=64)
    layer.get_output_embeddings = lambda: layer
    head = LMHead.from_model(layer)
    assert head.frozen and head.weight.is_meta
    g = torch.Generator().manual_seed(1)
    hidden, labels = torch.randn(6, 64, generator=g), torch.randint(0, 20_000, (6,), generator=g)
    with LargestTensor() as seen:
        out, root = token_scores(hidden, head, labels), HeadGram(head).root()
    # A tile and the blocks around it; the codes themselves are half of this or less.
    assert seen.numel <= 4096 * 64 + 2 * 64 * 256, seen.where
    plain = in_memory(head, torch.float64)
    true = naive(hidden, plain, labels)
    for name in NUMBERS:
        torch.testing.assert_close(getattr(out, name).double(), true[name], rtol=1e-5, atol=3e-5)
    squared = plain.weight.T @ plain.weight
    assert float((root.double().T @ root.double() - squared).norm() / squared.norm()) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_heads_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = build("Llama", hidden_size=64, vocab_size=96)
    model.lm_head = four_bit(96, 64, quant_type="nf4") if kind == "nf4" else eight_bit(96, 64)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    options = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"])
    options.init_lora_weights = False
    model = peft.get_peft_model(model, options)
    layer = model.get_base_model().get_output_embeddings()
    assert "bnb" in type(layer).__module__
    states = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.arange(20, 32).reshape(2, 6)
    head = LMHead.from_model(model, detach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts inside
        logits = layer(states).float()
    near = 1e-4 if kind == "nf4" else 0.05  # the 8-bit layer rounds the states as well
    scale = float(logits.detach().std())
    torch.testing.assert_close(head.logits(states), logits, rtol=0, atol=near * scale)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours, _ = policy_logprobs(states, head, labels)
    true = torch.log_softmax(in_memory(head).logits(states), -1).gather(2, labels[..., None])[
        ..., 0
    ]
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
    for one, two in zip(
        torch.autograd.grad(ours.square().sum(), [states, *factors]),
        torch.autograd.grad(true.square().sum(), [states, *factors]), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
