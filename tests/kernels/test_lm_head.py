"""LMHead: its definition, what it reads from models, its errors."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlinesel.kernels import LMHead, policy_logprobs

SMALL = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 8.0},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "RecurrentGemma": {"logits_soft_cap": 0.2, "lru_width": 16, "num_hidden_layers": 3},
    "GPTJ": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
}


def build(name: str, **sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name], **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():  # the default initialisation is too small for a cap to matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
        bias = model.get_output_embeddings().bias
        if bias is not None:
            bias.uniform_(-1.0, 1.0)
    return model


def run(model: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the states that enter the head and the logits of the model itself."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    hook.remove()
    return seen[-1], logits


@pytest.mark.parametrize("name", MODELS)
def test_reads_what_the_model_computes(name: str) -> None:
    model = build(name)
    states, logits = run(model, model.get_output_embeddings())
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-5, atol=1e-5)
    bare = LMHead(head.weight, head.bias).logits(states)
    plain = name in ("Llama", "GPT2", "GPTJ")
    assert torch.allclose(bare, logits, rtol=1e-3, atol=1e-3) == plain  # scale and cap matter


@pytest.mark.parametrize(("kind", "use"), [
    ("lora", "on"), ("lora", "off"), ("lora", "merged"), ("save", "on"), ("save", "off"),
    ("tokens", "on"), ("lora_bias", "on"),
])  # fmt: skip
def test_reads_peft(kind: str, use: str) -> None:
    peft = pytest.importorskip("peft")
    base = build("Llama")
    before = copy.deepcopy(base.get_output_embeddings().weight)
    options = {
        "lora": {"target_modules": ["lm_head", "q_proj"]},
        "lora_bias": {"target_modules": ["lm_head"], "lora_bias": True},
        "save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        if use == "merged":
            model.merge_adapter()
        layer = model.get_base_model().get_output_embeddings()
        if use == "off":
            with model.disable_adapter():
                states, logits = run(model, layer)
                head = LMHead.from_model(model)
        else:
            states, logits = run(model, layer)
            head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-4, atol=1e-4)
    assert len(head.low_rank) == (kind.startswith("lora") and use == "on")
    assert torch.equal(head.base_rows(), before) == (use == "off" or bool(head.low_rank))
    assert not any(x.requires_grad for low in head.low_rank for x in (low.a, low.b, head.base))
    assert head.weight.is_meta == bool(head.low_rank)  # whoever reads it alone fails aloud


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_follows_its_adapters_in_place(trains: bool) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("Llama"), options).eval()
    layer = model.get_base_model().get_output_embeddings()
    layer.base_layer.weight.requires_grad_(trains)
    head = LMHead.from_model(model)
    assert head.frozen is not trains
    states, before = run(model, layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
    logits = run(model, layer)[1]
    assert (logits - before).abs().max() > 1.0
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_factors_that_peft_trains() -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], lora_bias=True)
    options.init_lora_weights = False
    model = peft.get_peft_model(build("GPTJ"), options).eval()  # its head has a bias
    ids = torch.arange(3, 15).reshape(2, 6)
    labels = torch.arange(20, 32).reshape(2, 6)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3  # A, B and the bias of B
    states, _ = run(model, model.get_base_model().get_output_embeddings())
    log_p = torch.log_softmax(model(input_ids=ids).logits, -1)
    true = log_p.gather(2, labels.unsqueeze(2)).squeeze(2)
    ours, _ = policy_logprobs(states, LMHead.from_model(model, detach=False), labels)
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
    push = torch.linspace(-1, 1, 12).reshape(2, 6)
    for one, two in zip(
        torch.autograd.grad(ours, list(trained.values()), push),
        torch.autograd.grad(true, list(trained.values()), push), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_trainable_tokens_need_a_plain_weight() -> None:
    layer = SimpleNamespace(
        get_merged_weights=lambda names: None,
        base_layer=SimpleNamespace(
            base_layer=nn.Linear(2, 3), scaling={"x": 1.0}, active_adapters=["x"],
            lora_A={"x": nn.Linear(2, 1)}, lora_B={"x": nn.Linear(1, 3)},
        ),
    )  # fmt: skip
    model = SimpleNamespace(get_output_embeddings=lambda: layer)
    with pytest.raises(TypeError, match="trainable tokens of the head must be over a plain weight"):
        LMHead.from_model(model)


def test_other_adapters_and_variants_are_refused() -> None:
    peft = pytest.importorskip("peft")
    dora = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(TypeError, match=r"adapters of the head must be plain LoRA, got .*Dora"):
        LMHead.from_model(peft.get_peft_model(build("Llama"), dora))
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(TypeError, match="adapters of the head must be LoRA, got Linear"):
        LMHead.from_model(peft.get_peft_model(build("Llama"), ia3))


def test_merged_and_disabled_is_refused() -> None:
    layer = SimpleNamespace(base_layer=nn.Linear(2, 3), disable_adapters=True, merged=True)
    model = SimpleNamespace(get_output_embeddings=lambda: layer)
    with pytest.raises(TypeError, match="must be unmerged while they are disabled"):
        LMHead.from_model(model)


@pytest.mark.parametrize(("config", "scale", "softcap"), [
    ({"logit_scale": None}, 1.0, None),
    ({"output_multiplier": 0.5, "final_logit_softcapping": 20.0}, 0.5, 20.0),
    ({"lm_head_multiplier": 0.25}, 0.25, None),
    ({"logits_scaling": 4.0, "model_type": "granite"}, 0.25, None),
    ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0, None),
    ({"output_logit_soft_cap": 30.0}, 1.0, 30.0),
    ({"text_config": SimpleNamespace(logit_scale=3.0), "logit_scale": 9.0}, 3.0, None),
])  # fmt: skip
def test_reads_configuration_names(
    config: dict[str, Any], scale: float, softcap: float | None
) -> None:
    layer = nn.Linear(2, 3)
    model = SimpleNamespace(get_output_embeddings=lambda: layer, config=SimpleNamespace(**config))
    wrapped = SimpleNamespace(module=model)
    head = LMHead.from_model(wrapped)
    assert (head.scale, head.softcap) == (scale, softcap)
    assert head.weight.data_ptr() == layer.weight.data_ptr()  # follows in-place updates


def test_gathers_sharded_weights() -> None:
    layer = nn.Linear(2, 3, bias=False)
    shard = SimpleNamespace(full_tensor=lambda: layer.weight)
    model = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=shard, bias=None))
    assert torch.equal(LMHead.from_model(model).weight, layer.weight)


def test_logits_are_float32_and_parts_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=generator).bfloat16()
    head = LMHead(weight, torch.randn(9, generator=generator).bfloat16(), -0.5, 2.0)
    states = torch.randn(3, 4, generator=generator).bfloat16()
    logits = head.logits(states)
    z = -0.5 * (states.double() @ weight.double().T + head.bias.double())  # type: ignore[union-attr]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 2.0 * torch.tanh(z / 2.0), rtol=0, atol=1e-6)
    assert torch.equal(head.part(2, 5, torch.float32).logits(states), logits[:, 2:5])
    assert head.logits(states.double()).dtype == torch.float64


@pytest.mark.parametrize(("kwargs", "error", "text"), [
    ({"weight": torch.ones(3, 2).to(torch.int8)}, TypeError,
     r"LMHead: weight must be floating point, got torch.int8. Dequantise"),
    ({"weight": torch.ones(3)}, ValueError,
     r"LMHead: weight must be a non-empty \(V, d\) matrix, got shape \(3,\). Gather"),
    ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, ValueError,
     r"LMHead: bias must be of shape \(3,\), got \(2,\). Pass one bias"),
    ({"weight": torch.ones(3, 2), "scale": 0.0}, ValueError,
     r"LMHead: scale must be finite and not zero, got 0.0. Pass scale=1.0"),
    ({"weight": torch.ones(3, 2), "softcap": -1.0}, ValueError,
     r"LMHead: softcap must be positive and finite, got -1.0. Pass softcap=None"),
])  # fmt: skip
def test_errors(kwargs: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LMHead(**kwargs)


@pytest.mark.parametrize("model", [
    nn.Linear(2, 2), SimpleNamespace(get_output_embeddings=lambda: None)
])  # fmt: skip
def test_a_model_without_head_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"LMHead.from_model: model must have an LM head, got"):
        LMHead.from_model(model)


def test_a_scale_in_words_is_refused() -> None:
    config = SimpleNamespace(logit_scale="inv_sqrt_d_model")
    model = SimpleNamespace(get_output_embeddings=lambda: nn.Linear(2, 3), config=config)
    with pytest.raises(TypeError, match="scale must be a number in the configuration, got 'inv"):
        LMHead.from_model(model)
