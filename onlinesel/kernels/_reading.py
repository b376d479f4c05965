"""What a model knows of its LM head: weight, adapters, bias, scale and soft cap.

Everything is found by attributes, so no framework is imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onlinesel.kernels._quantized import quantized_rows
from onlinesel.kernels._rows import LowRank, RowSource
from onlinesel.kernels._shards import whole

__all__ = ["ReadHead", "read_head"]

# Names under which configurations keep the soft cap and the logit multiplier. `logits_scaling`
# divides (Granite, MiniCPM3), except in the families of `_SCALING_MULTIPLIES`.
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIER_NAMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SCALING_MULTIPLIES = ("hyperclovax",)


class ReadHead(NamedTuple):
    """The arguments of ``LMHead.from_rows``."""

    base: Tensor | RowSource
    low_rank: tuple[LowRank, ...]
    bias: Tensor | None
    scale: float
    softcap: float | None
    frozen: bool


class _Weights(NamedTuple):
    """What a head module computes with."""

    base: Tensor | RowSource
    low_rank: tuple[LowRank, ...]
    bias: Tensor | None
    frozen: bool

    def detached(self) -> _Weights:
        base = self.base.detach() if isinstance(self.base, Tensor) else self.base
        low_rank = tuple(LowRank(a.detach(), b.detach(), scale) for a, b, scale in self.low_rank)
        bias = None if self.bias is None else self.bias.detach()
        return _Weights(base, low_rank, bias, self.frozen)


def read_head(model: Any, sharded: bool, detach: bool) -> ReadHead:
    """Read the head of a model; see ``LMHead.from_model``."""
    inner = _unwrap(model)
    getter = getattr(inner, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    if module is None:
        raise TypeError(
            f"LMHead.from_model: model must have an LM head, got {type(inner).__name__} whose "
            "get_output_embeddings() gives none. Pass a causal language model, or build "
            "LMHead(weight, bias) by hand."
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        found = _read_module(module, sharded)
    scale, softcap = _read_config(_text_config(getattr(inner, "config", None)))
    base, low_rank, bias, frozen = found.detached() if detach else found
    return ReadHead(base, low_rank, bias, scale, softcap, frozen)


def _unwrap(model: Any) -> Any:
    """Open the wrappers of data parallelism (``.module``) and of PEFT (``get_base_model``)."""
    while True:
        if callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
            model = model.module
        else:
            return model


def _text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the language model."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else getattr(config, "text_config", config)


def _read_config(config: Any) -> tuple[float, float | None]:
    """Return the scale and the soft cap a configuration asks for."""
    caps = (getattr(config, name, None) for name in _SOFTCAP_NAMES)
    softcap = next((cap for cap in caps if cap is not None), None)
    factors = (getattr(config, name, None) for name in _MULTIPLIER_NAMES)
    scale = next((factor for factor in factors if factor is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        multiplies = getattr(config, "model_type", None) in _SCALING_MULTIPLIES
        scale = scaling if multiplies else 1.0 / scaling
    for name, value in (("softcap", softcap), ("scale", scale)):
        if isinstance(value, str):
            raise TypeError(
                f"LMHead.from_model: {name} must be a number in the configuration, got {value!r}. "
                "Build LMHead(weight, bias, scale, softcap) by hand."
            )
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def _read_module(module: Any, sharded: bool) -> _Weights:
    """Return the tensors of a head module, its adapters included."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else list(module.active_adapters)
        kept = module.modules_to_save
        chosen = kept[active[0]] if active and active[0] in kept else module.original_module
        return _read_module(chosen, sharded)
    if hasattr(module, "token_adapter"):  # PEFT's trainable tokens: only some rows are trained
        module = module.token_adapter
    if hasattr(module, "base_layer"):
        return _read_adapted(module, sharded)
    bias, rows = getattr(module, "bias", None), quantized_rows(module)
    if rows is not None:
        return _Weights(rows, (), bias, frozen=True)
    weight = module.weight
    frozen = not getattr(weight, "requires_grad", False)
    if sharded:
        return _Weights(weight, (), bias, frozen)
    return _Weights(whole(weight), (), None if bias is None else whole(bias), frozen)


def _read_adapted(module: Any, sharded: bool) -> _Weights:
    """Return base and adapters of a PEFT layer, as its forward computes them."""
    disabled = bool(getattr(module, "disable_adapters", False))
    merged = bool(getattr(module, "merged", False))
    if disabled and merged:
        raise TypeError(
            "LMHead.from_model: adapters of the head must be unmerged while they are disabled, got "
            "a merged head. Call unmerge_adapter() on the model first."
        )
    if callable(getattr(module, "get_merged_weights", None)) and not disabled and not merged:
        return _read_tokens(module)
    found = _read_module(module.base_layer, sharded)
    if disabled or merged:
        return found
    if not hasattr(module, "lora_A"):
        raise TypeError(
            f"LMHead.from_model: adapters of the head must be LoRA, got {type(module).__name__}. "
            "Merge the adapter, or build LMHead(weight, bias) by hand."
        )
    low_rank, bias, device = list(found.low_rank), found.bias, found.base.device
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise TypeError(
                f"LMHead.from_model: adapters of the head must be plain LoRA, got the variant "
                f"{type(module.lora_variant[name]).__name__}. Merge the adapter first."
            )
        down, up, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
        a, b = (whole(layer.weight).to(device) for layer in (down, up))
        low_rank.append(LowRank(a, b, scale))
        if up.bias is not None:
            shift = whole(up.bias).to(device) * scale
            bias = shift if bias is None else whole(bias) + shift
    return _Weights(found.base, tuple(low_rank), bias, found.frozen)


def _read_tokens(module: Any) -> _Weights:
    """Return the weight of a PEFT layer that trains some of its rows: a copy with them replaced."""
    found = _read_module(module.base_layer, sharded=False)
    if found.low_rank or not isinstance(found.base, Tensor):
        raise TypeError(
            "LMHead.from_model: trainable tokens of the head must be over a plain weight, got "
            f"{type(module.base_layer).__name__}. Leave the head out of the quantisation, or train "
            "the tokens in the embedding alone."
        )
    return _Weights(module.get_merged_weights(module.active_adapters), (), found.bias, False)
