"""Sizes of the fused kernel: the default ones, and those that a search on a GPU tries.

What the candidates take of registers and shared memory is counted by
``onlinesel bench compiled``, and listed in docs/kernels.md; ``onlinesel bench blocks`` times them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Blocks", "candidate_blocks", "default_blocks", "shared_memory"]


class Blocks(NamedTuple):
    """Sizes of the fused kernel.

    Attributes:
        tokens: Tokens of a program.
        entries: Vocabulary entries of a tile.
        depth: Hidden units of one step of the product.
        warps: Warps of a program.
        stages: Steps of the product whose loads are in flight.
        tiles: Tiles of a split.
        together: Blocks of tokens that share one read of the weight: their hidden states should
            fit the cache of the device beside it.
        described: Load through tensor descriptors, which Hopper's copy engine (TMA) serves: 0.77
            of the bare product where plain loads reach 0.58 (128x128x64, d = 896, docs/gpu.md).
            Off by default, because a row of the weight must begin at a multiple of 16 bytes.
    """

    tokens: int
    entries: int
    depth: int
    warps: int
    stages: int
    tiles: int = 32
    together: int = 16
    described: bool = False

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Return the shared memory that the loads in flight take, in bytes."""
        return self.stages * self.depth * (self.tokens + self.entries) * dtype.itemsize

    def __str__(self) -> str:
        """Return the sizes in short: ``t`` stands for tiles, ``g`` for a group, together."""
        sizes = f"{self.tokens}x{self.entries}x{self.depth} w{self.warps} s{self.stages}"
        loads = " tma" if self.described else ""
        return f"{sizes} t{self.tiles} g{self.together}{loads}"


_FLOAT32 = Blocks(32, 64, 32, 4, 3, tiles=128, together=64)
_NARROW = Blocks(128, 128, 32, 8, 3, tiles=64)
_WIDE = Blocks(128, 256, 64, 8, 3)

# For the 227 KiB and the wgmma of Hopper. 8,192 tokens by 151,936 entries, cut in splits of 18
# tiles of 256 entries or 36 of 128, are 2,112 programs of 128 tokens: 132 multiprocessors take 16
# each, where 32 tiles leave some of them idle in the last round.
# Two programs fit a multiprocessor: one multiplies while the other takes its exponentials, which at
# d = 896 are a seventh of the product. The fastest of a first search on an H200 (0.77 of the bare
# product at d = 896, the default 0.62); most of the others are its neighbours.
_PAIR = Blocks(128, 128, 64, 4, 3, tiles=36, described=True)
_WIDE_CANDIDATES = (
    _WIDE,  # the default: what the others must beat
    _WIDE._replace(described=True, tiles=18),  # the copy engine, and no idle round
    _PAIR,
    _PAIR._replace(together=64),  # all of H (15 MB at d = 896) in L2, W read once
    _PAIR._replace(together=8),
    _PAIR._replace(tiles=72),  # half as many states to merge
    _PAIR._replace(stages=2),
    _PAIR._replace(depth=32, stages=6),  # the same bytes in flight, in smaller steps
    _PAIR._replace(described=False),
    Blocks(128, 64, 64, 4, 4, tiles=72, described=True),  # three programs on a multiprocessor
    # Each tile of W serves twice the tokens.
    Blocks(256, 128, 64, 8, 4, tiles=36, together=8, described=True),
)

# For mma.sync and 99 KiB, which sm_80, sm_86 and sm_89 all have. No descriptors: they would be
# taken apart into plain loads, and spill.
_NARROW_CANDIDATES = (
    _NARROW,  # the default
    _NARROW._replace(tiles=36, stages=4),  # a load more in flight, and more, smaller splits
    _NARROW._replace(tiles=36, stages=4, together=64),  # W read once where H fits L2
    Blocks(128, 128, 64, 8, 3, tiles=36),  # half as many waits in a product
    Blocks(64, 256, 32, 8, 4, tiles=18, together=32),  # fewer tokens, more entries
    Blocks(64, 128, 64, 4, 4, tiles=36, together=32),  # two programs on a multiprocessor of sm_80
)


def _wide(shared: int) -> bool:
    """Tell Hopper and what came after it in data centres from the rest, by its shared memory."""
    return shared >= 200 * 1024


def default_blocks(dtype: torch.dtype, shared: int) -> Blocks:
    """Return sizes that compile without harmful spills and fit; they are not tuned, see the tests.

    Args:
        dtype: Of hidden states and weight.
        shared: Bytes of shared memory that a program may use.
    """
    if dtype == torch.float32:  # multiplied without tensor cores, which would round to TF32
        return _FLOAT32
    # Only the product of Hopper keeps the wide tile in registers.
    return _WIDE if _wide(shared) else _NARROW


def candidate_blocks(dtype: torch.dtype, shared: int) -> tuple[Blocks, ...]:
    """Return the sizes that a search tries, the default ones first; for float32 these alone.

    Args:
        dtype: Of hidden states and weight.
        shared: Bytes of shared memory that a program may use.

    Example:
        >>> import torch
        >>> len(candidate_blocks(torch.bfloat16, 227 * 1024))
        11
    """
    if dtype == torch.float32:
        return (_FLOAT32,)
    chosen = _WIDE_CANDIDATES if _wide(shared) else _NARROW_CANDIDATES
    return tuple(blocks for blocks in chosen if blocks.shared_bytes(dtype) <= shared)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may use; the interpreter has no limit."""
    if device.type != "cuda":
        return 2**20
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
