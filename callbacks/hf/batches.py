"""The trainer's batches as columns of rows, and back in the structure that its collator gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Trainer

from onlinesel.callbacks._shared.replay import HELD
from onlinesel.data.columns import as_columns
from onlinesel.data.rows import GROUP, ROW_ID, content_ids

__all__ = ["RowBatches", "Step", "only_moves"]


class Step(NamedTuple):
    """The candidates of one optimizer step on this rank.

    Attributes:
        batches: Micro-batches as the trainer prepares them, on its device.
        columns: The same as columns of rows.
        ids: ``(n,)`` of their rows.
        groups: ``(n,)`` of their rows, or empty.
        given: The columns as they were loaded, if preparing only moved them, else None.
    """

    batches: list[dict[str, Any]]
    columns: list[dict[str, Any]]
    ids: list[Tensor]
    groups: list[Tensor]
    given: list[dict[str, Any]] | None


def only_moves(trainer: Any) -> bool:
    """Return whether a trainer prepares its batches as transformers' does: by moving them."""
    names = ("_prepare_inputs", "_prepare_input")
    return all(getattr(type(trainer), name) is getattr(Trainer, name) for name in names)


class RowBatches:
    """Take the batches of a run apart and put them together again."""

    def __init__(self) -> None:
        self._layout: dict[str, bool] = {}
        self._rebuild: Callable[[Mapping[str, Any]], Any] = dict

    def take_apart(self, trainer: Any, batches: Sequence[Any]) -> Step:
        """Prepare a step's batches as the trainer does, and take them apart into columns.

        Args:
            trainer: The trainer.
            batches: What its loader gave, on the host if :meth:`TrainingData.loader` could see to
                it: what decides about rows is then known without waiting for the device.
        """
        step = Step([], [], [], [], [] if only_moves(trainer) else None)
        for loaded in batches:
            loaded = dict(loaded)
            own, group = loaded.pop(ROW_ID, None), loaded.pop(GROUP, None)
            rows = None if own is None else len(own)
            given = as_columns(loaded, rows, self._layout).values
            prepared = dict(trainer._prepare_inputs(loaded))
            taken = as_columns(prepared, rows, self._layout)
            self._rebuild = taken.rebuild
            step.batches.append(prepared)
            step.columns.append(taken.values)
            step.ids.append(content_ids(given) if own is None else own)
            step.groups.extend([] if group is None else [group])
            if step.given is not None:
                step.given.append(given)
        return step

    def rebuild(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return one batch in the structure of the collator's."""
        return dict(self._rebuild(columns))

    def put_together(self, batches: list[dict[str, Any]]) -> None:
        """Give the planned batches of a step the structure of the collator's, in place."""
        for number, columns in enumerate(batches):
            held = {HELD: columns[HELD]} if HELD in columns else {}
            batches[number] = self.rebuild(columns) | held
