"""The trainer's batches as columns of rows, and back in the structure that its collator gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from onlinesel.callbacks._replay import HELD
from onlinesel.columns import as_columns
from onlinesel.rows import GROUP, ROW_ID, content_ids

__all__ = ["RowBatches"]


class RowBatches:
    """Take the batches of a run apart and put them together again."""

    def __init__(self) -> None:
        self._layout: dict[str, bool] = {}
        self._rebuild: Callable[[Mapping[str, Any]], Any] = dict

    def take_apart(
        self, batches: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Tensor], list[Tensor] | None]:
        """Return the columns of a step's batches, the ids of their rows and their groups.

        Args:
            batches: What rides in them for the selection is taken out in place.
        """
        columns, ids, groups = [], [], []
        for batch in batches:
            own, group = batch.pop(ROW_ID, None), batch.pop(GROUP, None)
            taken = as_columns(batch, None if own is None else len(own), self._layout)
            self._rebuild = taken.rebuild
            columns.append(taken.values)
            ids.append(content_ids(taken.values) if own is None else own)
            groups += [] if group is None else [group]
        return columns, ids, groups or None

    def rebuild(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return one batch in the structure of the collator's."""
        return dict(self._rebuild(columns))

    def put_together(self, batches: list[dict[str, Any]]) -> None:
        """Give the planned batches of a step the structure of the collator's, in place."""
        for number, columns in enumerate(batches):
            held = {HELD: columns[HELD]} if HELD in columns else {}
            batches[number] = self.rebuild(columns) | held
