"""Simulated ranks: one process takes a rank's place among many, and keeps account of what it sends.

The code that decides is the real one. Only ``torch.distributed`` is stood in for: what the other
ranks would send is laid in place, and every collective is written down with its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onlinesel.parallel import distributed
from onlinesel.parallel.distributed import _packed, _tensors
from onlinesel.types import Signals

__all__ = ["Collective", "SimulatedRanks"]


@dataclass(frozen=True)
class Collective:
    """One collective as one rank takes part in it.

    Attributes:
        kind: Name of the function of ``torch.distributed``.
        sent: Bytes that this rank hands in.
        received: Bytes that it gets.
        hidden: Whether it travels while the model scores.
    """

    kind: str
    sent: int
    received: int
    hidden: bool = False


@dataclass
class _Handle:
    """What a collective that was started returns."""

    place: int
    waited: bool = False

    def wait(self) -> None:
        """Note that it is needed; everything has arrived."""
        self.waited = True


class SimulatedRanks:
    """Stand in for ``torch.distributed`` on one of many ranks that hold alike data.

    Args:
        ranks: How many there are.
        rank: Which one this process is.

    Attributes:
        log: The collectives since it was made or cleared, in order.
    """

    ReduceOp = dist.ReduceOp

    def __init__(self, ranks: int, rank: int) -> None:
        self._ranks, self._rank = ranks, rank
        self._arriving: dict[int, Tensor] = {}
        self._started: list[_Handle] = []
        self._row: Tensor | None = None
        self._largest = 0
        self.log: list[Collective] = []

    def prepare(self, pool: Signals, counts: Sequence[int]) -> None:
        """Lay ready what gatherings will bring: the signals of all ranks' rows.

        They may be gathered all together, or those that are known without the model by themselves.

        Args:
            pool: The rows of all ranks, in the order of the ranks.
            counts: Rows of each rank.
        """
        number = torch.tensor(counts)
        self._largest = int(number.max())
        heads = number.view(self._ranks, 1).view(torch.uint8)
        real = torch.arange(self._largest) < number[:, None]
        named = pool.present()
        known = {n: v for n, v in named.items() if not v.is_floating_point()}
        self._arriving = {}
        for part in (named, known, {n: v for n, v in named.items() if n not in known}):
            if part:
                rows = _packed(part, "cpu")
                block = rows.new_zeros(*real.shape, rows.shape[1])
                block[real] = rows
                whole = torch.cat([heads, block.flatten(1)], dim=1).flatten()
                self._arriving[whole.numel()] = whole

    def scoring(self) -> None:
        """Note that the model scores now: what has been started and not waited for is hidden."""
        for handle in self._started:
            if not handle.waited:
                self.log[handle.place] = replace(self.log[handle.place], hidden=True)

    def clear(self) -> None:
        """Forget the collectives so far."""
        self.log.clear()
        self._started.clear()

    def prepare_row(self, batch: dict[str, Any]) -> None:
        """Lay ready the row, a batch of one, that every rank gives when rows change rank."""
        self._row = _packed(_tensors(batch), "cpu")

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Let the collectives of the decision go here instead of to ``torch.distributed``."""
        real = vars(distributed)["dist"]
        vars(distributed)["dist"] = self
        try:
            yield
        finally:
            vars(distributed)["dist"] = real

    def _note(self, kind: str, sent: Tensor, received: Tensor) -> None:
        self.log.append(Collective(kind, sent.nbytes, received.nbytes))

    # What onlinesel.parallel.distributed calls ------------------------------------------------

    def is_available(self) -> bool:
        """Return True."""
        return True

    def is_initialized(self) -> bool:
        """Return True."""
        return True

    def get_world_size(self) -> int:
        """Return the number of ranks."""
        return self._ranks

    def get_rank(self) -> int:
        """Return the rank that this process is."""
        return self._rank

    def all_reduce(
        self, value: Tensor, op: Any = dist.ReduceOp.SUM, async_op: bool = False
    ) -> _Handle:
        """Reduce numbers that are the same on all ranks, or bring what was prepared."""
        self._note("all_reduce", value, value)
        if value.dtype == torch.uint8:
            value.copy_(self._arriving[value.numel()].view_as(value))
        elif op == dist.ReduceOp.SUM:
            value *= self._ranks
        elif value.numel() == 1:  # the number of rows, which may be larger elsewhere
            value.clamp_(min=self._largest)
        return self._handle(async_op)

    def all_gather_single(self, whole: Tensor, part: Tensor, async_op: bool = False) -> _Handle:
        """Bring what was prepared."""
        self._note("all_gather_single", part, whole)
        whole.copy_(self._arriving[whole.numel()])
        return self._handle(async_op)

    def _handle(self, async_op: bool) -> _Handle:
        handle = _Handle(len(self.log) - 1, waited=not async_op)
        self._started.append(handle)
        return handle

    def all_to_all_single(
        self, whole: Tensor, part: Tensor, take: Sequence[int], give: Sequence[int]
    ) -> None:
        """Bring rows as the prepared one."""
        self._note("all_to_all_single", part, whole)
        assert self._row is not None and sum(take) == whole.shape[0]
        whole.copy_(self._row.expand_as(whole))
