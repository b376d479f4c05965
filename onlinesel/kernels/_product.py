"""Products that keep float32 results, and the precision that the kernels run under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from onlinesel.kernels._rows import RowSource

__all__ = ["exact_products", "full_precision", "keeps_float32", "wide_mm"]


def keeps_float32(one: Tensor, two: Tensor | RowSource) -> bool:
    """Return whether the device multiplies these two as they are into float32.

    CUDA does, for two matrices of one 16-bit type, where torch has ``mm(out_dtype=...)``. Other
    products need a float32 copy of their factors. Of the second, the dtype counts.
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


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run without autograd, without autocast, and without TF32.

    Autocast would turn the float32 products of a scorer into bfloat16 ones, silently; TF32, which
    a program may allow for its training, rounds their factors to 10 bits.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and not torch.compiler.is_compiling():
            with exact_products():
                yield
        else:
            yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 on CUDA, whatever the program allows."""
    matmul = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else (
        "allow_tf32", False
    )  # fmt: skip
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)
