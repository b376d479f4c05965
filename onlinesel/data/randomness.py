"""The generators of a program: where they stand, and how to leave them there."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["PROGRAM", "program_state", "seed_of_rank", "set_program_state", "undisturbed"]

PROGRAM = 3
"""Generators of a program: those of torch, of Python and of numpy."""

_SIZE = 5056
"""Bytes of the state of torch's CPU generator, and of every row here."""
_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<?624II?d")


def seed_of_rank(seed: int, rank: int | None) -> int:
    """Return a rank's own seed: ranks that decide alone must not draw the same for other rows.

    Args:
        seed: What the user gave.
        rank: The rank; None where all decide alike.
    """
    return seed + 1_000_003 * (rank or 0)


def _row(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content.ljust(_SIZE, b"\0")), dtype=torch.uint8)


def _numpy() -> Any:
    """Return numpy's module of the global generator where the program has loaded it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def program_state() -> Tensor:
    """Return where the program's own generators stand.

    Returns:
        ``(3, 5056)`` uint8: of torch (on the CPU), of Python's ``random``, and of numpy.

    Example:
        >>> import torch
        >>> from onlinesel.data.randomness import program_state, set_program_state
        >>> before = program_state()
        >>> drawn = torch.rand(1)
        >>> set_program_state(before)
        >>> bool(torch.rand(1) == drawn)
        True
    """
    _, words, spare = random.getstate()
    rows = [torch.get_rng_state(), _row(_PYTHON.pack(*words, spare is not None, spare or 0.0))]
    numpy = _numpy()
    if numpy is None:
        rows.append(_row(b""))
    else:
        _, keys, place, has_spare, second = numpy.get_state()
        rows.append(_row(_NUMPY.pack(True, *keys.tolist(), place, bool(has_spare), second)))
    return torch.stack(rows)


def set_program_state(state: Tensor) -> None:
    """Put the generators where :func:`program_state` was taken."""
    torch.set_rng_state(state[0])
    *words, has_spare, spare = _PYTHON.unpack_from(state[1].numpy().tobytes())
    random.setstate((3, tuple(words), spare if has_spare else None))
    known, *keys, place, has_spare, spare = _NUMPY.unpack_from(state[2].numpy().tobytes())
    numpy = _numpy()
    if known and numpy is not None:
        numpy.set_state(("MT19937", keys, place, int(has_spare), spare))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the program's generators as they were, whatever is drawn inside."""
    before = program_state()
    try:
        yield
    finally:
        set_program_state(before)
