"""The gradient of a tile of logits in one pass, by a Triton kernel.

The torch operations of ``policy`` go over a tile nine times, and on a fast GPU their launches take
longer than they do. Like ``_tile``, this imports triton, and is imported when it is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlinesel.kernels._tile import LARGE, shaped
from onlinesel.kernels.head import LMHead

__all__ = ["gradient_kernel", "tile_gradient"]

_COLUMNS = 2048  # of a program


@triton.jit
def gradient_kernel(
    tile, out, bias, targets, inverse, log_norm, entropy, at_label, of_logprob, of_entropy,
    width, scale, cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, TEMPERED: tl.constexpr, SPREAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn a (rows, width) tile of products into the gradient that reaches them."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    place = row.to(tl.int64) * width + columns
    z = tl.load(tile + place, mask=inside, other=0.0)
    offset = 0.0
    if BIAS:
        offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z = shaped(z, offset, 1.0, scale, cap, CAP)
    slope = scale
    if CAP:
        slope = scale * (1.0 - (z / cap) * (z / cap))
    if TEMPERED:
        factor = tl.load(inverse + row)
        z = z * factor
        slope = slope * factor
    log_p = z - tl.load(log_norm + row)
    log_p = tl.where(log_p < -LARGE, -LARGE, log_p)  # a maximum might leave a nan out
    push = tl.load(of_logprob + row)
    if SPREAD:
        push += (log_p + tl.load(entropy + row)) * tl.load(of_entropy + row)
    label = columns == tl.load(targets + row)
    dz = tl.where(label, tl.load(at_label + row), -tl.exp(log_p) * push)
    tl.store(out + place, (dz * slope).to(out.dtype.element_ty), mask=inside)


def tile_gradient(
    tile: Tensor,
    part: LMHead,
    start: int,
    rows: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the products ``H W^T`` of one tile.

    Args:
        tile: ``(n, entries)`` float32 products, adapters included; overwritten.
        part: The head of these vocabulary entries: its bias, scale and soft cap count.
        start: The first of them.
        rows: Targets, one over the temperature or None, logarithm of the normaliser, entropy, the
            gradient at the label, upstream gradients of the log-probability and of the entropy or
            None, each ``(n,)``.
        dtype: Of the result: float32, which takes the place of the tile, or bfloat16.
    """
    count, width = tile.shape
    out = tile if dtype == tile.dtype else tile.new_empty(tile.shape, dtype=dtype)
    targets, *numbers = rows
    inverse, log_norm, entropy, at_label, of_logprob, of_entropy = (
        None if row is None else row.contiguous() for row in numbers
    )
    columns = max(16, min(_COLUMNS, triton.next_power_of_2(width)))
    gradient_kernel[(count, triton.cdiv(width, columns))](
        tile, out, part.bias, targets - start, inverse, log_norm, entropy, at_label, of_logprob,
        of_entropy, width, part.scale, part.softcap or 0.0, BIAS=part.bias is not None,
        CAP=part.softcap is not None, TEMPERED=inverse is not None,
        SPREAD=of_entropy is not None, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out
