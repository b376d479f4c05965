"""What ranks must have alike before rows move between them, and rows that are no tensors as bytes.

Nothing here talks to other ranks; :mod:`onlinesel.parallel.distributed` does, with what it gets
from here.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onlinesel.data.batch import SINGLE, has_rows
from onlinesel.data.columns import map_tensors
from onlinesel.data.padding import (
    IGNORED_LABEL,
    TokenAxes,
    are_labels,
    filled,
    fills,
    is_array,
    left_padded,
    refuse_sizes,
    token_axes,
)

__all__ = [
    "Sizes",
    "arrived_rows",
    "objects_in",
    "packed_bytes",
    "pickled_rows",
    "structure",
    "widened",
]

Batch = Mapping[str, Any]


def _sized(batch: Batch) -> dict[str, Any]:
    return {n: v for n, v in sorted(batch.items()) if has_rows(v) and hasattr(v, "shape")}


def objects_in(batch: Batch) -> list[str]:
    """Return the names of the columns of rows that are no tensors."""
    return [n for n, v in sorted(batch.items()) if has_rows(v) and not isinstance(v, Tensor)]


def structure(batch: Batch) -> dict[str, Any]:
    """Return what each column is but for its sizes, and the value of what has no rows."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.dim():
            return value.item()
        if is_array(value):
            return f"array of {value.dtype.kind}", value.ndim  # strings may be longer elsewhere
        if isinstance(value, Tensor):
            return str(value.dtype), value.ndim
        return str(value)[:80] if isinstance(value, SINGLE) else type(value).__name__

    return {name: kind(value) for name, value in sorted(batch.items())}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one rank's rows, and which of them follow the width of its tokens.

    Attributes:
        rows: The rows, joined.
        batches: What they come from.
        axes: Which columns of these have a token dimension.
        pad_id: Token that fills ``input_ids``.
    """

    rows: dict[str, Any]
    batches: Sequence[Batch]
    axes: TokenAxes
    pad_id: int

    @classmethod
    def of(cls, rows: dict[str, Any], batches: Sequence[Batch], pad_id: int) -> Sizes:
        """Look at rows and the batches that they come from."""
        return cls(rows, batches, token_axes(batches), pad_id)

    def follows(self, name: str) -> bool:
        """Return whether a column is as wide as the tokens in these rows."""
        if name not in self.axes.columns:
            return False
        prefix, dims = self.axes.columns[name]
        width = self.axes.widths(self.rows)[prefix]
        return all(self.rows[name].shape[d] == width for d in dims)

    def apart_from_width(self) -> dict[str, Any]:
        """Return the sizes that must be the same on all ranks, where widths are one number."""
        found: dict[str, Any] = {}
        for name, value in _sized(self.rows).items():
            prefix, dims = self.axes.columns[name] if self.follows(name) else (None, ())
            found[name] = prefix, [s for d, s in enumerate(value.shape) if d and d not in dims]
        return found

    def width(self) -> int | None:
        """Return the one width of the rows' tokens, 0 without any, None where there are several."""
        widths = list(self.axes.widths(self.rows).values())
        return None if len(widths) > 1 else sum(widths)

    def numbers(self) -> list[int]:
        """Return sizes whose largest over all ranks tell :meth:`targets` what they need."""
        found: list[int] = []
        for name, value in _sized(self.rows).items():
            found.append(int(not self.follows(name)))
            found += [number for size in value.shape[1:] for number in (size, -size)]
        return found

    def targets(self, largest: Sequence[int]) -> dict[str, int]:
        """Return to what sizes columns are filled up, from the largest numbers of all ranks.

        Raises:
            ValueError: Sizes differ and do not follow the tokens; on every rank alike.
        """
        left, targets = iter(largest), {}
        for name, value in _sized(self.rows).items():
            follows = not next(left)
            pairs = [(next(left), -next(left)) for _ in value.shape[1:]]
            differ = {d for d, (most, least) in enumerate(pairs, start=1) if most != least}
            if not differ:
                continue
            dims = self.axes.columns[name][1] if follows else (1,)
            if not differ <= set(dims) or not (follows or are_labels(name, value)):
                refuse_sizes("exchange_rows", name, [tuple(p) for p in zip(*pairs, strict=True)])
            targets[name] = pairs[dims[0] - 1][0]
        return targets


def widened(sizes: Sizes, targets: Mapping[str, int]) -> dict[str, Any]:
    """Return the rows with columns filled up to sizes.

    Args:
        sizes: Has the rows.
        targets: New size of the token dimensions of each column that needs one.
    """
    rows, axes = dict(sizes.rows), sizes.axes
    if not any(rows[name].shape[-1 if len(_dims(axes, name)) > 1 else 1] < size
               for name, size in targets.items()):  # fmt: skip
        return rows
    found = fills(sizes.batches, axes, sizes.pad_id)
    for name, size in targets.items():
        follows = sizes.follows(name)
        prefix = axes.columns[name][0] if follows else ""
        left = follows and any(left_padded(batch, prefix) for batch in sizes.batches)
        fill = found[name] if follows else IGNORED_LABEL
        rows[name] = filled(rows[name], _dims(axes, name), size, fill=fill, left=left)
    return rows


def _dims(axes: TokenAxes, name: str) -> tuple[int, ...]:
    return axes.columns[name][1] if name in axes.columns else (1,)


def pickled_rows(rows: Batch) -> list[bytes]:
    """Return what each row has besides tensors."""
    names = objects_in(rows)
    if not names:
        return []
    parts = {n: [v[i : i + 1] for i in range(len(v))] for n, v in rows.items() if n in names}
    rest = ([map_tensors(Tensor.cpu, parts[n][i]) for n in names]
            for i in range(len(parts[names[0]])))  # fmt: skip
    return [pickle.dumps(row) for row in rest]


def _device_of(batch: Batch) -> torch.device:
    found = (v.device for v in batch.values() if isinstance(v, Tensor) and v.dim())
    return next(found, torch.device("cpu"))


def packed_bytes(rows: Sequence[bytes], longest: int) -> Tensor:
    """Lay bytes of different lengths below each other: ``(n, 8 + longest)`` uint8."""
    whole = torch.zeros(len(rows), 8 + longest, dtype=torch.uint8)
    for row, content in zip(whole, rows, strict=True):
        row[:8] = torch.tensor([len(content)]).view(torch.uint8)
        row[8 : 8 + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return whole


def arrived_rows(
    tensors: Mapping[str, Tensor], packed: Tensor | None, like: Batch
) -> dict[str, Any]:
    """Return the batch of the rows that arrived.

    Args:
        tensors: Their columns.
        packed: What :func:`packed_bytes` made of the rest of them.
        like: A batch of this rank; gives devices, and what belongs to whole batches.
    """
    batch = {n: tensors[n].to(v.device) if n in tensors else v for n, v in like.items()}
    if packed is None:
        return batch
    to_device = partial(Tensor.to, device=_device_of(like))
    heads = packed[:, :8].clone(memory_format=torch.contiguous_format)
    sizes = heads.view(torch.int64).flatten().tolist()
    rows = [pickle.loads(bytes(row[8 : 8 + size].tolist()))
            for row, size in zip(packed, sizes, strict=True)]  # fmt: skip
    for name, parts in zip(objects_in(like), zip(*rows, strict=True), strict=True):
        if is_array(like[name]):
            batch[name] = sys.modules["numpy"].concatenate(parts)
        else:
            entries = (entry for part in parts for entry in part)
            back = [map_tensors(to_device, entry) for entry in entries]
            batch[name] = back if isinstance(like[name], list) else tuple(back)
    return batch
