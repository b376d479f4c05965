"""Whether a dataset is still the one that a run was set up for, and large enough for its steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from onlinesel.data.columns import map_tensors

__all__ = ["DataFacts", "check_size"]


@dataclass(frozen=True)
class DataFacts:
    """What is known of a dataset without disturbing it: no row of an unknown class is read.

    Attributes:
        dataset: The dataset.
        rows: Its rows, None of a stream.
        content: What its rows are, as far as that can be seen; None if nothing can.
    """

    dataset: Any
    rows: int | None
    content: Any

    @classmethod
    def of(cls, dataset: Any) -> DataFacts:
        """Look at a dataset."""
        try:
            rows = len(dataset) if hasattr(dataset, "__getitem__") else None
        except TypeError:
            rows = None
        return cls(dataset, rows, _content(dataset, rows))

    def difference(self, dataset: Any, *, alike: bool = False) -> str | None:
        """Say how a dataset differs from this one as it was, None if it does not.

        Args:
            dataset: The dataset now.
            alike: Whether another object may be the same data: one of the same class and size
                whose content is the same, as far as that can be seen.
        """
        now = DataFacts.of(dataset)
        if now.rows != self.rows:
            return f"{now.rows} rows where there were {self.rows}"
        if now.content != self.content:
            return "other rows"
        if dataset is self.dataset or (alike and type(dataset) is type(self.dataset)):
            return None
        return "another dataset"


def _content(dataset: Any, rows: int | None) -> Any:
    named = getattr(dataset, "_fingerprint", None)  # of Hugging Face's datasets
    if named is not None or not rows or not isinstance(dataset, list | tuple | TensorDataset):
        return named
    return [repr(map_tensors(Tensor.tolist, dataset[i])) for i in (0, rows // 2, -1)]


def check_size(
    owner: str,
    rows: int,
    *,
    micro_batch: int,
    accumulate: int,
    drops_last: bool,
    names: Sequence[str],
) -> None:
    """Refuse a dataset that gives no step, and say where it gives no whole micro-batch.

    Args:
        owner: Name used in the error.
        rows: Rows of an epoch.
        micro_batch: Candidates of a micro-batch over all ranks.
        accumulate: Micro-batches that a step must have where a shorter one is dropped.
        drops_last: Whether it is.
        names: What the caller calls candidates and the setting by which the last is dropped.

    Raises:
        ValueError: An epoch would have no step.
    """
    candidates, dropping = names
    if drops_last and rows < micro_batch * accumulate:
        raise ValueError(
            f"{owner}: dataset must have at least one step of {micro_batch * accumulate} "
            f"candidates, got {rows} rows. Lower {candidates}, the batch size or the accumulation, "
            f"or set {dropping}=False."
        )
    if rows < micro_batch:
        warnings.warn(
            f"{owner}: a micro-batch takes {micro_batch} candidates and the dataset has {rows} "
            f"rows: every step looks at all of them and trains fewer than the batch size says. "
            f"Lower {candidates} or the batch size.",
            stacklevel=3,
        )
