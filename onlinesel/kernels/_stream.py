"""The torch backend: logits by tiles, summarised by torch operations. The oracle of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from onlinesel.kernels._state import FAR, LogitState, empty_state, merge_states
from onlinesel.kernels.head import LMHead

__all__ = ["stream_state", "tile_shape"]


def tile_shape(
    device: torch.device,
    vocab: int,
    vocab_chunk: int | None,
    token_chunk: int | None,
    depth: int = 1,
    count: int | None = None,
) -> tuple[int, int]:
    """Return vocabulary entries and tokens of a tile, where they are not given.

    On a CPU a tile of 4 MiB stays in cache. On a GPU it is 64 MiB. With 32 a backward pass of
    8,192 tokens took 59 ms on an H200, 9 of them products (docs/gpu.md): the host launched too
    many small operations. The torch backend, which keeps two tiles, stays at 32.

    Args:
        device: Of the product.
        vocab: ``V``.
        vocab_chunk: Vocabulary entries, if given.
        token_chunk: Tokens, if given.
        depth: ``d`` where both factors are cast for the tile: on a GPU, whose tiles are large, a
            copy then takes 16 MiB at most.
        count: Tokens there are, if known: on a GPU a tile of few is wider.
    """
    width = vocab_chunk or (vocab if vocab <= 8192 else 4096)
    if device.type == "cpu":
        return width, token_chunk or max(64, 2**20 // width)
    rows = max(64, 2**22 // depth)
    if count is not None:
        width = max(width, min(2**24 // max(count, 1024), vocab))
    width = vocab_chunk or min(width, rows)
    size = 2**24 if depth == 1 else 2**23
    return width, token_chunk or max(64, min(size // width, rows))


def stream_state(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> LogitState:
    """Summarise the logits of (n, d) states, tile by tile.

    Args:
        states: ``(n, d)``.
        head: The head, of the whole vocabulary or of a part.
        targets: ``(n,)`` int64 rows of this head's weight; others mean a label elsewhere.
        inverse: ``(n,)`` factor on the logits of each token, or None.
        squares: Whether q is wanted.
        spread: Whether u is wanted.
        vocab_chunk: Vocabulary entries of a tile, or None to choose.
        token_chunk: Tokens of a tile, or None to choose.
    """
    dtype = head.accumulation_dtype(states)
    vocab, count = head.vocab_size, states.shape[0]
    width, step = tile_shape(states.device, vocab, vocab_chunk, token_chunk, head.hidden_size)
    total = [
        empty_state(states[i : i + step], dtype, squares, spread) for i in range(0, count, step)
    ]
    for start in range(0, vocab, width):
        # The weight is cast once for all tokens: the loop over tokens is the inner one.
        part = head.part(start, start + width, dtype)
        for index, merged in enumerate(total):
            rows = slice(index * step, (index + 1) * step)
            factor = None if inverse is None else inverse[rows]
            found = _tile_state(part, states[rows], targets[rows] - start, factor, squares, spread)
            total[index] = merge_states(merged, found)
        del part  # before the next rows are cast beside them
    if not total:
        return empty_state(states, dtype, squares, spread)
    return LogitState(
        torch.cat([part.y for part in total]),
        torch.cat([part.m for part in total]),
        torch.cat([part.s for part in total]),
        torch.cat([part.q for part in total if part.q is not None]) if squares else None,
        torch.cat([part.u for part in total if part.u is not None]) if spread else None,
    )


def _tile_state(
    part: LMHead,
    states: Tensor,
    targets: Tensor,
    inverse: Tensor | None,
    squares: bool,
    spread: bool,
) -> LogitState:
    """Summarise one tile; y is 0 for the tokens whose label is not in this vocabulary part."""
    z = part.logits(states)
    if inverse is not None:
        z.mul_(inverse.unsqueeze(1))
    inside = (targets >= 0) & (targets < part.vocab_size)
    column = targets.clamp(0, part.vocab_size - 1).unsqueeze(1)
    found = z.gather(1, column).squeeze(1)
    # The label leaves the tile; a token without its label here writes back what it read.
    z.scatter_(1, column, torch.where(inside, -torch.inf, found).unsqueeze(1))
    m = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    z.sub_(m.unsqueeze(1))
    q = u = None
    if spread:
        z.clamp_(min=-FAR)
        e = z.exp()
    else:
        e = z.exp_()
    s = e.sum(1)
    if squares:
        q = torch.linalg.vector_norm(e, dim=1).square()
    if spread:
        u = -z.mul_(e).sum(1)
    return LogitState(torch.where(inside, found, 0.0), m, s, q, u)
