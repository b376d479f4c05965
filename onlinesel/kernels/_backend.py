"""Which code summarises the logits: torch operations, the tile backend or the fused kernel.

An explicit request is obeyed or refused. ``"auto"`` looks into :data:`MEASURED`, which holds what
has been timed and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onlinesel.kernels._measured import MEASURED, Measured, measured_row
from onlinesel.kernels._product import full_precision
from onlinesel.kernels._state import LogitState
from onlinesel.kernels._stream import stream_state
from onlinesel.kernels.head import LMHead

__all__ = [
    "BACKENDS", "MEASURED", "Measured", "backend_for", "choose_backend", "interpreting",
    "logit_state",
]  # fmt: skip

BACKENDS = ("auto", "torch", "tile", "triton")

# Looked for once: torch.compile cannot trace the search (torch 2.11 refuses the graph).
_TRITON = importlib.util.find_spec("triton") is not None
# The fused kernel was compiled and run with 3.6; 3.4 does not compile it.
_OLDEST = (3, 6)


def _triton_version() -> tuple[int, ...]:
    """Return the version of Triton, that of the oldest that serves where nobody can tell."""
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return _OLDEST  # of another name, as some builds have


_VERSION = _triton_version()


def choose_backend(
    owner: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    measured: Sequence[Measured] | None = None,
    *,
    tiled: bool = False,
) -> str:
    """Return the backend that runs: ``"torch"``, ``"tile"`` or ``"triton"``.

    Args:
        owner: Who asks, for errors.
        backend: What the caller asked for.
        device: Where the hidden states are.
        dtype: Dtype of hidden states and weight together; float64 is for ``"torch"`` alone.
        width: Hidden size.
        measured: Table to look into, or None for :data:`MEASURED`.
        tiled: The weight is made tile by tile, so there is none for the fused kernel to read.

    Raises:
        ValueError: The backend is unknown, or cannot run on this device or dtype.
        ImportError: The backend needs triton, which is not installed or too old.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"{owner}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}. "
            'Pass "auto" to let the device decide.'
        )
    if backend == "triton" and tiled:
        raise ValueError(
            f'{owner}: backend must be "auto", "tile" or "torch" for a head that is quantised or '
            "has adapters, got 'triton'. The fused kernel reads a weight in memory: merge the "
            "adapters or dequantise the head for it."
        )
    if backend == "torch":
        return "torch"
    if backend == "auto":
        if device.type != "cuda" or dtype == torch.float64 or not _TRITON:
            return "torch"
        if tiled or _VERSION < _OLDEST:
            return "tile"
        return _fastest(measured_row(device, dtype, width, measured))
    if dtype == torch.float64:
        raise ValueError(
            f'{owner}: backend must be "torch" for float64 inputs, got {backend!r}. '
            "The Triton kernels sum in float32."
        )
    _check_triton(owner, backend)
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f'{owner}: backend must be "torch" or "auto" on {device.type}, got {backend!r}. '
            "Triton kernels need a CUDA device."
        )
    return backend


def _check_triton(owner: str, backend: str) -> None:
    """Refuse a backend whose triton is missing or too old."""
    if not _TRITON:
        raise ImportError(
            f'{owner}: backend {backend!r} needs triton: pip install "onlinesel[triton]".'
        )
    if backend == "triton" and _VERSION < _OLDEST:
        raise ImportError(
            f"{owner}: backend 'triton' needs triton 3.6 or newer, got {_VERSION}. Take torch "
            '2.11 or newer, which brings it, or pass backend="tile".'
        )


def backend_for(
    owner: str, backend: str, states: Tensor, head: LMHead, dtype: torch.dtype | None = None
) -> str:
    """Return the backend that runs for these states and this head, see :func:`choose_backend`.

    Args:
        owner: Who asks, for errors.
        backend: What the caller asked for.
        states: ``(n, d)``.
        head: The head.
        dtype: Of the factors, or None for what holds both.
    """
    dtype = dtype or torch.promote_types(states.dtype, head.weight.dtype)
    tiled = head.made is not None
    return choose_backend(owner, backend, states.device, dtype, head.hidden_size, tiled=tiled)


def _fastest(row: Measured | None) -> str:
    return "tile" if row is None else row.backend


def interpreting() -> bool:
    """Return whether Triton runs its kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def logit_state(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
    backend: str,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> LogitState:
    """Summarise the logits of (n, d) states with the backend that was chosen.

    See ``stream_state`` for the arguments. The head may be a part of the vocabulary: then merge
    the parts' states with ``merge_states`` or ``merge_parts`` before ``state_scores``.
    """
    if backend == "torch":
        return stream_state(
            states, head, targets, inverse, squares, spread, vocab_chunk, token_chunk
        )
    head._check_whole()
    if head.made is not None:
        # No operation can take a source of rows, so torch.compile breaks its graph here.
        run = torch.compiler.disable(_made_state) if torch.compiler.is_compiling() else _made_state
        return run(states, head, targets, inverse, squares, spread, vocab_chunk, token_chunk)
    y, m, s, q, u = torch.ops.onlinesel.logit_state(
        states, head.weight, head.bias, targets, inverse, head.scale, head.softcap, squares,
        spread, backend, vocab_chunk, token_chunk,
    ).unbind(0)  # fmt: skip
    return LogitState(y, m, s, q if squares else None, u if spread else None)


def _made_state(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
    vocab_chunk: int | None,
    token_chunk: int | None,
) -> LogitState:
    """Summarise by the tile backend the logits of a head whose rows are made on demand."""
    tile = importlib.import_module("onlinesel.kernels._tile")
    # The kernel reads these by place.
    bias, inverse = (None if x is None else x.contiguous() for x in (head.bias, inverse))
    given = (states, replace(head, bias=bias), targets.contiguous(), inverse, squares, spread)
    with full_precision(states.device):
        return tile.tile_state(*given, vocab_chunk, token_chunk)


# One opaque operation: torch.compile keeps it as a node, knows the shape of what it gives, and
# never looks into the launcher. The five rows are the fields of LogitState; rows that were not
# asked for are zero.
@torch.library.custom_op(
    "onlinesel::logit_state",
    mutates_args=(),
    schema="(Tensor states, Tensor weight, Tensor? bias, Tensor targets, Tensor? inverse, "
    "float scale, float? softcap, bool squares, bool spread, str backend, int? vocab_chunk, "
    "int? token_chunk) -> Tensor",
)
def _logit_state_op(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse: Tensor | None,
    scale: float,
    softcap: float | None,
    squares: bool,
    spread: bool,
    backend: str,
    vocab_chunk: int | None,
    token_chunk: int | None,
) -> Tensor:
    # The kernels read these by place.
    bias, inverse = (None if x is None else x.contiguous() for x in (bias, inverse))
    head = LMHead(weight, bias, scale, softcap)
    given = (states, head, targets.contiguous(), inverse, squares, spread)
    with full_precision(states.device):
        if backend == "tile":
            tile = importlib.import_module("onlinesel.kernels._tile")
            state = tile.tile_state(*given, vocab_chunk, token_chunk)
        else:
            fused = importlib.import_module("onlinesel.kernels._fused")
            state = fused.fused_state(*given)
    zeros = torch.zeros_like(state.m)
    return torch.stack([zeros if field is None else field for field in state])


@_logit_state_op.register_fake
def _(states: Tensor, *_: object) -> Tensor:
    return states.new_empty((5, states.shape[0]), dtype=torch.float32)
