"""A measured check that nothing as large as the logits is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Record the largest tensor that any operation allocates; views of its inputs are free."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.where = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            # A tensor on the meta device is a form without memory.
            held = isinstance(leaf, Tensor) and not leaf.is_meta
            if held and storage(leaf) not in given and leaf.numel() > self.numel:
                self.numel, self.where = leaf.numel(), f"{func} -> {tuple(leaf.shape)}"
        return out


class PeakBytes(TorchDispatchMode):
    """Follow the bytes that operations hold at a time, without those of tensors given.

    Args:
        given: Inputs and weights.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.peak, self.where = 0, ""
        self.shapes: set[tuple[int, ...]] = set()
        self._given = {storage(tensor) for tensor in given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta and storage(leaf) not in self._given:
                if storage(leaf) not in self._live:
                    self.shapes.add(tuple(leaf.shape))
                held = leaf.untyped_storage()
                self._live[held._cdata] = StorageWeakRef(held), held.nbytes()
        now = sum(size for _, size in self._live.values())
        if now > self.peak:
            self.peak, self.where = now, str(func)
        return out


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def assert_no_logits(run: Callable[[], object], batch: int, time: int, vocab: int) -> None:
    """Fail if ``run`` allocates a tensor with as many elements as (batch, time, vocab) logits."""
    with LargestTensor() as seen:
        run()
    assert seen.numel > 0, "nothing was allocated, so nothing was measured"
    assert seen.numel < batch * time * vocab, f"as large as the logits: {seen.where}"


def naive_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden, weight)
