"""Row ids that survive: carried through the collator, or computed from the content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from onlinesel.data.batch import has_rows
from onlinesel.data.collating import OrderWatch
from onlinesel.data.columns import map_tensors

__all__ = [
    "FILLER_ID",
    "GROUP",
    "ROW_ID",
    "CarryColumns",
    "NumberedRows",
    "PlanSampler",
    "complete",
    "content_ids",
]

ROW_ID = "onlinesel_row_id"
"""Key under which ids ride in features and batches."""

GROUP = "onlinesel_group"
"""Key under which the source or domain of each row rides, if it has one."""

FILLER_ID = -(2**63)
"""Id of a row that only keeps its rank in step with the others: it never competes nor trains."""


class NumberedRows(Dataset[Any]):
    """A map-style dataset whose rows carry their number.

    Args:
        dataset: Rows are mappings.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        """Let the trainer and workers reach the dataset's own methods, as `set_epoch`."""
        if name == "dataset":  # not there yet while a worker unpickles this object
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (str, slice, list, tuple, range)):  # columns, for samplers and scripts
            return self.dataset[index]
        return _numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        return [_numbered(row, i) for i, row in zip(indices, rows, strict=True)]


def _numbered(row: Any, index: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(
            f"OnlineSelection: rows must be mappings of names to values, got {type(row).__name__}. "
            "Let the dataset return dicts."
        )
    return {**row, ROW_ID: int(index)}


class CarryColumns:
    """A collator that takes columns off the features and puts them back on the batch.

    Collators rebuild a batch from the keys that they know and drop the rest; an id that is lifted
    off before and attached after cannot be lost, whatever workers and look-ahead do.

    Args:
        collate: The collator to call with the features as it knows them.
        columns: Feature key -> batch key; a feature may lack a key if all do.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], columns: Mapping[str, str]) -> None:
        self.collate = collate
        self.columns = dict(columns)
        self._watch = OrderWatch("OnlineSelection")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        if not self.columns:
            return self.collate(list(features))
        carried = {
            target: complete("OnlineSelection", source, [f.get(source) for f in features])
            for source, target in self.columns.items()
            if any(source in feature for feature in features)
        }
        rest = [{k: v for k, v in f.items() if k not in self.columns} for f in features]
        batch = dict(self.collate(rest))
        self._watch.check(rest, batch)
        batch.update(carried)
        return batch


def complete(owner: str, name: str, values: Any) -> Tensor:
    """Return a column of numbers as a tensor, having checked that every row has one.

    Args:
        owner: Name used in the error.
        name: Of the column.
        values: ``(N,)`` numbers, or a tensor.

    Raises:
        ValueError: A row has None.

    Example:
        >>> complete("steps", "sample_id", [3, 5]).tolist()
        [3, 5]
    """
    missing = 0 if isinstance(values, Tensor) else sum(value is None for value in values)
    if missing:
        raise ValueError(
            f"{owner}: column {name!r} must have a number in every row, got None in {missing} of "
            f"{len(values)}. Fill it, or leave it out: without ids of their own rows are known by "
            "their number."
        )
    return torch.as_tensor(values)


class PlanSampler(Sampler[int]):
    """Yield the rows of an epoch plan; constant length, and its epoch is its own state.

    Trainers do not reliably tell a sampler its epoch: after a resume in mid-epoch on several
    processes the call never arrives. The callback sets :attr:`epoch` from the run's own counter.

    Args:
        plan: ``epoch -> (n,)`` row numbers, of the same length for every epoch.
    """

    def __init__(self, plan: Callable[[int], Any]) -> None:
        self.plan = plan
        self.epoch = 0
        self._length = plan(0).shape[0]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Any:
        return iter(self.plan(self.epoch).tolist())


def content_ids(batch: Mapping[str, Any]) -> Tensor:
    """Return ids made from the content of each row: ``(N,)`` int64.

    Equal rows have equal ids, wherever and whenever they occur. Used where rows have no stable
    number, as in streams. With ``input_ids`` the tokens and labels count, and padding does not;
    other batches are hashed over everything that has one entry a row.

    Example:
        >>> import torch
        >>> from onlinesel.data.rows import content_ids
        >>> rows, mask = torch.tensor([[4, 5, 0], [0, 4, 5]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
        >>> ids = content_ids({"input_ids": rows, "attention_mask": mask})
        >>> bool(ids[0] == ids[1])
        True
    """
    if "input_ids" not in batch:
        columns = [v for v in batch.values() if has_rows(v)]
        return _digests(b"".join(_entry(c[row]) for c in columns) for row in range(len(columns[0])))
    tokens = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    masks = torch.ones_like(tokens) if mask is None or mask.dim() != 2 else mask.cpu()
    labels, others = batch["labels"].cpu() if "labels" in batch else tokens, None
    if labels.shape != tokens.shape:  # of the whole row, as in classification
        several = labels.is_floating_point() or labels.numel() > len(tokens)
        others = labels if several else None
        labels = labels.reshape(len(tokens), -1)[:, :1].expand_as(tokens)
    pairs = (
        torch.stack([row[keep != 0], targets[keep != 0]]).to(torch.int64)
        for row, targets, keep in zip(tokens, labels, masks, strict=True)
    )
    contents = map(_bytes, pairs)
    if others is None:
        return _digests(contents)
    return _digests(a + _bytes(b) for a, b in zip(contents, others, strict=True))


def _entry(value: Any) -> bytes:
    """Return the content of a row's entry in one column."""
    if isinstance(value, Tensor):
        return _bytes(value.detach().cpu())
    return repr(map_tensors(Tensor.tolist, value)).encode()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _digests(contents: Iterable[bytes]) -> Tensor:
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
