"""Batches joined into candidates: columns of rows, who each row is, and which group it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from onlinesel.data.batch import gather_rows, rows_in
from onlinesel.data.columns import as_columns
from onlinesel.data.rows import FILLER_ID, GROUP, ROW_ID, complete, content_ids

__all__ = ["Candidates", "Joiner"]


@dataclass(frozen=True)
class Candidates:
    """One micro-batch of candidates.

    Attributes:
        columns: The batch's leaves by name.
        rebuild: Puts leaves of these names into the structure that the loader gave.
        ids: ``(N,)`` int64.
        groups: ``(N,)`` int64 source or domain of each row, None if rows have none.
    """

    columns: dict[str, Any]
    rebuild: Callable[[Any], Any]
    ids: Tensor
    groups: Tensor | None


class Joiner:
    """Join batches of a loader into candidates.

    Args:
        ids: As of ``CandidateLoader``; so are the others.
        groups: Column of groups.
        pad_id: Token that pads ``input_ids``.
        domains: ``(rows,)`` domain of each row of the dataset, where the order draws by it.

    Attributes:
        named: Whether a column has named the rows so far, and not their number.
    """

    def __init__(
        self, ids: str, groups: str | None, pad_id: int, domains: Tensor | None = None
    ) -> None:
        self.ids, self.groups, self.named = ids, groups, False
        self._pad_id, self._domains = pad_id, domains
        self._layout: dict[str, bool] = {}  # which lists in a batch have one entry a row

    def told_apart(self, *, numbered: bool) -> str:
        """Return how rows are told apart, in words; ``numbered`` where a dataset numbers them."""
        if self.ids not in ("auto", "hash"):
            return f"the column {self.ids}"
        if self.ids == "hash" or not numbered:
            return "a hash of each row's content"
        return "row numbers, or the column sample_id where there is one"

    def join(self, pairs: Sequence[tuple[Tensor | None, Any]]) -> Candidates:
        """Join batches into one of candidates, and find out who the rows are.

        Args:
            pairs: Numbers of the rows in their dataset, if they have any, and the batch.
        """
        known = (None if ids is None else len(ids) for ids, _ in pairs)
        taken = [as_columns(b, n, self._layout) for (_, b), n in zip(pairs, known, strict=True)]
        sizes = [rows_in(part.values, "CandidateLoader") for part in taken]
        columns, rebuild = taken[0].values, taken[0].rebuild
        if len(pairs) > 1:
            places = [(m, r) for m, size in enumerate(sizes) for r in range(size)]
            columns = gather_rows([part.values for part in taken], places, pad_id=self._pad_id)
        columns = dict(columns)
        numbered = [ids.cpu() for ids, _ in pairs if ids is not None]
        numbers = torch.cat(numbered) if numbered else None
        self.named |= self.ids != "hash" and _named_column(self.ids) in columns
        ids = _identify(columns, numbers, self.ids)
        return Candidates(columns, rebuild, ids, self._grouped(columns, ids, ids is numbers))

    def _grouped(self, columns: dict[str, Any], ids: Tensor, numbered: bool) -> Tensor | None:
        """Return the groups of the rows; a column of them is taken out of the batch."""
        names = [name for name in (self.groups, GROUP) if name in columns]
        groups = complete("CandidateLoader", names[0], columns.pop(names[0])) if names else None
        if self._domains is not None:
            if not numbered:
                raise ValueError(
                    "CandidateLoader: ids must be row numbers where an order draws by domain, got "
                    f"others (ids={self.ids!r}). Use ids='auto' and no column sample_id."
                )
            groups = self._domains[ids.clamp(min=0)] if groups is None else groups
        if self.groups is not None and groups is None:
            _refuse_column("groups", self.groups, columns)
        return groups


def _named_column(wanted: str) -> str:
    """Return the column of ids that a reader looks for, by its ``ids``."""
    return "sample_id" if wanted == "auto" else wanted


def _identify(columns: dict[str, Any], numbers: Tensor | None, wanted: str) -> Tensor:
    """Return who the rows of a batch are: ``(N,)`` int64.

    Args:
        columns: The batch; a column of ids is taken out of it.
        numbers: Numbers of the rows in their dataset, if they have any.
        wanted: The reader's ``ids``.
    """
    name = _named_column(wanted)
    found = columns.pop(ROW_ID, None)
    if wanted == "hash":
        found = content_ids(columns)
    elif name in columns:
        found = columns.pop(name)
    elif wanted != "auto":
        _refuse_column("ids", wanted, columns)
    if found is None:
        return content_ids(columns) if numbers is None else numbers
    ids = complete("CandidateLoader", name, found).cpu()
    if ids.is_floating_point():
        raise TypeError(
            f"CandidateLoader: ids must be integers, got {ids.dtype} in column {name!r}. "
            "Carry ids as int64: floats lose integers above 2**24."
        )
    ids = ids.to(torch.int64)
    return ids if numbers is None else torch.where(numbers == FILLER_ID, FILLER_ID, ids)


def _refuse_column(argument: str, name: str, columns: dict[str, Any]) -> NoReturn:
    """Refuse the name of a column that the batch does not have."""
    raise ValueError(
        f"CandidateLoader: {argument} must be a column of the batch, got {name!r}. The columns are "
        f"{', '.join(columns)}."
    )
