"""What has been timed on GPUs: the fastest backend and the fastest sizes of the fused kernel."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch

from onlinesel.kernels._blocks import Blocks

__all__ = ["INTERPRETER", "MEASURED", "Measured", "capability_of", "entry_text", "measured_row"]

INTERPRETER = (0, 0)  # no device has this capability


class Measured(NamedTuple):
    """One measurement: the fastest backend of a kind of head on a kind of device.

    Attributes:
        capability: Compute capability of the device, such as (9, 0).
        dtype: Dtype of hidden states and weight.
        width: Largest hidden size it stands for; the narrowest fitting row of the table counts.
        backend: The fastest, ``"tile"`` or ``"triton"``.
        blocks: The fastest sizes of the fused kernel, whichever backend is the fastest; None
            leaves it those of ``default_blocks``.
    """

    capability: tuple[int, int]
    dtype: torch.dtype
    width: int
    backend: str
    blocks: Blocks | None = None


# Each row is the `entry` of a committed recipes/results/gpu_blocks_*.json, which a test holds.
MEASURED: tuple[Measured, ...] = (
    # bench gpu
    # NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-28T09:06:48Z
    # of the bare product: tile 0.16, 128x128x64 w4 s3 t36 g16 tma 0.77
    Measured(
        (9, 0),
        torch.bfloat16,
        896,
        "triton",
        Blocks(128, 128, 64, 4, 3, tiles=36, together=16, described=True),
    ),
)


def measured_row(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    measured: Sequence[Measured] | None = None,
) -> Measured | None:
    """Return the row that stands for this device and head, None if there is none.

    Args:
        device: Where they are.
        dtype: Of hidden states and weight.
        width: Hidden size.
        measured: Table to look into, or None for :data:`MEASURED`.
    """
    capability = capability_of(device)
    rows = [
        row
        for row in (MEASURED if measured is None else measured)
        if (row.capability, row.dtype) == (capability, dtype) and width <= row.width
    ]
    return min(rows, key=lambda row: row.width, default=None)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, :data:`INTERPRETER` for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETER


def entry_text(row: Measured, source: str) -> str:
    """Return a row as the lines to paste into :data:`MEASURED`.

    Args:
        row: The row.
        source: Command, device, versions and date that gave it, for the comment above it.

    Example:
        >>> import torch
        >>> print(entry_text(Measured((9, 0), torch.bfloat16, 896, "tile"), "a command, a day"))
            # a command, a day
            Measured((9, 0), torch.bfloat16, 896, "tile"),
    """
    capability, dtype, width, backend, blocks = row
    words = [str(capability), str(dtype), str(width), f'"{backend}"']
    wrapped = (part for line in source.splitlines() for part in textwrap.wrap(line, 94))
    comment = "".join(f"    # {part}\n" for part in wrapped)
    if blocks is None:
        return f"{comment}    Measured({', '.join(words)}),"
    sizes = ", ".join(map(str, blocks[:5]))
    words.append(
        f"Blocks({sizes}, tiles={blocks.tiles}, together={blocks.together}, "
        f"described={blocks.described})"
    )
    lines = "".join(f"        {word},\n" for word in words)
    return f"{comment}    Measured(\n{lines}    ),"
