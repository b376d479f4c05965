"""Words that errors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return a question about the known word that comes nearest, in whatever case it was written.

    Args:
        word: What was given.
        known: What there is.
        otherwise: Said where nothing comes near.

    Example:
        >>> did_you_mean("uds", ["UDS", "RS2"])
        'Did you mean UDS?'
        >>> did_you_mean("something", ["UDS", "RS2"], "Choose one of them.")
        'Choose one of them.'
    """
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), lowered, n=1)
    return f"Did you mean {lowered[near[0]]}?" if near else otherwise
