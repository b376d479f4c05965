"""The losses of the rows that trained, for methods and mixtures that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onlinesel.types import Signals

__all__ = ["TrainedLosses"]


class TrainedLosses:
    """Collect what the training forwards of one step show about its rows."""

    def __init__(self) -> None:
        self.begin([], [])

    def begin(self, ids: Sequence[Tensor], batches: Sequence[dict[str, Any]]) -> None:
        """Begin a step; takes the reference losses that ride in its micro-batches out of them.

        Args:
            ids: ``(n,)`` of the rows of each micro-batch.
            batches: The micro-batches, changed in place.
        """
        self._ids = list(ids)
        self._references = [batch.pop("reference_loss", None) for batch in batches]
        self._seen: list[Signals] = []

    def note(self, losses: Tensor, multipliers: Tensor) -> None:
        """Note the next micro-batch.

        Args:
            losses: ``(n,)`` mean token loss of each row.
            multipliers: ``(n,)``, 0 for rows that do not train.
        """
        losses = losses.masked_fill(multipliers.to(losses.device) == 0, float("nan")).cpu()
        index = len(self._seen)
        known = self._references[index]
        known = torch.full_like(losses, float("nan")) if known is None else known.cpu()
        self._seen.append(Signals(ids=self._ids[index], loss=losses, reference_loss=known))

    def drain(self, compared: bool) -> Signals | None:
        """Return what was noted in this step, None if nothing was, and forget it.

        Args:
            compared: Whether the reference losses are wanted.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return None
        names = ("ids", "loss", "reference_loss") if compared else ("ids", "loss")
        return Signals(**{name: torch.cat([getattr(s, name) for s in seen]) for name in names})
