"""Parameters of which a rank holds a part: ZeRO-3's flat pieces and FSDP2's rows.

No framework is imported: DeepSpeed marks its parameters with attributes, and a DTensor is known by
its methods. Everything here that communicates is a collective: all ranks call it at the same point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["LocalRows", "gathered", "held", "is_sharded", "local_rows", "shared_out", "whole"]


class LocalRows(NamedTuple):
    """The rows of a matrix or vector that this rank holds.

    Attributes:
        values: ``(n, ...)``; n may be 0.
        first: Number of the first of them.
        group: The ranks that hold the others, None if there are no others.
    """

    values: Tensor
    first: int
    group: Any

    def total(self, part: Tensor) -> Tensor:
        """Sum what each rank computed from its own rows."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Gather a DTensor; return any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_rows(tensor: Any) -> LocalRows:
    """Return the rows that this rank holds; all of them where the tensor is not cut by rows.

    A tensor that is cut in another way, or along several dimensions of the mesh, is gathered.
    """
    if not is_sharded(tensor):
        return LocalRows(tensor, 0, None)
    cut = [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    # The name, because a strided shard (tensor parallel on top) deals its rows out in another way.
    if len(cut) != 1 or type(tensor.placements[cut[0]]).__name__ != "Shard":
        return LocalRows(whole(tensor), 0, None)
    mesh, dim = tensor.device_mesh, cut[0]
    if tensor.placements[dim].dim != 0:
        return LocalRows(whole(tensor), 0, None)
    values, rows, ranks = tensor.to_local(), tensor.shape[0], mesh.size(dim)
    chunk = -(-rows // ranks)  # as torch.chunk cuts: the last ranks may hold less, or nothing
    first = min(mesh.get_local_rank(dim) * chunk, rows)
    assert values.shape[0] == min(chunk, rows - first), "rows are not cut as torch.chunk does"
    return LocalRows(values, first, mesh.get_group(dim))


def shared_out(module: nn.Module) -> bool:
    """Return whether a module's parameters are, at times, spread over ranks."""
    return any(is_sharded(p) or hasattr(p, "ds_id") for p in module.parameters())


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Hold a module's ZeRO-3 parameters whole for a while; nothing happens to other parameters."""
    return held(*module.parameters())


@contextmanager
def held(*tensors: Any) -> Iterator[None]:
    """Hold those of some tensors that are ZeRO-3 parameters, and taken apart, whole for a while."""
    # By identity, because DeepSpeed does not take a tied parameter twice.
    states = ((p, getattr(p, "ds_status", None)) for p in {id(p): p for p in tensors}.values())
    apart: list[Any] = [p for p, state in states if getattr(state, "name", "") == "NOT_AVAILABLE"]
    if apart:
        apart[0].all_gather(param_list=apart)
    try:
        yield
    finally:
        if apart:
            apart[0].partition(param_list=apart)
