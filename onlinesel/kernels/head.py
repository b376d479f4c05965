"""The LM head as a value: everything needed to turn hidden states into logits.

The kernels never call a model. They read one :class:`LMHead` and stream over its vocabulary, so
that the ``(batch, time, vocab)`` logits are never built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onlinesel.kernels._reading import read_head
from onlinesel.kernels._rows import HeadRows, LowRank, RowSource
from onlinesel.kernels._shards import is_sharded, whole

__all__ = ["LMHead"]


@dataclass(frozen=True, eq=False)
class LMHead:
    """The last linear layer of a language model and what follows it.

    The logits of hidden states ``H`` are ``cap * tanh(z / cap)`` with
    ``z = scale * (H @ weight.T + bias)``, or ``z`` itself without a soft cap.

    The tensors are kept by reference, those of LoRA adapters too: a head built from a model whose
    parameters are whole follows in-place optimizer steps. Parameters that had to be gathered, a
    bias of adapters, and trainable tokens are copies: build such a head again after each step.

    A quantised weight, or one under adapters, is never a matrix in memory: see :meth:`from_rows`.

    Args:
        weight: ``(V, d)`` floating point, one row per vocabulary entry. A DTensor serves sums over
            the vocabulary (``HeadGram``, ``JLProjector.fold``); logits need it :meth:`whole`.
        bias: ``(V,)`` or None.
        scale: Factor on the logits, finite and not zero.
        softcap: Bound of the soft cap in logit units, positive, or None for no cap.
        made: How the rows are made of a head of :meth:`from_rows`, whose ``weight`` is an outline
            on the meta device, without numbers; None where ``weight`` is the weight.

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
    made: HeadRows | None = None

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
        framework is imported. DDP and PEFT wrappers are opened. LoRA adapters on the head stay
        two factors, and a weight quantised by bitsandbytes (4 or 8 bits) or torchao stays
        quantised (:meth:`from_rows`). A sharded (DTensor) weight is gathered, which is a
        collective. Parameters that ZeRO-3 has taken apart must be gathered by the caller.

        Args:
            model: The model, wrapped or not.
            sharded: Leave a DTensor weight as it is.
            detach: False keeps the way back to the model's parameters, adapters on the head
                included, for ``policy_logprobs``.

        Returns:
            The head, detached from autograd or not. ``scale`` and ``softcap`` come from the
            configuration (``logit_scale``, ``output_multiplier``, ``lm_head_multiplier``,
            ``logits_scaling``; ``final_logit_softcapping``, ``logits_soft_cap``,
            ``output_logit_soft_cap``), of the text part when the configuration is nested.

        Raises:
            TypeError: The model has no LM head, or the head is wrapped or quantised in a way that
                is not known.

        Example:
            >>> import torch
            >>> from types import SimpleNamespace
            >>> layer = torch.nn.Linear(4, 6, bias=False)
            >>> config = SimpleNamespace(logits_scaling=8.0, model_type="granite")
            >>> model = SimpleNamespace(get_output_embeddings=lambda: layer, config=config)
            >>> LMHead.from_model(model).scale
            0.125
        """
        base, low_rank, bias, scale, softcap, frozen = read_head(model, sharded, detach)
        return cls.from_rows(base, low_rank, bias, scale, softcap, frozen=frozen)

    @classmethod
    def from_rows(
        cls,
        base: Tensor | RowSource,
        low_rank: Iterable[LowRank] = (),
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        *,
        frozen: bool = False,
    ) -> LMHead:
        """Build a head whose weight is made tile by tile: a source of rows, adapters, or both.

        Every kernel but the fused Triton backend takes it; that one reads a weight in memory.

        Args:
            base: ``(V, d)`` weight without the adapters, or an object that gives its rows.
            low_rank: LoRA adapters on it.
            bias: As in the constructor, likewise scale and softcap.
            scale: Factor on the logits.
            softcap: Bound of the soft cap.
            frozen: Nothing trains the base: ``HeadGram`` then keeps what derives from it alone.

        Raises:
            ValueError: A shape is not as stated.
            TypeError: The rows are not floating point.

        Example:
            >>> import torch
            >>> from onlinesel.kernels import LowRank
            >>> adapter = LowRank(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0], [2.0]]), 0.5)
            >>> head = LMHead.from_rows(torch.eye(2), [adapter])
            >>> head.logits(torch.tensor([[3.0, 4.0]]))
            tensor([[ 3., 11.]])
        """
        made = HeadRows(base, tuple(low_rank), frozen)
        if isinstance(base, Tensor) and not made.low_rank:
            return cls(base, bias, scale, softcap)
        outline = torch.empty(tuple(base.shape), dtype=made.dtype, device="meta")
        return cls(outline, bias, scale, softcap, made)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the weight, ``V``."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Number of columns of the weight, ``d``."""
        return self.weight.shape[1]

    @property
    def base(self) -> Tensor | RowSource:
        """The weight without its adapters, or what gives its rows."""
        return self.weight if self.made is None else self.made.base

    @property
    def low_rank(self) -> tuple[LowRank, ...]:
        """The adapters on the weight."""
        return () if self.made is None else self.made.low_rank

    @property
    def frozen(self) -> bool:
        """Whether nothing trains the base of a head of :meth:`from_rows`."""
        return self.made is not None and self.made.frozen

    @property
    def device(self) -> torch.device:
        """Where the rows of the weight are."""
        return self.base.device

    def base_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows ``start:stop`` of the base, clipped to V: a view, or made for the call.

        Example:
            >>> import torch
            >>> LMHead(torch.eye(4)).base_rows(1, 3).shape
            torch.Size([2, 4])
        """
        self._check_whole()
        stop = self.vocab_size if stop is None else min(stop, self.vocab_size)
        start = min(start, stop)
        return self.weight[start:stop] if self.made is None else self.made.take(start, stop)

    def whole(self) -> LMHead:
        """Return the head with its DTensors gathered, which is a collective.

        Example:
            >>> import torch
            >>> head = LMHead(torch.eye(4))
            >>> head.whole() is head
            True
        """
        if not is_sharded(self.base):
            return self
        bias = None if self.bias is None else whole(self.bias)
        if self.made is None:
            return LMHead(whole(self.weight), bias, self.scale, self.softcap)
        return LMHead(self.weight, bias, self.scale, self.softcap, self.made.whole())

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

    def accumulation_dtype(self, hidden: Tensor) -> torch.dtype:
        """Return float32, or float64 when the hidden states or the weight are float64."""
        both = torch.promote_types(hidden.dtype, self.weight.dtype)
        return torch.promote_types(both, torch.float32)

    def part(self, start: int, stop: int, dtype: torch.dtype | None = None) -> LMHead:
        """Return the head restricted to the vocabulary entries ``start:stop``.

        Args:
            start: First vocabulary entry.
            stop: One past the last entry; clipped to V.
            dtype: The dtype of its base and bias, or None for theirs; adapters keep theirs. Nothing
                is copied when it is theirs already.

        Returns:
            A head whose base is a matrix in memory.

        Example:
            >>> import torch
            >>> LMHead(torch.eye(4)).part(1, 3, torch.float64).weight.shape
            torch.Size([2, 4])
        """
        rows = self.base_rows(start, stop)
        bias = None if self.bias is None else self.bias[start:stop]
        if dtype is not None:
            rows, bias = rows.to(dtype), None if bias is None else bias.to(dtype)
        low_rank = () if self.made is None else self.made.take_low_rank(start, stop)
        return LMHead.from_rows(rows, low_rank, bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, at float32 or better.

        This is the definition the kernels are checked against, and their tile when called on a
        :meth:`part`. It allocates one value per token and vocabulary entry.

        Args:
            hidden: ``(..., d)``.

        Returns:
            ``(..., V)`` float32, or float64 when an input is.
        """
        dtype = self.accumulation_dtype(hidden)
        # The factor goes on hidden, which is narrower than the logits.
        factor = self.scale if self.softcap is None else self.scale / self.softcap
        states = hidden.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if factor != 1.0:
            states = states * factor
            bias = None if bias is None else bias * factor
        out = torch.nn.functional.linear(states, self.base_rows().to(dtype), bias)
        for low in self.low_rank:
            reduced = low.reduced(states).reshape(-1, low.a.shape[0])
            out.view(-1, out.shape[-1]).addmm_(reduced, low.b.to(dtype).T)
        return out if self.softcap is None else out.tanh_().mul_(self.softcap)

    def _check_whole(self) -> None:
        if is_sharded(self.base):
            raise TypeError(
                "LMHead: weight must be whole where logits are made, got a DTensor. "
                "Call whole() first, on every rank."
            )
