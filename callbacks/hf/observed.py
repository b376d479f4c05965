"""The losses of the rows that trained, for methods and mixtures that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onlinesel._base.host import to_host
from onlinesel.mixing import DomainSampler
from onlinesel.parallel.distributed import gather_signals
from onlinesel.selector import Selector
from onlinesel.types import Scope, Signals

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
        self._losses: list[Tensor] = []

    def note(self, losses: Tensor, multipliers: Tensor) -> None:
        """Note the next micro-batch.

        Args:
            losses: ``(n,)`` mean token loss of each row.
            multipliers: ``(n,)``, 0 for rows that do not train.
        """
        trains = multipliers.to(losses.device) != 0
        self._losses.append(torch.where(trains, losses, float("nan")))

    def teach(
        self, selector: Selector, domains: DomainSampler | None, scope: Scope, device: torch.device
    ) -> None:
        """Let who learns from the losses of this step do so.

        Args:
            selector: Learns from the rows that it decided about.
            domains: Draws the candidates by domain; learns from all rows.
            scope: What competes; with ``"global"`` all ranks learn from all rows.
            device: Where collectives need their tensors.
        """
        compared = domains is not None and "reference_loss" in domains.mixture.needs
        seen = self.drain(compared)
        if seen is None:
            return
        everywhere = seen
        if scope == "global" or domains is not None:
            everywhere, _ = gather_signals(seen, device)
        if selector.strategy.observes:
            selector.observe(everywhere if scope == "global" else seen)
        if domains is not None:
            domains.observe(
                everywhere.row_ids(),
                everywhere.require(self, "loss"),
                reference_loss=everywhere.reference_loss,
            )

    def drain(self, compared: bool) -> Signals | None:
        """Return what was noted in this step, None if nothing was, and forget it.

        Args:
            compared: Whether the reference losses are wanted.
        """
        losses, self._losses = self._losses, []
        if not losses:
            return None
        pairs = zip(losses, self._references, strict=True)
        known = [torch.full_like(loss, torch.nan) if r is None else r for loss, r in pairs]
        brought = to_host([*losses, *(known if compared else ())])
        columns = {"loss": brought[: len(losses)], "reference_loss": brought[len(losses) :]}
        found = {name: torch.cat(column) for name, column in columns.items() if column}
        return Signals(ids=torch.cat(self._ids), **found)
