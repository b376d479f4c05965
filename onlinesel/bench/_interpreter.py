"""Triton's interpreter, which runs kernels on a CPU to show that they are right."""

from __future__ import annotations

import os
import sys

import torch

from onlinesel.kernels._backend import interpreting

__all__ = ["interpret_without_cuda"]


def interpret_without_cuda(owner: str) -> bool:
    """Make Triton interpret its kernels in this process where there is no CUDA.

    Triton reads the wish when it is imported, and keeps it: so does this process, for good.

    Args:
        owner: Who asks, for errors.

    Returns:
        Whether kernels are interpreted: True, or with CUDA what the environment says.

    Raises:
        RuntimeError: Triton was imported before and does not interpret.

    Example:
        >>> interpret_without_cuda("bench_blocks")  # doctest: +SKIP
        True
    """
    if not torch.cuda.is_available() and not interpreting():
        if "triton" in sys.modules:
            raise RuntimeError(
                f"{owner}: without CUDA the kernels need Triton's interpreter, got a process that "
                "has imported triton without it. Set TRITON_INTERPRET=1 before the process starts."
            )
        os.environ["TRITON_INTERPRET"] = "1"
    return interpreting()
