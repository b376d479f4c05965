"""Scores from a function of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from onlinesel.types import Signals

__all__ = ["Score", "as_signals"]

Score = Callable[[Any, Any], Signals | Tensor]
"""``(model, batch) -> Signals``, or the ``(N,)`` losses of the rows."""


def as_signals(
    found: Signals | Tensor, refuse: Callable[[str, str, object, str], NoReturn]
) -> Signals:
    """Return what a function of one's own gave, losses as signals.

    Args:
        found: What it gave.
        refuse: Raises the host's designed error, if that is not one loss a row.
    """
    if isinstance(found, Signals):
        return found
    if found.dim() != 1:
        refuse(
            "score", "a function that gives one loss a row", f"shape {tuple(found.shape)}",
            "Reduce each row first: .mean(dim=1).",
        )  # fmt: skip
    return Signals(loss=found)
