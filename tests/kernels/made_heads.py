"""Heads whose rows are made on demand, beside the same heads with their weight in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from onlinesel.kernels import LMHead, LowRank


class Int8Rows:
    """A row-wise quantised matrix that remembers the longest range it was asked for."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales, self.longest = codes, scales, 0
        self.shape, self.dtype, self.device = codes.shape, scales.dtype, codes.device

    def rows(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.codes)
        self.longest = max(self.longest, stop - start)
        return self.codes[start:stop] * self.scales[start:stop, None]


def int8_rows(v: int, d: int, g: torch.Generator, std: float, dtype: torch.dtype) -> Int8Rows:
    codes = torch.randint(-127, 128, (v, d), generator=g, dtype=torch.int8)
    scales = std * (0.5 + torch.rand(v, generator=g)) / (73 * d**0.5)  # codes have std 73
    return Int8Rows(codes, scales.to(dtype))


def made_head(
    kind: str, *, v: int = 61, d: int = 10, std: float = 2.0, bias: bool = False,
    scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float64,
    thin: torch.dtype | None = None, frozen: bool = False,
) -> LMHead:  # fmt: skip
    """Return a head of a kind: "rows" (quantised), "lora" (adapters), or "qlora" (both)."""
    g = torch.Generator().manual_seed(0)
    if kind == "lora":
        base: Tensor | Int8Rows = (std * torch.randn(v, d, generator=g) / d**0.5).to(dtype)
    else:
        base = int8_rows(v, d, g, std, dtype)
    ranks = () if kind == "rows" else (3, 1)
    low_rank = [
        LowRank(
            *(
                torch.randn(size, generator=g).mul_(0.5).to(thin or dtype)
                for size in ((r, d), (v, r))
            ),
            0.5 * r,
        )
        for r in ranks
    ]
    offset = torch.randn(v, generator=g).to(dtype) if bias else None
    return LMHead.from_rows(base, low_rank, offset, scale, softcap, frozen=frozen)


def in_memory(head: LMHead, dtype: torch.dtype | None = None) -> LMHead:
    """Return the same head around its weight, which is written out here: base plus products."""
    source = head.made.base  # type: ignore[union-attr]
    weight = source if isinstance(source, Tensor) else source.rows(0, source.shape[0])
    weight = weight.to(dtype or head.weight.dtype)
    for a, b, factor in head.made.low_rank:  # type: ignore[union-attr]
        weight = weight + factor * b.to(weight.dtype) @ a.to(weight.dtype)
    bias = None if head.bias is None else head.bias.to(dtype or head.bias.dtype)
    return LMHead(weight, bias, head.scale, head.softcap)
