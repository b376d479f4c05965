"""Whether a collator leaves its rows in the order that it got them in; ids rest on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from onlinesel.data.columns import as_columns

__all__ = ["OrderWatch"]

_BATCHES, _NUMBERS = 4, 2048  # to look at, and of each row


class OrderWatch:
    """Look at the first batches of a collator.

    Args:
        owner: Name used in the error.

    Example:
        >>> import torch
        >>> from onlinesel.data.collating import OrderWatch
        >>> OrderWatch("steps").check([{"x": 1}, {"x": 2}], {"x": torch.tensor([1, 2])})
    """

    def __init__(self, owner: str) -> None:
        self._owner, self._left = owner, _BATCHES

    def check(self, rows: Sequence[Any], batch: Any) -> None:
        """Compare the columns of a batch with what its rows hold under the same names.

        Args:
            rows: What the collator was given.
            batch: What it made of them.

        Raises:
            ValueError: A column holds the rows' own numbers in another order.
        """
        if not self._left:
            return
        self._left -= 1
        held, mask = _parts(batch), _parts(batch).get("attention_mask")
        parts = [_parts(row) for row in rows]
        for name, value in held.items():
            if not isinstance(value, Tensor) or not value.dim() or len(value) != len(rows):
                continue
            if not all(name in part for part in parts):
                continue
            entries = list(value)
            if isinstance(mask, Tensor) and mask.shape == value.shape:
                entries = [v[m != 0] for v, m in zip(value, mask, strict=True)]
            found = [_numbers(entry) for entry in entries]
            given = [_numbers(part[name]) for part in parts]
            if None in given or found == given:
                continue
            if sorted(map(str, found)) == sorted(map(str, given)):
                raise ValueError(
                    f"{self._owner}: collator must keep the order of the rows, got {name!r} in "
                    "another one. Ids belong to rows by their place: sort them in the sampler, or "
                    "give ids in a column of the batch with ids='auto' and the name 'sample_id'."
                )


def _parts(value: Any) -> dict[str, Any]:
    """Return what a row or batch has under which name, of the uppermost level only."""
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    return {str(i): part for i, part in enumerate(value)} if isinstance(value, list | tuple) else {}


def _numbers(value: Any) -> list[Any] | None:
    """Return the first numbers of an entry, None if it has others than numbers."""
    if isinstance(value, Tensor):
        return value.flatten()[:_NUMBERS].tolist()
    flat = list(islice(as_columns(value).values.values(), _NUMBERS))
    return flat if all(isinstance(number, int | float) for number in flat) else None
