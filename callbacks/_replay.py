"""Training forwards whose checkpointed layers give what they gave in the scoring forward.

A reentrant autograd function stands in for the checkpointing function of transformers' layers. Its
forward returns the held output; its backward recomputes the layer, as checkpointing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel.callbacks._attach import overridden

__all__ = ["HeldRows", "replaying"]

_TOLERANCE = 5e-3  # of a recomputed layer in float32; TF32 and other shapes of a product stay below


@dataclass
class HeldRows:
    """What the scoring forward left for the rows of one micro-batch that trains.

    Attributes:
        layers: The checkpointed layers in the order of their calls.
        values: Output of each call, ``(n, T, d)``, 0 where nothing is held.
        known: ``(n, T)`` bool, tokens of which the outputs are held and that are no padding.
        fresh: ``(f,)`` int64 rows of which nothing is held.
        audit: Whether the backward compares what it recomputes with what was held.
    """

    layers: list[nn.Module]
    values: list[Tensor | None]
    known: Tensor
    fresh: Tensor
    audit: bool


@contextmanager
def replaying(held: HeldRows | None) -> Iterator[None]:
    """Let one training forward take the outputs of its layers from what is held.

    Args:
        held: Of its rows; None forwards as ever.

    Raises:
        ValueError: The layers are called otherwise than when they were scored.
    """
    if held is None:
        yield
        return
    calls = _Calls(held)
    with ExitStack() as stack:
        for layer in dict.fromkeys(held.layers):
            function = {"_gradient_checkpointing_func": partial(calls, layer)}
            stack.enter_context(overridden(layer, function))
        yield
    calls.finish()


class _Calls:
    """The calls of the checkpointed layers in one training forward."""

    def __init__(self, held: HeldRows) -> None:
        self._held, self._count = held, 0

    def __call__(self, layer: nn.Module, function: partial[Tensor], *args: Any) -> Tensor:
        """Stand in for ``checkpoint(function, *args)``."""
        held, count = self._held, self._count
        if count >= len(held.layers) or held.layers[count] is not layer:
            _refuse("called in the order of the scoring forward", f"{type(layer).__name__} {count}")
        for name, value in function.keywords.items():
            if isinstance(value, Tensor) and value.requires_grad:
                _refuse("given what needs gradients by position", f"the keyword {name}")
        self._count += 1
        value, held.values[count] = held.values[count], None  # the graph keeps it from here on
        assert value is not None
        call = _Call(function, value, held, _ambient_autocast(value.device.type))
        # Without it a frozen layer on inputs without gradient would leave no graph.
        anchor = torch.empty(0, device=value.device, requires_grad=True)
        return _Recomputed.apply(anchor, call, *args)

    def finish(self) -> None:
        if self._count != len(self._held.layers):
            _refuse(
                f"called as often as in the scoring forward ({len(self._held.layers)} times)",
                self._count,
            )


class _Call:
    """One call of a layer: what it gives, and how it is computed.

    Args:
        function: The layer on positional arguments, of which the first is the hidden states.
        value: ``(n, T, d)`` held output; the fresh rows are filled in.
        held: Whose call it is.
        autocast: Makes the autocast context of the forward.
    """

    def __init__(
        self,
        function: partial[Tensor],
        value: Tensor,
        held: HeldRows,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.function, self.autocast = function, autocast
        self._value: Tensor | None = value
        self._fresh, self._known = held.fresh, held.known
        self._audit = held.audit

    def forward(self, args: tuple[Any, ...]) -> Tensor:
        """Return the layer's output, computing the fresh rows only."""
        value = self._value
        assert value is not None
        if self._fresh.numel():
            value.index_copy_(0, self._fresh, self._fresh_rows(args).to(value.dtype))
        if not self._audit:
            self._value = None
        return value.detach()

    def _fresh_rows(self, args: tuple[Any, ...]) -> Tensor:
        rows, width = args[0].shape[:2]
        if rows == width:  # a dimension does not tell by its size what it counts
            return self.function(*args).index_select(0, self._fresh)
        keywords = {k: self._taken(v, rows) for k, v in self.function.keywords.items()}
        taken = (self._taken(value, rows) for value in args)
        return self.function.func(*self.function.args, *taken, **keywords)

    def _taken(self, value: Any, rows: int) -> Any:
        """Take the fresh rows of everything that has one entry a row."""
        if isinstance(value, tuple):
            return tuple(self._taken(part, rows) for part in value)
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
            return value.index_select(0, self._fresh)
        return value

    def check(self, output: Tensor) -> None:
        """Refuse a layer that gives its rows another output than among all candidates."""
        if not self._audit:
            return
        value, self._value = self._value, None
        assert value is not None
        known = self._known
        before, now = value[known].float(), output.detach()[known].float()
        error = float((before - now).norm() / before.norm())
        allowed = _TOLERANCE if value.dtype in (torch.float32, torch.float64) else 10 * _TOLERANCE
        if error > allowed:
            layer = self.function.args[0] if self.function.args else self.function.func
            raise ValueError(
                "OnlineSelection: layers must give the rows that train what they gave them among "
                f"all candidates with reuse_forward, got outputs of {type(layer).__name__} that "
                f"are {error:.1%} apart. The layer depends on the rest of the batch or on chance: "
                "set reuse_forward=False."
            )


class _Recomputed(torch.autograd.Function):
    """Give what is held; recompute it for the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *args: Any) -> Tensor:
        ctx.call = call
        ctx.tensors = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.args = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))
        return call.forward(args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        args = list(ctx.args)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor.detach().requires_grad_(tensor.requires_grad)
        with torch.enable_grad(), ctx.call.autocast():
            output = ctx.call.function(*args)
        ctx.call.check(output)
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        return None, None, *(a.grad if isinstance(a, Tensor) else None for a in args)


def _ambient_autocast(device: str) -> Callable[[], AbstractContextManager[None]]:
    return partial(
        torch.autocast,
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        torch.is_autocast_cache_enabled(),
    )


def _refuse(rule: str, got: object) -> None:
    raise ValueError(
        f"OnlineSelection: checkpointed layers must be {rule} with reuse_forward, got {got}. "
        "Set reuse_forward=False for this model."
    )
