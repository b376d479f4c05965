"""The micro-batches of a step, what the host knows of them, and what was found out about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from onlinesel._base.host import host_columns, to_host
from onlinesel.data.batch import gather_twice
from onlinesel.types import Signals

__all__ = ["MicroBatches", "united"]

Batch = dict[str, Any]


class MicroBatches:
    """Micro-batches on any device, whose labels and masks the host can read.

    Attributes:
        batches: The micro-batches.
        hosted: Of each, those labels and masks on the host that lie on a device.
    """

    def __init__(self, batches: Sequence[Batch], hosted: Sequence[Batch]) -> None:
        self.batches, self.hosted = list(batches), list(hosted)

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        *others: Sequence[Tensor],
        given: Sequence[Batch] | None = None,
    ) -> tuple[MicroBatches, list[list[Tensor]]]:
        """Bring what is to be read to the host, see :func:`onlinesel._base.host.host_columns`."""
        hosted, brought = host_columns(batches, *others, given=given)
        return cls(batches, hosted), brought

    def append(self, batch: Batch) -> None:
        """Add a micro-batch, of which the host knows nothing yet."""
        self.batches.append(batch)
        self.hosted.extend(host_columns([batch])[0])

    def readable(self, number: int) -> dict[str, Any]:
        """Return a micro-batch with its labels and masks on the host."""
        return {**self.batches[number], **self.hosted[number]}

    def gathered(
        self, rows: Sequence[tuple[int, int]], pad_id: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Build a batch of rows, see :func:`onlinesel.data.batch.gather_rows`.

        Returns:
            The batch, and the same with its labels and masks on the host.
        """
        batch, known = gather_twice(self.batches, self.hosted, rows, pad_id=pad_id)
        return batch, batch | known


def united(scores: Sequence[Signals], known: Sequence[Signals]) -> list[Signals]:
    """Bring the scores of all micro-batches to the host in one copy, beside what is known there."""
    found = [part.present() for part in scores]
    values = iter(to_host([value for part in found for value in part.values()]))
    brought = [{name: next(values) for name in part} for part in found]
    return [Signals(**(b | k.present())) for b, k in zip(brought, known, strict=True)]
