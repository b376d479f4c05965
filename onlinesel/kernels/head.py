"""The LM head as a value: everything needed to turn hidden states into logits.

The kernels never call a model. They read one :class:`LMHead` and stream over its vocabulary, so
that the ``(batch, time, vocab)`` logits are never built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onlinesel.kernels._shards import is_sharded, local_rows, whole

__all__ = ["LMHead"]

# Names under which configurations keep the soft cap and the logit multiplier. `logits_scaling`
# divides (Granite, MiniCPM3), except in the families of `_SCALING_MULTIPLIES`.
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIER_NAMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SCALING_MULTIPLIES = ("hyperclovax",)


@dataclass(frozen=True, eq=False)
class LMHead:
    """The last linear layer of a language model and what follows it.

    The logits of hidden states ``H`` are ``cap * tanh(z / cap)`` with
    ``z = scale * (H @ weight.T + bias)``, or ``z`` itself without a soft cap.

    The tensors are kept by reference: a head built from a plain model follows in-place optimizer
    steps. A head with adapters on it holds the sum of base and adapters, so build it again after
    each step that trains them.

    Args:
        weight: ``(V, d)`` floating point, one row per vocabulary entry. A DTensor serves sums over
            the vocabulary (``HeadGram``, ``JLProjector.fold``); logits need it :meth:`whole`.
        bias: ``(V,)`` or None.
        scale: Factor on the logits, finite and not zero.
        softcap: Bound of the soft cap in logit units, positive, or None for no cap.

    Raises:
        ValueError: A shape, the scale or the cap is not as stated.
        TypeError: The weight is not floating point (a quantised head must be dequantised first).

    Example:
        >>> import torch
        >>> head = LMHead(torch.eye(3), scale=2.0)
        >>> head.logits(torch.tensor([[1.0, 0.0, -1.0]]))
        tensor([[ 2.,  0., -2.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.weight.is_floating_point():
            raise TypeError(
                f"LMHead: weight must be floating point, got {self.weight.dtype}. "
                "Dequantise the head first, for example with .to(torch.bfloat16)."
            )
        if self.weight.dim() != 2 or self.weight.numel() == 0:
            raise ValueError(
                f"LMHead: weight must be a non-empty (V, d) matrix, got shape "
                f"{tuple(self.weight.shape)}. Gather sharded parameters before scoring."
            )
        if self.bias is not None and self.bias.shape != (self.weight.shape[0],):
            raise ValueError(
                f"LMHead: bias must be of shape ({self.weight.shape[0]},), got "
                f"{tuple(self.bias.shape)}. Pass one bias per row of weight, or None."
            )
        if not math.isfinite(self.scale) or self.scale == 0.0:
            raise ValueError(
                f"LMHead: scale must be finite and not zero, got {self.scale}. "
                "Pass scale=1.0 for unscaled logits."
            )
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(
                f"LMHead: softcap must be positive and finite, got {self.softcap}. "
                "Pass softcap=None for no cap."
            )

    @classmethod
    def from_model(cls, model: Any, *, sharded: bool = False, detach: bool = True) -> LMHead:
        """Read the head of a transformers-like causal language model.

        Works by the attributes of the model (``get_output_embeddings``, ``config``), so no
        framework is imported. DDP and PEFT wrappers are opened; LoRA adapters on the head itself
        are added to its weight; a sharded (DTensor) weight is gathered, which is a collective.
        Parameters that ZeRO-3 has taken apart must be gathered by the caller.

        Args:
            model: The model, wrapped or not.
            sharded: Leave a DTensor weight as it is, where no adapter is on it.
            detach: False keeps the way back to the model's parameters, adapters on the head
                included, for ``policy_logprobs``.

        Returns:
            The head, detached from autograd or not. ``scale`` and ``softcap`` come from the
            configuration (``logit_scale``, ``output_multiplier``, ``lm_head_multiplier``,
            ``logits_scaling``; ``final_logit_softcapping``, ``logits_soft_cap``,
            ``output_logit_soft_cap``), of the text part when the configuration is nested.

        Raises:
            TypeError: The model has no LM head, or the head is wrapped in something unknown.

        Example:
            >>> import torch
            >>> from types import SimpleNamespace
            >>> layer = torch.nn.Linear(4, 6, bias=False)
            >>> config = SimpleNamespace(logits_scaling=8.0, model_type="granite")
            >>> model = SimpleNamespace(get_output_embeddings=lambda: layer, config=config)
            >>> LMHead.from_model(model).scale
            0.125
        """
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
            weight, bias = _read_module(module, sharded)
        if detach:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        config = _text_config(getattr(inner, "config", None))
        return cls(weight, bias, *_read_config(config))

    @property
    def vocab_size(self) -> int:
        """Number of rows of the weight, ``V``."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Number of columns of the weight, ``d``."""
        return self.weight.shape[1]

    def whole(self) -> LMHead:
        """Return the head with its DTensors gathered, which is a collective.

        Example:
            >>> import torch
            >>> head = LMHead(torch.eye(4))
            >>> head.whole() is head
            True
        """
        if not is_sharded(self.weight):
            return self
        bias = None if self.bias is None else whole(self.bias)
        return LMHead(whole(self.weight), bias, self.scale, self.softcap)

    def outline(self) -> LMHead:
        """Return a head of the same form without numbers: it holds no memory.

        It stands in where the weight has been reduced to a factor or a fold already.

        Example:
            >>> import torch
            >>> LMHead(torch.eye(4), scale=2.0).outline().weight.device
            device(type='meta')
        """

        def form(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        bias = None if self.bias is None else form(self.bias)
        return LMHead(form(self.weight), bias, self.scale, self.softcap)

    def sum_over_vocabulary(
        self, part: Callable[[slice, Tensor, Tensor | None], Tensor], chunk: int
    ) -> Tensor:
        """Sum a function of the weight's rows, chunk by chunk; over the ranks if it is sharded.

        Each rank works on the rows that it holds, and the whole weight is nowhere in memory.

        Args:
            part: ``(entries, weight, bias) -> Tensor`` of one fixed shape, float64: the vocabulary
                entries of a chunk, their rows ``(n, d)`` and biases ``(n,)`` or None.
            chunk: Rows handed over at a time.

        Returns:
            The sum, the same on every rank.
        """
        held = local_rows(self.weight)
        bias = None if self.bias is None else whole(self.bias)[held.first :]
        total = None
        # An empty chunk gives zeros of the right shape, for a rank that holds no row.
        for start in range(0, max(held.values.shape[0], 1), chunk):
            rows = held.values[start : start + chunk]
            entries = slice(held.first + start, held.first + start + rows.shape[0])
            offsets = None if bias is None else bias[start : start + rows.shape[0]]
            found = part(entries, rows, offsets)
            total = found if total is None else total + found
        assert total is not None
        return held.total(total)

    def accumulation_dtype(self, hidden: Tensor) -> torch.dtype:
        """Return float32, or float64 when the hidden states or the weight are float64."""
        both = torch.promote_types(hidden.dtype, self.weight.dtype)
        return torch.promote_types(both, torch.float32)

    def part(self, start: int, stop: int, dtype: torch.dtype) -> LMHead:
        """Return the head restricted to the vocabulary entries ``start:stop``, cast to ``dtype``.

        Args:
            start: First vocabulary entry.
            stop: One past the last entry; clipped to V.
            dtype: The dtype of the returned tensors. Nothing is copied when it is theirs already.

        Example:
            >>> import torch
            >>> LMHead(torch.eye(4)).part(1, 3, torch.float64).weight.shape
            torch.Size([2, 4])
        """
        self._check_whole()
        bias = None if self.bias is None else self.bias[start:stop].to(dtype)
        return LMHead(self.weight[start:stop].to(dtype), bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, at float32 or better.

        This is the definition the kernels are checked against, and their tile when called on a
        :meth:`part`. It allocates one value per token and vocabulary entry.

        Args:
            hidden: ``(..., d)``.

        Returns:
            ``(..., V)`` float32, or float64 when an input is.
        """
        self._check_whole()
        dtype = self.accumulation_dtype(hidden)
        # The factor goes on hidden, which is narrower than the logits.
        factor = self.scale if self.softcap is None else self.scale / self.softcap
        states = hidden.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if factor != 1.0:
            states = states * factor
            bias = None if bias is None else bias * factor
        out = torch.nn.functional.linear(states, self.weight.to(dtype), bias)
        return out if self.softcap is None else out.tanh_().mul_(self.softcap)

    def _check_whole(self) -> None:
        if is_sharded(self.weight):
            raise TypeError(
                "LMHead: weight must be whole where logits are made, got a DTensor. "
                "Call whole() first, on every rank."
            )


def check_hidden(owner: str, head: LMHead, hidden: Tensor, dims: int | None = None) -> None:
    """Raise the designed error unless ``hidden`` is floating, ends in d and has ``dims``."""
    shaped = hidden.dim() >= 1 if dims is None else hidden.dim() == dims
    if not shaped or hidden.shape[-1] != head.hidden_size:
        rule = "(..., d)" if dims is None else "(batch, time, d)"
        raise ValueError(
            f"{owner}: hidden must be of shape {rule} with d={head.hidden_size}, got "
            f"{tuple(hidden.shape)}. Pass the states that enter the LM head."
        )
    if not hidden.is_floating_point():
        raise TypeError(
            f"{owner}: hidden must be floating point, got {hidden.dtype}. "
            "Pass the states that enter the LM head, not token ids."
        )


def check_rows(owner: str, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Return the (batch, time) bool mask of the rows that count; all of them for None."""
    if rows is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if rows.shape != hidden.shape[:2]:
        raise ValueError(
            f"{owner}: rows must be of shape {tuple(hidden.shape[:2])}, got {tuple(rows.shape)}. "
            "Pass a (batch, time) mask such as attention_mask, or None for every row."
        )
    return rows.to(device=hidden.device, dtype=torch.bool)


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


def _read_module(module: Any, sharded: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias a head module computes with, adapters included."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else list(module.active_adapters)
        kept = module.modules_to_save
        chosen = kept[active[0]] if active and active[0] in kept else module.original_module
        return _read_module(chosen, sharded)
    if hasattr(module, "token_adapter"):  # PEFT's trainable tokens: only some rows are trained
        module = module.token_adapter
    if hasattr(module, "base_layer"):
        return _read_adapted(module)
    weight, bias = module.weight, getattr(module, "bias", None)
    if sharded:
        return weight, bias
    return whole(weight), None if bias is None else whole(bias)


def _read_adapted(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return base plus adapters of a PEFT layer, as its forward computes them."""
    disabled = bool(getattr(module, "disable_adapters", False))
    merged = bool(getattr(module, "merged", False))
    if disabled and merged:
        raise TypeError(
            "LMHead.from_model: adapters of the head must be unmerged while they are disabled, got "
            "a merged head. Call unmerge_adapter() on the model first."
        )
    weight, bias = _read_module(module.base_layer)
    if disabled or merged:
        return weight, bias
    if callable(getattr(module, "get_merged_weights", None)):
        return module.get_merged_weights(module.active_adapters), bias
    if not hasattr(module, "lora_A"):
        raise TypeError(
            f"LMHead.from_model: adapters of the head must be LoRA, got {type(module).__name__}. "
            "Merge the adapter, or build LMHead(weight, bias) by hand."
        )
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise TypeError(
                f"LMHead.from_model: adapters of the head must be plain LoRA, got the variant "
                f"{type(module.lora_variant[name]).__name__}. Merge the adapter first."
            )
        # A float32 adapter on a bfloat16 base gives a float32 sum, which keeps the adapter's bits.
        weight = weight + whole(module.get_delta_weight(name)).to(weight.device)
        shift = module.lora_B[name].bias
        if shift is not None:
            shift = whole(shift) * module.scaling[name]
            bias = shift if bias is None else bias + shift
    return weight, bias
