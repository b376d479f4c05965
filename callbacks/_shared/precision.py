"""Says that a CPU is slow in a precision that it has no instructions for."""

from __future__ import annotations

import warnings
from typing import Any

import torch

__all__ = ["warn_slow_bfloat16"]


def _computes_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16, True where nobody can tell."""
    known = getattr(torch.cpu, "get_capabilities", None)
    if known is not None:
        return any("bf16" in name and bool(there) for name, there in known().items())
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return True if ask is None else bool(ask())


def warn_slow_bfloat16(owner: str, args: Any) -> None:
    """Warn of TRL's default precision on a CPU that only imitates it.

    Args:
        owner: Name used in the warning.
        args: The trainer's arguments.
    """
    if args.bf16 and args.device.type == "cpu" and not _computes_bfloat16():
        warnings.warn(
            f"{owner}: bf16 must be False for full speed on this CPU, got True. It has no "
            "instructions for bfloat16, and a step takes about ten times as long. Set bf16=False "
            f"in {type(args).__name__}, where TRL's default is True.",
            stacklevel=4,
        )
