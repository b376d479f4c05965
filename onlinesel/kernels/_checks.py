"""Checks of hidden states and row masks, which several kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from onlinesel.kernels.head import LMHead

__all__ = ["check_hidden", "check_rows"]


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
