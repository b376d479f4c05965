"""Reward functions for data whose answers a program can check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["final_number"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def final_number(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """Return 1.0 where the last number of a completion is the last number of its answer, else 0.0.

    What follows ``####`` counts, if that mark is there, as in GSM8K; thousands separators do not.

    Args:
        completions: Texts, or conversations whose last message is the completion.
        answer: Reference answers; one without a number scores nothing (None).

    Example:
        >>> final_number(["so it is 1,200.", "#### 7 apples", "no idea"], ["#### 1200", "8", "3"])
        [1.0, 0.0, 0.0]
    """
    scores: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        wanted = _last_number(right)
        scores.append(None if wanted is None else float(_last_number(text) == wanted))
    return scores
