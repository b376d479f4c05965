"""What is known about every row ever seen, keyed by its id."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from onlinesel.ledger.runs import Run, find, merged, settled, size
from onlinesel.types import State

__all__ = ["Ledger"]

_DTYPES = {
    "loss": torch.float32,
    "average": torch.float32,
    "visits": torch.int32,
    "passes": torch.int32,
}


def _empty(columns: Iterable[str]) -> Run:
    empty = {name: torch.empty(0, dtype=_DTYPES[name]) for name in columns}
    return {"ids": torch.empty(0, dtype=torch.int64), **empty}


def _or_default(known: Tensor, column: Tensor, default: float) -> Tensor:
    if math.isnan(default) and not column.is_floating_point():
        default = 0
    return torch.where(known, column, torch.tensor(default).to(column.dtype))


# A sum of float32 that is exact: whole multiples of 2**-150 by their exponent. 2**63 / 2**24 of
# them fit, some 10**11.


def _no_total() -> Tensor:
    return torch.zeros(256, dtype=torch.int64)


def _add(total: Tensor, values: Tensor, signs: Tensor | None = None) -> Tensor:
    """Add finite float32 values to an exact sum, or take out again those whose sign is -1."""
    result = total.clone()
    # What is computed on the way takes 24 bytes a value.
    parts = values.split(2**20)
    of_parts = (
        [torch.ones_like(p, dtype=torch.int64) for p in parts]
        if signs is None
        else signs.split(2**20)
    )
    for part, sign in zip(parts, of_parts, strict=True):
        bits = part.contiguous().view(torch.int32).long()
        exponent = (bits >> 23) & 0xFF
        mantissa = (bits & 0x7FFFFF) + (exponent > 0) * 0x800000
        result.index_add_(0, exponent, torch.where(bits < 0, -sign, sign) * mantissa)
    return result


def _mean(total: Tensor, count: int) -> float:
    """Return the sum over a count, correctly rounded."""
    if not count:
        return float("nan")
    used = total.nonzero().flatten()
    pairs = zip(used.tolist(), total[used].tolist(), strict=True)
    return sum(multiples << max(exponent, 1) for exponent, multiples in pairs) / (count << 150)


@dataclass(frozen=True, eq=False)
class Ledger:
    """A table from int64 ids to losses, visits and pass counts, as a value.

    An update returns a new ledger and leaves the old one as it was. It does not copy what it does
    not change: the rows lie in sorted runs of geometrically falling size, the newest row of an id
    counts, and runs are merged as they fill up. So an update of ``N`` rows costs
    ``O(N log M)`` on average for ``M`` known ids, though one in many rewrites all of them. What
    is known does not depend on the order or the rank in which rows were seen: a ledger survives a
    change of world size.

    An id takes 8 bytes and each column 4, and up to a seventh more while updates wait to be merged.

    Args:
        columns: What to remember of each row, ``"loss"`` and any of the others:

            - ``loss``: float32, the last loss;
            - ``average``: float32, exponential moving average of the losses;
            - ``visits``: int32, how often the row was updated;
            - ``passes``: int32, how often with success (for outcomes rather than losses).

    Raises:
        ValueError: An unknown column, or no loss.

    Example:
        >>> import torch
        >>> from onlinesel import Ledger
        >>> ledger = Ledger().update(torch.tensor([7, 3]), torch.tensor([1.0, 2.0]))
        >>> ledger.lookup(torch.tensor([3, 4]), "loss", default=9.0).tolist()
        [2.0, 9.0]
        >>> float(ledger.mean)
        1.5
    """

    columns: tuple[str, ...] = tuple(_DTYPES)
    _runs: tuple[Run, ...] = field(default=(), repr=False)
    _known: int = 0
    _total: Tensor = field(default_factory=_no_total, repr=False)
    _recalled: Run | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        columns = tuple(name for name in _DTYPES if name in self.columns)
        if len(columns) != len(self.columns) or "loss" not in columns:
            raise ValueError(
                f"Ledger: columns must be 'loss' and any of {', '.join(_DTYPES)}, got "
                f"{self.columns}. Name each once."
            )
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        """Number of ids that are known."""
        return self._known

    @property
    def mean(self) -> Tensor:
        """Mean of the last losses of all known ids: scalar float64, nan if there is none.

        Exact but for the last rounding, so it depends neither on the order of the updates nor on
        the machine; it costs the same for any number of ids.
        """
        return torch.tensor(_mean(self._total, self._known), dtype=torch.float64)

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """All rows, merged: ``ids`` ascending and each column, ``(M,)``. Costs ``O(M)``."""
        rows = _empty(self.columns)
        for run in self._runs:
            rows = merged(rows, run)
        return dict(rows)

    def _column(self, name: str) -> None:
        if name not in self.columns:
            raise ValueError(
                f"Ledger: name must be a column ({', '.join(self.columns)}), got {name!r}. "
                "Make the ledger with that column."
            )

    def _rows(self, ids: Tensor, names: Sequence[str]) -> tuple[Tensor, Run]:
        """Return which ids are known, and their columns (0 where not)."""
        known = torch.zeros_like(ids, dtype=torch.bool)
        found = {name: torch.zeros(ids.shape, dtype=_DTYPES[name]) for name in names}
        recalled = () if self._recalled is None else (self._recalled,)
        left: Tensor | None = None  # which are still to be found; None is all
        for run in (*recalled, *reversed(self._runs)):
            at, here = find(run, ids if left is None else ids[left])
            if left is None and bool(here.all()):
                return here, {name: run[name][at] for name in names}
            rows = here.nonzero().flatten()
            to = rows if left is None else left[rows]
            known[to] = True
            for name in names:
                found[name][to] = run[name][at[rows]]
            rest = (~here).nonzero().flatten()
            left = rest if left is None else left[rest]
            if not left.numel():
                break
        return known, found

    def lookup(self, ids: Tensor, name: str, default: float = float("nan")) -> Tensor:
        """Return one column for some ids, ``default`` where an id is unknown.

        Args:
            ids: ``(N,)`` int64.
            name: A column of the table.
            default: For ids never seen; nan means 0 for the counts, which have no nan.

        Raises:
            ValueError: The ledger has no such column.
        """
        self._column(name)
        known, found = self._rows(ids, (name,))
        return _or_default(known, found[name], default)

    def recall(
        self, ids: Tensor, name: str, default: float = float("nan")
    ) -> tuple[Tensor, Ledger]:
        """Do as :meth:`lookup`, and keep what was found at hand.

        Updating those ids next costs no second search.

        Args:
            ids: ``(N,)`` int64.
            name: A column of the table.
            default: For ids never seen; nan means 0 for the counts, which have no nan.

        Returns:
            The column, and a ledger of the same content.

        Raises:
            ValueError: The ledger has no such column.
        """
        self._column(name)
        unique, inverse = torch.unique(ids, return_inverse=True)
        known, found = self._rows(unique, self.columns)
        rows = {"ids": unique, **found}
        if not bool(known.all()):
            rows = {column: value[known] for column, value in rows.items()}
        column = _or_default(known, found[name], default)[inverse]
        return column, replace(self, _recalled=rows)

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

        Raises:
            ValueError: ``passed`` without a column for it.
        """
        if passed is not None:
            self._column("passes")
        rows = torch.isfinite(loss).nonzero().flatten()
        if not rows.numel():
            return self
        unique, order = ids[rows].sort(stable=True)
        last = torch.ones(unique.shape, dtype=torch.bool)
        last[:-1] = unique[1:] != unique[:-1]
        unique, rows = unique[last], rows[order[last]]
        values = loss[rows].float()
        known, old = self._rows(unique, self.columns)
        new = {"ids": unique, "loss": values}
        if "average" in old:
            moved = decay * old["average"] + (1 - decay) * values
            new["average"] = torch.where(known, moved, values)
        if "visits" in old:
            new["visits"] = old["visits"] + 1
        if "passes" in old:
            hits = 0 if passed is None else passed[rows].to(torch.int32)
            new["passes"] = old["passes"] + hits
        changes, signs = values, torch.ones(values.shape, dtype=torch.int64)
        if bool(known.any()):
            changes = torch.cat([values, old["loss"][known]])
            signs = torch.cat([signs, -signs[known]])
        return replace(
            self,
            _runs=settled((*self._runs, new)),
            _known=self._known + int((~known).sum()),
            _total=_add(self._total, changes, signs),
            _recalled=None,
        )

    @classmethod
    def union(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """Return one ledger of all ids that any of several knows.

        Of an id that several know, the row with more visits is taken whole, as the one that was
        observed later; among equals, or without visits, that of the last ledger. Ranks that
        decided alone are so united when their number changes: give them in the order of the ranks.

        Args:
            ledgers: At least one, all with the same columns.

        Raises:
            ValueError: None, or different columns.
        """
        kinds = {ledger.columns for ledger in ledgers}
        if len(kinds) != 1:
            raise ValueError(
                "Ledger: ledgers must be one or more with the same columns, got "
                f"{[ledger.columns for ledger in ledgers]}. Unite ledgers of one method."
            )
        table = reduce(_united, (ledger.table for ledger in ledgers))
        return cls.from_state({f"ledger.{name}": value for name, value in table.items()})

    def to_state(self) -> State:
        """Return a flat state for :class:`onlinesel.Strategy`, without copying.

        Keys are ``ledger.<column>.<run>`` for the runs from the oldest, ``ledger.sizes`` (their
        rows), ``ledger.known``, ``ledger.total``, and ``ledger.<column>.recalled``, empty unless
        :meth:`recall` came last.
        """
        runs = self._runs or (_empty(self.columns),)
        recalled = _empty(self.columns) if self._recalled is None else self._recalled
        named = [*((str(i), run) for i, run in enumerate(runs)), ("recalled", recalled)]
        state = {f"ledger.{name}.{i}": value for i, run in named for name, value in run.items()}
        state["ledger.sizes"] = torch.tensor([size(run) for run in runs])
        state["ledger.known"] = torch.tensor(self._known)
        return {**state, "ledger.total": self._total}

    @classmethod
    def from_state(cls, state: State) -> Ledger:
        """Return the ledger that :meth:`to_state` wrote.

        A state of whole columns (``ledger.ids``, ascending, ``ledger.loss``, ...) will do as well:
        version 0.1.0 wrote such, and it is how a table from elsewhere becomes a ledger.
        """
        columns = tuple(n for n in _DTYPES if f"ledger.{n}" in state or f"ledger.{n}.0" in state)
        if "ledger.sizes" not in state:
            run = {name: state[f"ledger.{name}"] for name in ("ids", *columns)}
            return cls(columns, (run,), size(run), _add(_no_total(), run["loss"]))

        def run_of(name: str) -> Run:
            return {column: state[f"ledger.{column}.{name}"] for column in ("ids", *columns)}

        # A state may hold runs of earlier steps, which have been merged since.
        runs = tuple(run_of(str(i)) for i in range(state["ledger.sizes"].shape[0]))
        recalled = run_of("recalled")
        return cls(
            columns,
            runs,
            int(state["ledger.known"]),
            state["ledger.total"],
            recalled if size(recalled) else None,
        )


def _united(first: Run, second: Run) -> Run:
    """Return the rows of two tables; where both have an id, the row with more visits."""
    if "visits" not in first:
        return merged(first, second)
    at, both = find(first, second["ids"])
    later = ~both
    later[both] = second["visits"][both] >= first["visits"][at[both]]
    return merged(first, {name: value[later] for name, value in second.items()})
