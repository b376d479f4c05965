"""Weights whose rows are made where they are needed: quantised ones, and ones under LoRA adapters.

A kernel asks for a range of rows and works on that tile alone. A quantised matrix gives the rows
of the range dequantised. An adapter stays two thin factors, whose product with the hidden states
is added to the tile's logits; their full (V, d) product is nowhere in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from onlinesel.kernels._shards import is_sharded, whole

__all__ = ["HeadRows", "LowRank", "RowSource"]


class RowSource(Protocol):
    """A ``(V, d)`` matrix that gives any range of its rows as floats, for instance a quantised one.

    Any object with these four members is one; nothing has to be inherited. It has no gradient.

    Example:
        >>> import torch
        >>> from onlinesel.kernels import LMHead
        >>> class Int8Rows:
        ...     def __init__(self, codes, scales):
        ...         self.codes, self.scales = codes, scales
        ...         self.shape, self.dtype, self.device = codes.shape, scales.dtype, codes.device
        ...     def rows(self, start, stop):
        ...         return self.codes[start:stop] * self.scales[start:stop, None]
        >>> codes = torch.tensor([[127, -127], [0, 64]], dtype=torch.int8)
        >>> head = LMHead.from_rows(Int8Rows(codes, torch.tensor([0.5, 0.25])))
        >>> head.logits(torch.tensor([[1.0, 0.0]]))
        tensor([[63.5000,  0.0000]])
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(V, d)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the rows that it gives."""

    @property
    def device(self) -> torch.device:
        """Where the rows are made."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop``, of which there is one at least; they are inside V."""


class LowRank(NamedTuple):
    """A LoRA adapter: ``scale * (b @ a)`` is added to a weight.

    Attributes:
        a: ``(r, d)`` floating point.
        b: ``(V, r)`` floating point.
        scale: Factor, such as ``lora_alpha / r``.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def reduced(self, states: Tensor) -> Tensor:
        """Return ``scale * (states @ a.T)``, ``(..., r)`` in the dtype of ``states``."""
        return states @ (self.a.to(states.dtype).T * self.scale)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """A weight as a base and the adapters on it.

    Attributes:
        base: ``(V, d)`` matrix, which may be a DTensor cut by rows, or a source of rows.
        low_rank: The adapters.
        frozen: Whether nothing trains the base, so that what derives from it alone may be kept.
    """

    base: Tensor | RowSource
    low_rank: tuple[LowRank, ...] = ()
    frozen: bool = False

    def __post_init__(self) -> None:
        if len(self.base.shape) != 2 or 0 in self.base.shape:
            raise ValueError(
                f"LMHead.from_rows: base must be a non-empty (V, d) matrix, got shape "
                f"{tuple(self.base.shape)}. Gather sharded parameters before scoring."
            )
        if not self.dtype.is_floating_point:
            raise TypeError(
                f"LMHead.from_rows: base must give floating point rows, got {self.base.dtype}. "
                "Pass a source that dequantises them."
            )
        entries, width = self.base.shape
        for a, b, _ in self.low_rank:
            if a.dim() != 2 or a.shape[1] != width or b.shape != (entries, a.shape[0]):
                raise ValueError(
                    f"LMHead.from_rows: low_rank must hold a of shape (r, {width}) and b of shape "
                    f"({entries}, r), got {tuple(a.shape)} and {tuple(b.shape)}. Pass the factors "
                    "so that b @ a has the shape of the weight."
                )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that holds base and adapters."""
        kinds = (x.dtype for low in self.low_rank for x in (low.a, low.b))
        return reduce(torch.promote_types, kinds, self.base.dtype)

    def take(self, start: int, stop: int) -> Tensor:
        """Return rows of the base, without the adapters."""
        if isinstance(self.base, Tensor):
            return self.base[start:stop]
        if start == stop:
            return torch.empty(
                0, self.base.shape[1], dtype=self.base.dtype, device=self.base.device
            )
        found = self.base.rows(start, stop)
        if found.shape != (stop - start, self.base.shape[1]):
            raise ValueError(
                f"RowSource: rows({start}, {stop}) must give shape "
                f"{(stop - start, self.base.shape[1])}, got {tuple(found.shape)} from "
                f"{type(self.base).__name__}. Return exactly the rows of the range."
            )
        return found

    def take_low_rank(self, start: int, stop: int) -> tuple[LowRank, ...]:
        """Return the adapters restricted to these rows."""
        return tuple(low._replace(b=low.b[start:stop]) for low in self.low_rank)

    def whole(self) -> HeadRows:
        """Return the same with a DTensor base gathered, which is a collective."""
        return replace(self, base=whole(self.base)) if is_sharded(self.base) else self
