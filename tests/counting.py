"""Counts what code does instead of timing it: a loaded machine counts the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ONCE = 2
"""Steps at the start, one of each turn, that ask the model and the trainer and are not counted."""


class Operations(TorchDispatchMode):
    """Counts collectives, operations on tensors, and the elements of each one's largest tensor."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.seen["collectives"] += 1
            return result
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not aliases or any(alias is None or alias.is_write for alias in aliases):  # no view
            leaves = tree_leaves((args, kwargs, result))
            sizes = [leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.seen.update(operations=1, elements=max(sizes, default=0))
        return result


class Work:
    """Counts what functions of ours do, less what these call of the trainer's.

    Steps take turns: one counts calls of functions, of Python and of C, and the next operations on
    tensors and collectives, because counting those calls Python.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._operations = Operations(self._seen)
        self._begun, self._side = 0, "theirs"

    def step(self) -> None:
        """Begin a step."""
        if self._begun == ONCE:
            self._seen.clear()
        self._begun += 1

    def each(self) -> dict[str, float]:
        """Return what a step did: ``calls``, ``operations``, ``elements`` and ``collectives``."""
        steps = self._begun - ONCE
        assert steps > 0 and steps % 2 == 0, "both turns must have come equally often"
        names = ("calls", "operations", "elements", "collectives")
        return {name: 2 * self._seen[name] / steps for name in names}

    def ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to count in it."""
        return self._on("ours", function)

    def theirs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to count nothing in it, whoever calls it."""
        return self._on("theirs", function)

    def _on(self, side: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._side
            self._go(side)
            try:
                return function(*args, **kwargs)
            finally:
                self._go(before)

        return call

    def _go(self, side: str) -> None:
        if side == self._side:
            return
        self._side = side
        if self._begun % 2:
            sys.setprofile(self._called if side == "ours" else None)
        elif side == "ours":
            self._operations.__enter__()
        else:
            self._operations.__exit__(None, None, None)

    def _called(self, frame: Any, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            self._seen["calls"] += 1
