"""Products of 16-bit matrices that keep float32 results."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keeps_float32", "wide_mm"]


def keeps_float32(one: Tensor, two: Tensor) -> bool:
    """Return whether the device multiplies these two as they are into float32.

    CUDA does, for two matrices of one 16-bit type, where torch has ``mm(out_dtype=...)``. Other
    products need a float32 copy of their factors.
    """
    narrow = one.dtype == two.dtype and one.dtype in (torch.bfloat16, torch.float16)
    return narrow and one.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def wide_mm(one: Tensor, two: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices with float32 sums and a float32 result.

    Args:
        one: ``(n, k)``.
        two: ``(k, m)``.
        out: ``(n, m)`` float32 to write into, or None.

    Returns:
        ``(n, m)`` float32. Exact up to float32 sums: a product of two 16-bit floats is a float32.

    Example:
        >>> import torch
        >>> wide_mm(torch.full((1, 3), 1.0078125).bfloat16(), torch.ones(3, 1).bfloat16())
        tensor([[3.0234]])
    """
    if keeps_float32(one, two):
        if out is None:
            return torch.mm(one, two, out_dtype=torch.float32)
        return torch.mm(one, two, out_dtype=torch.float32, out=out)
    return torch.mm(one.float(), two.float(), out=out)
