"""Training forwards whose checkpointed layers give what they gave in the scoring forward.

An autograd function stands in for the checkpointing function of transformers' layers. Its forward
returns the held output; its backward recomputes the layer, as checkpointing does. The layer's
parameters are inputs of the function: gradients reach them through the graph of the training
forward, where DDP looks for parameters that are not used and counts how often each is ready.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onlinesel.callbacks._attach import overridden

__all__ = ["HeldRows", "replaying"]

_TOLERANCE = 5e-3  # of a recomputed layer in float32; TF32 and other shapes of a product stay below


@dataclass
class HeldRows:
    """What the scoring forward left for the rows of one micro-batch that trains.

    Attributes:
        layers: The checkpointed layers in the order of their calls.
        values: Output of each call, ``(n, T, d)``, 0 where nothing is held; None for no row.
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
        call = _Call(layer, function, value, held)
        return _Recomputed.apply(call, len(args), *args, *call.parameters())

    def finish(self) -> None:
        if self._count != len(self._held.layers):
            _refuse(
                f"called as often as in the scoring forward ({len(self._held.layers)} times)",
                self._count,
            )


class _Call:
    """One call of a layer: what it gives, and how it is computed.

    Args:
        layer: The layer.
        function: Its forward on positional arguments, of which the first is the hidden states.
        value: ``(n, T, d)`` held output, whose fresh rows are filled in; None where all are fresh.
        held: Whose call it is.
    """

    def __init__(
        self, layer: nn.Module, function: partial[Tensor], value: Tensor | None, held: HeldRows
    ) -> None:
        self.layer, self.function = layer, function
        device = held.known.device.type
        self.autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled(),
        )  # fmt: skip
        self._value = value
        self._fresh, self._known, self._audit = held.fresh, held.known, held.audit

    def parameters(self) -> list[nn.Parameter]:
        """Return those that train; under FSDP2 they are whole in forward and backward only."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def forward(self, args: tuple[Any, ...]) -> Tensor:
        """Return the layer's output, computing the fresh rows only."""
        value = self._value
        if value is None:
            return self.function(*args)
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
        value, self._value = self._value, None
        if value is None:
            return
        known = self._known
        before, now = value[known].float(), output.detach()[known].float()
        error = float((before - now).norm() / before.norm())
        allowed = _TOLERANCE if value.dtype in (torch.float32, torch.float64) else 10 * _TOLERANCE
        if error > allowed:
            raise ValueError(
                "OnlineSelection: layers must give the rows that train what they gave them among "
                f"all candidates with reuse_forward, got outputs of {type(self.layer).__name__} "
                f"that are {error:.1%} apart. The layer depends on the rest of the batch or on "
                "chance: set reuse_forward=False."
            )


class _Recomputed(torch.autograd.Function):
    """Give what is held; recompute it for the gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *inputs: Any) -> Tensor:
        args = inputs[:count]
        ctx.call = call
        ctx.tensors = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.args = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))
        return call.forward(args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        args = list(ctx.args)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor.detach().requires_grad_(tensor.requires_grad)
        with torch.enable_grad(), ctx.call.autocast():
            output = ctx.call.function(*args)
        ctx.call.check(output)
        inputs = [*args, *ctx.call.parameters()]
        wanted = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.requires_grad]
        found = torch.autograd.grad(
            output, [inputs[i] for i in wanted], gradient, allow_unused=True
        )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, found, strict=True):
            gradients[i] = value
        return None, None, *gradients


def _refuse(rule: str, got: object) -> None:
    raise ValueError(
        f"OnlineSelection: checkpointed layers must be {rule} with reuse_forward, got {got}. "
        "Set reuse_forward=False for this model."
    )
