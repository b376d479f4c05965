"""The tile backend: the vendor's product into a tile that stays in cache, then one Triton kernel.

A tile of logits is written by the matrix product in float32 and read once, row by row, by
``tile_kernel``, which adds its summary to the running one. Only this module and ``_fused`` import
triton; both are imported when a backend asks for them, not before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlinesel.kernels._product import keeps_float32, wide_mm
from onlinesel.kernels._state import LogitState, empty_state
from onlinesel.kernels._stream import tile_shape
from onlinesel.kernels.head import LMHead

__all__ = ["LARGE", "shaped", "tile_kernel", "tile_state"]

LARGE = tl.constexpr(1.0e4)  # FAR of _state: exp(-1e4) is 0, and 0 times it is 0
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_MOST_COLUMNS = 8192  # of a tile: one program holds a row of it in registers


@triton.jit
def shaped(z, bias, inverse, scale, cap, CAP: tl.constexpr):
    """Turn products into logits: bias, scale, soft cap, temperature, in this order."""
    z = (z + bias) * scale
    if CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): its absolute error, 1e-7 of the cap, is what counts
        # for a logit; an exp that overflows gives the right limit.
        z = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / cap)))
    return z * inverse


@triton.jit(do_not_specialize=["start"])
def tile_kernel(
    tile, bias, targets, inverse, y_all, m_all, s_all, q_all, u_all, width, start, scale, cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, TEMPERED: tl.constexpr, SQUARES: tl.constexpr,
    SPREAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add one row of a (rows, width) tile of products to the running summary of its token."""
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    z = tl.load(tile + row.to(tl.int64) * width + columns, mask=inside, other=0.0)
    offset = 0.0
    if BIAS:
        offset = tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if TEMPERED:
        factor = tl.load(inverse + row)
    z = shaped(z, offset, factor, scale, cap, CAP)
    label = (columns == tl.load(targets + row) - start) & inside
    y = tl.sum(tl.where(label, z, 0.0), 0)
    z = tl.where(inside & (columns != tl.load(targets + row) - start), z, float("-inf"))
    before = tl.load(m_all + row)
    m = tl.maximum(before, tl.maximum(tl.max(z, 0), _LOWEST))
    gap = tl.minimum(m - before, LARGE)
    shrunk = tl.exp(-gap)
    e = tl.exp(z - m)
    old = tl.load(s_all + row)
    s = shrunk * old + tl.sum(e, 0)
    if SQUARES:
        tl.store(q_all + row, shrunk * shrunk * tl.load(q_all + row) + tl.sum(e * e, 0))
    if SPREAD:
        spread = tl.sum(e * tl.minimum(m - z, LARGE), 0)
        tl.store(u_all + row, shrunk * (tl.load(u_all + row) + gap * old) + spread)
    tl.store(y_all + row, tl.load(y_all + row) + y)
    # A maximum of the device may leave a nan out; the sum does not.
    tl.store(m_all + row, tl.where((s != s) & (m < float("inf")), s, m))
    tl.store(s_all + row, s)


def tile_state(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> LogitState:
    """Summarise the logits of (n, d) states; see ``stream_state`` for the arguments."""
    count, vocab = states.shape[0], head.vocab_size
    width, step = tile_shape(states.device, vocab, vocab_chunk, token_chunk)
    width, step = min(width, vocab, _MOST_COLUMNS), max(min(step, count), 1)
    total = empty_state(states, torch.float32, squares, spread)
    # The kernel writes into these, and fields of an empty state may share one tensor.
    total = LogitState(*(None if field is None else field.clone() for field in total))  # type: ignore[arg-type]
    # In steps, because a float32 copy of all states may be larger than everything else here.
    reduced = [
        torch.cat([low.reduced(part.float()) for part in states.split(step)])
        for low in head.low_rank
    ]
    if not keeps_float32(states, head.base):
        states = states.float()
    buffer = states.new_empty(step * width, dtype=torch.float32)
    for start in range(0, vocab, width):
        part = head.part(start, start + width)
        weight = part.base_rows()
        if not keeps_float32(states, weight):
            weight = weight.float()
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            size = rows.stop - first, weight.shape[0]
            tile = wide_mm(states[rows], weight.T, out=buffer[: size[0] * size[1]].view(size))
            for states_a, low in zip(reduced, part.low_rank, strict=True):
                tile.addmm_(states_a[rows], low.b.float().T)
            factor = None if inverse is None else inverse[rows]
            _add_tile(tile, head, targets[rows], factor, total, rows, start)
        del part, weight  # before the next rows are made beside them
    return total


def _add_tile(
    tile: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    total: LogitState,
    rows: slice,
    start: int,
) -> None:
    y, m, s, q, u = (None if field is None else field[rows] for field in total)
    columns = max(triton.next_power_of_2(tile.shape[1]), 16)
    tile_kernel[(tile.shape[0],)](
        tile, head.bias, targets, inverse, y, m, s, q, u, tile.shape[1], start, head.scale,
        head.softcap or 0.0, BIAS=head.bias is not None, CAP=head.softcap is not None,
        TEMPERED=inverse is not None, SQUARES=q is not None, SPREAD=u is not None,
        COLUMNS=columns, num_warps=8 if columns >= 2048 else 4,
    )  # fmt: skip
