"""What is known about every row ever seen, keyed by its id."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from onlinesel.types import State

__all__ = ["Ledger"]


def _empty(dtype: torch.dtype) -> Tensor:
    return field(default_factory=lambda: torch.empty(0, dtype=dtype))


@dataclass(frozen=True)
class Ledger:
    """A table from int64 ids to losses, visits and pass counts, as a value.

    The ids are kept sorted, so a lookup is a binary search and the content does not depend on the
    order or the rank on which rows were seen: a ledger survives a change of world size. An update
    returns a new ledger and costs O(M) for M ids known (28 bytes each).

    Attributes:
        ids: ``(M,)`` int64, ascending.
        loss: ``(M,)`` float32, the last loss of each row.
        average: ``(M,)`` float32, exponential moving average of its losses.
        visits: ``(M,)`` int32, how often it was updated.
        passes: ``(M,)`` int32, how often with success (for outcomes rather than losses).

    Example:
        >>> import torch
        >>> from onlinesel import Ledger
        >>> ledger = Ledger().update(torch.tensor([7, 3]), torch.tensor([1.0, 2.0]))
        >>> ledger.lookup(torch.tensor([3, 4]), "loss", default=9.0).tolist()
        [2.0, 9.0]
    """

    ids: Tensor = _empty(torch.int64)
    loss: Tensor = _empty(torch.float32)
    average: Tensor = _empty(torch.float32)
    visits: Tensor = _empty(torch.int32)
    passes: Tensor = _empty(torch.int32)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each id stands or would stand, and whether it is known."""
        at = torch.searchsorted(self.ids, ids.contiguous())
        if not len(self):
            return at, torch.zeros_like(ids, dtype=torch.bool)
        return at, self.ids[at.clamp(max=len(self) - 1)] == ids

    def lookup(self, ids: Tensor, name: str, default: float = float("nan")) -> Tensor:
        """Return one column for some ids, ``default`` where an id is unknown.

        Args:
            ids: ``(N,)`` int64.
            name: A column of the table: ``"loss"``, ``"average"``, ``"visits"`` or ``"passes"``.
            default: For ids never seen; nan means 0 for the counts, which have no nan.
        """
        column = getattr(self, name)
        if math.isnan(default) and not column.is_floating_point():
            default = 0
        at, known = self._find(ids)
        if not len(self):
            return torch.full(ids.shape, default).to(column.dtype)
        found = column[at.clamp(max=len(self) - 1)]
        return torch.where(known, found, torch.tensor(default).to(column.dtype))

    def _with(self, new: Tensor) -> Ledger:
        """Insert ids (ascending, unknown) with zeros, keeping the order in one merge."""
        at = torch.searchsorted(self.ids, new) + torch.arange(new.shape[0])
        old = torch.ones(len(self) + new.shape[0], dtype=torch.bool)
        old[at] = False
        columns = {}
        for f in fields(self):
            column = getattr(self, f.name)
            grown = torch.zeros(old.shape[0], dtype=column.dtype)
            grown[old] = column
            columns[f.name] = grown
        columns["ids"][at] = new
        return Ledger(**columns)

    def update(
        self, ids: Tensor, loss: Tensor, *, passed: Tensor | None = None, decay: float = 0.9
    ) -> Ledger:
        """Record an observation of some rows.

        A row that occurs twice (a loader that repeats rows to fill the last batch) counts once,
        with its last value; non-finite losses are left out.

        Args:
            ids: ``(N,)`` int64.
            loss: ``(N,)`` floats.
            passed: ``(N,)`` bool, adds to ``passes``.
            decay: Weight of the past in ``average``; the first observation sets it.

        Returns:
            The new ledger.
        """
        rows = torch.isfinite(loss).nonzero().flatten()
        if not rows.numel():
            return self
        unique, inverse = torch.unique(ids[rows], return_inverse=True)
        last = torch.zeros(unique.shape[0], dtype=torch.int64)
        last = last.scatter_reduce(0, inverse, torch.arange(rows.numel()), "amax")
        values = loss[rows][last].float()
        _, known = self._find(unique)
        table = self if bool(known.all()) else self._with(unique[~known])
        at, _ = table._find(unique)
        first = table.visits[at] == 0
        average = torch.where(first, values, decay * table.average[at] + (1 - decay) * values)
        hits = torch.ones_like(last, dtype=torch.int32)
        done = hits * 0 if passed is None else passed[rows][last].to(torch.int32)
        return replace(
            table,
            loss=table.loss.index_put((at,), values),
            average=table.average.index_put((at,), average),
            visits=table.visits.index_put((at,), hits, accumulate=True),
            passes=table.passes.index_put((at,), done, accumulate=True),
        )

    def to_state(self) -> State:
        """Return the columns as a flat state for :class:`onlinesel.Strategy`."""
        return {f"ledger.{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state(cls, state: State) -> Ledger:
        """Return the ledger that :meth:`to_state` wrote."""
        return cls(**{f.name: state[f"ledger.{f.name}"] for f in fields(cls)})
