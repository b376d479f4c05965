"""The fused Triton backend: product and summary in one kernel, no logit ever leaves a register.

Each program takes a block of tokens and a split of the vocabulary and writes one summary; a second
kernel merges the splits in a fixed order. A split is a fixed number of vocabulary entries, so a
token's numbers do not depend on the other tokens of the call, and two runs agree bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlinesel.kernels._blocks import Blocks, default_blocks, shared_memory
from onlinesel.kernels._measured import measured_row
from onlinesel.kernels._state import LogitState, empty_state
from onlinesel.kernels._tile import LARGE, shaped
from onlinesel.kernels.head import LMHead

__all__ = ["MERGED_TOKENS", "fused_kernel", "fused_state", "merge_kernel"]

MERGED_TOKENS = 128  # of a program that merges splits
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _place(program, count, splits, TOKENS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the block of tokens and the split of a program.

    Tokens run fastest inside a group of blocks, so that programs at work read one tile of W.
    """
    blocks = tl.cdiv(count, TOKENS)
    group = program // (TOGETHER * splits)
    size = tl.minimum(blocks - group * TOGETHER, TOGETHER)
    inside = program - group * TOGETHER * splits
    return group * TOGETHER + inside % size, inside // size


@triton.jit
def _product(
    h_at, w_at, real, known, width, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return a (TOKENS, ENTRIES) tile of H W^T; the rows of H and W start at the pointers."""
    depth = tl.arange(0, DEPTH)
    z = tl.zeros([TOKENS, ENTRIES], tl.float32)
    for k in range(0, width, DEPTH):
        h_mask, w_mask = real[:, None], known[None, :]
        if not EVEN:
            h_mask = h_mask & (depth[None, :] < width - k)
            w_mask = w_mask & (depth[:, None] < width - k)
        h = tl.load(h_at + k + depth[None, :], mask=h_mask, other=0.0)
        w = tl.load(w_at + k + depth[:, None], mask=w_mask, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 by its bits
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
    return z


@triton.jit
def _described(matrix, rows, width, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    return tl.make_tensor_descriptor(matrix, [rows, width], [stride, 1], [ROWS, DEPTH])


# Triton 3.6 forgets that the shape of a descriptor is constant, so it is given once more.
@triton.jit
def _described_product(
    h_tiles, w_tiles, row, column, width, UPCAST: tl.constexpr, TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the tile at (row, column) of H W^T; what lies outside H or W is loaded as 0."""
    z = tl.zeros([TOKENS, ENTRIES], tl.float32)
    for k in range(0, width, DEPTH):
        h, w = h_tiles.load([row, k]), w_tiles.load([column, k])
        if UPCAST:  # the interpreter multiplies bfloat16 by its bits
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    return z


@triton.jit
def _store(at, count, real, y, m, s, q, u, SQUARES: tl.constexpr, SPREAD: tl.constexpr):
    """Write the five fields of a summary, each ``count`` behind the one before."""
    tl.store(at, y, mask=real)
    tl.store(at + count, m, mask=real)
    tl.store(at + 2 * count, s, mask=real)
    if SQUARES:
        tl.store(at + 3 * count, q, mask=real)
    if SPREAD:
        tl.store(at + 4 * count, u, mask=real)


# A kernel for one token and one for 16 n tokens more would only be compiled more often.
@triton.jit(do_not_specialize=["count"])
def fused_kernel(
    hidden, weight, bias, targets, inverse, out, count, vocab, width, hidden_stride, weight_stride,
    scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr, TEMPERED: tl.constexpr,
    SQUARES: tl.constexpr, SPREAD: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
    TOGETHER: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write the summary of one block of tokens over one split, to ``out`` (splits, 5, count)."""
    splits = tl.cdiv(vocab, ENTRIES * TILES)
    block, split = _place(tl.program_id(0), count, splits, TOKENS, TOGETHER)
    rows = block * TOKENS + tl.arange(0, TOKENS)
    real = rows < count
    label = tl.load(targets + rows, mask=real, other=-1)
    factor = 1.0
    if TEMPERED:
        factor = tl.load(inverse + rows, mask=real, other=1.0)[:, None]
    h_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    if DESCRIBED:
        h_tiles = _described(hidden, count, width, hidden_stride, TOKENS, DEPTH)
        w_tiles = _described(weight, vocab, width, weight_stride, ENTRIES, DEPTH)
    m = tl.full([TOKENS], _LOWEST, tl.float32)
    y = tl.zeros([TOKENS], tl.float32)
    s, q, u = y, y, y
    first = split * TILES * ENTRIES
    for start in range(first, min(first + TILES * ENTRIES, vocab), ENTRIES):
        columns = start + tl.arange(0, ENTRIES)
        known = columns < vocab
        if DESCRIBED:
            z = _described_product(
                h_tiles, w_tiles, block * TOKENS, start, width, UPCAST, TOKENS, ENTRIES, DEPTH
            )
        else:
            w_at = weight + columns.to(tl.int64)[None, :] * weight_stride
            z = _product(h_at, w_at, real, known, width, UPCAST, EVEN, TOKENS, ENTRIES, DEPTH)
        offset = 0.0
        if BIAS:
            offset = tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        z = shaped(z, offset, factor, scale, cap, CAP)
        hit = (columns[None, :] == label[:, None]) & known[None, :]
        y += tl.sum(tl.where(hit, z, 0.0), 1)
        z = tl.where(hit | (columns[None, :] >= vocab), float("-inf"), z)
        larger = tl.maximum(m, tl.max(z, 1))
        gap = tl.minimum(larger - m, LARGE)
        shrunk = tl.exp(-gap)
        below = larger[:, None] - z
        e = tl.exp(-below)
        if SPREAD:
            u = shrunk * (u + gap * s) + tl.sum(e * tl.minimum(below, LARGE), 1)
        if SQUARES:
            q = shrunk * shrunk * q + tl.sum(e * e, 1)
        s = shrunk * s + tl.sum(e, 1)
        m = larger
    # A maximum of the device may leave a nan out; the sum does not.
    m = tl.where((s != s) & (m < float("inf")), s, m)
    at = out + split.to(tl.int64) * 5 * count + rows
    _store(at, count, real, y, m, s, q, u, SQUARES, SPREAD)


@triton.jit(do_not_specialize=["count", "splits"])
def merge_kernel(
    parts, out, count, splits, SQUARES: tl.constexpr, SPREAD: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Merge ``parts`` (splits, 5, count) into ``out`` (5, count), split after split."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = rows < count
    y = tl.zeros([TOKENS], tl.float32)
    m = tl.full([TOKENS], _LOWEST, tl.float32)
    s, q, u = y, y, y
    at = parts + rows
    for _ in range(0, splits):
        y += tl.load(at, mask=real, other=0.0)
        their_m = tl.load(at + count, mask=real, other=_LOWEST)
        their_s = tl.load(at + 2 * count, mask=real, other=0.0)
        larger = tl.maximum(m, their_m)
        gap, their_gap = tl.minimum(larger - m, LARGE), tl.minimum(larger - their_m, LARGE)
        r, their_r = tl.exp(-gap), tl.exp(-their_gap)
        if SQUARES:
            q = r * r * q + their_r * their_r * tl.load(at + 3 * count, mask=real, other=0.0)
        if SPREAD:
            their_u = tl.load(at + 4 * count, mask=real, other=0.0)
            u = r * (u + gap * s) + their_r * (their_u + their_gap * their_s)
        s = r * s + their_r * their_s
        m = larger
        at += 5 * count
    m = tl.where((s != s) & (m < float("inf")), s, m)
    _store(out + rows, count, real, y, m, s, q, u, True, True)


def _usual_blocks(states: Tensor, weight: Tensor) -> Blocks:
    """Return the sizes that were measured to be the fastest for such factors, or the default."""
    row = measured_row(states.device, states.dtype, states.shape[1])
    if row is not None and row.blocks is not None:
        if not row.blocks.described or (_describable(states) and _describable(weight)):
            return row.blocks
    return default_blocks(states.dtype, shared_memory(states.device))


def _describable(matrix: Tensor) -> bool:
    """Return whether the rows start where a tensor descriptor asks it."""
    return not (matrix.data_ptr() % 16 or matrix.stride(0) * matrix.itemsize % 16)


def _prepare_descriptors(*matrices: Tensor) -> None:
    """Check what a tensor descriptor asks of its matrix, and give triton the memory it takes."""
    for matrix in matrices:
        if not _describable(matrix):
            raise ValueError(
                "fused_state: described blocks need rows that start at multiples of 16 bytes, got "
                f"a stride of {matrix.stride(0)} {matrix.dtype}. Leave described out."
            )

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=matrices[0].device)

    triton.set_allocator(allocate)


def fused_state(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
    blocks: Blocks | None = None,
) -> LogitState:
    """Summarise the logits of (n, d) states; see ``stream_state`` for the arguments."""
    count, width, vocab = states.shape[0], head.hidden_size, head.vocab_size
    if count == 0:
        return empty_state(states, torch.float32, squares, spread)
    weight = head.weight
    if states.dtype != weight.dtype:
        states, weight = states.float(), weight.float()
    states = states if states.stride(1) == 1 else states.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    b = blocks or _usual_blocks(states, weight)
    if b.described:
        _prepare_descriptors(states, weight)
    splits = triton.cdiv(vocab, b.entries * b.tiles)
    out = states.new_empty((splits, 5, count), dtype=torch.float32)
    fused_kernel[(triton.cdiv(count, b.tokens) * splits,)](
        states, weight, head.bias, targets, inverse, out, count, vocab, width, states.stride(0),
        weight.stride(0), head.scale, head.softcap or 0.0, BIAS=head.bias is not None,
        CAP=head.softcap is not None, TEMPERED=inverse is not None, SQUARES=squares, SPREAD=spread,
        UPCAST=states.device.type == "cpu", EVEN=width % b.depth == 0, TOKENS=b.tokens,
        ENTRIES=b.entries, DEPTH=b.depth, TILES=b.tiles, TOGETHER=b.together,
        DESCRIBED=b.described, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    merged = states.new_empty((5, count), dtype=torch.float32)
    merge_kernel[(triton.cdiv(count, MERGED_TOKENS),)](
        out, merged, count, splits, SQUARES=squares, SPREAD=spread, TOKENS=MERGED_TOKENS
    )
    y, m, s, q, u = merged.unbind(0)
    return LogitState(y, m, s, q if squares else None, u if spread else None)
