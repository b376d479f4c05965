"""A head as what autograd knows, its tensors, and the rest; and the gradients of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onlinesel.kernels._rows import LowRank, RowSource
from onlinesel.kernels.head import LMHead

__all__ = ["AdapterGradient", "HeadForm", "put_together", "take_apart"]


class HeadForm(NamedTuple):
    """What of a head is no tensor that can have a gradient."""

    scale: float
    softcap: float | None
    source: RowSource | None
    factors: tuple[float, ...]


def take_apart(head: LMHead) -> tuple[HeadForm, tuple[Tensor | None, ...]]:
    """Return the form of a head and its tensors: base (None if it is a source), bias, a, b, ..."""
    matrix = head.base if isinstance(head.base, Tensor) else None
    source = None if isinstance(head.base, Tensor) else head.base
    factors = tuple(low.scale for low in head.low_rank)
    thin = [tensor for low in head.low_rank for tensor in (low.a, low.b)]
    return HeadForm(head.scale, head.softcap, source, factors), (matrix, head.bias, *thin)


def put_together(form: HeadForm, tensors: Sequence[Tensor | None]) -> LMHead:
    """Return the head of a form with these tensors, in the order of ``take_apart``."""
    matrix, bias, *thin = tensors
    base = form.source if matrix is None else matrix
    assert base is not None
    low_rank = [
        LowRank(a, b, factor)
        for a, b, factor in zip(thin[::2], thin[1::2], form.factors, strict=True)
        if a is not None and b is not None
    ]
    return LMHead.from_rows(base, low_rank, bias, form.scale, form.softcap)


class AdapterGradient:
    """The gradients of one adapter, and through it of the states, summed over tiles of logits.

    With ``D`` the gradient of the products ``H W^T``, those of ``s (H a^T) b^T`` are
    ``s D b a`` for H, ``s (D b)^T H`` for a and ``s D^T (H a^T)`` for b. ``D b`` is as thin as the
    adapter, so it is kept for all tokens.

    Args:
        low: The adapter, over the whole vocabulary.
        states: ``(n, d)`` of any dtype.
        step: States that may be in memory in the accumulation dtype at a time.
        dtype: The accumulation dtype.
        wanted: Whether a gradient of a, and one of b, is wanted.
    """

    def __init__(
        self, low: LowRank, states: Tensor, step: int, dtype: torch.dtype, wanted: Sequence[bool]
    ) -> None:
        self._low, self._states, self._step, self._wanted = low, states, step, wanted
        parts = [low.reduced(part.to(dtype)) for part in states.split(step)]
        self._reduced = torch.cat(parts)
        self._through = torch.zeros_like(self._reduced)
        self._of_b = torch.zeros_like(low.b, dtype=dtype) if wanted[1] else None

    def add(self, dz: Tensor, tokens: slice, entries: slice) -> None:
        """Add a tile of D, (n, entries) in the accumulation dtype."""
        self._through[tokens].addmm_(dz, self._low.b[entries].to(dz.dtype))
        if self._of_b is not None:
            self._of_b[entries].addmm_(dz.T, self._reduced[tokens])

    def of_factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of a and b that are wanted."""
        of_b = None if self._of_b is None else self._of_b.to(self._low.b.dtype)
        if not self._wanted[0]:
            return None, of_b
        of_a = torch.zeros_like(self._low.a, dtype=self._through.dtype)
        for thin, part in zip(
            self._through.split(self._step), self._states.split(self._step), strict=True
        ):
            of_a.addmm_(thin.T, part.to(of_a.dtype), alpha=self._low.scale)
        return of_a.to(self._low.a.dtype), of_b

    def add_to_states(self, of_states: Tensor) -> None:
        """Add the part of the states' gradient, (n, d), that goes through the adapter."""
        of_states.addmm_(self._through, self._low.a.to(of_states.dtype), alpha=self._low.scale)
