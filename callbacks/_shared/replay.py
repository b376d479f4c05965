"""Training forwards whose checkpointed layers give what they gave in the scoring forward.

An autograd function stands in for the checkpointing function of transformers' layers. Its forward
returns the held output; its backward recomputes the layer, as checkpointing does. The layer's
parameters are inputs of the function: gradients reach them through the graph of the training
forward, where DDP looks for parameters that are not used and counts how often each is ready.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onlinesel._base.host import to_host
from onlinesel.callbacks._shared.wrapping import overridden

__all__ = ["HELD", "SCORER", "Audit", "HeldRows", "Replay", "check_limit", "refuse"]

HELD = "onlinesel_held"
"""Batch key of the :class:`HeldRows` of a micro-batch that trains."""

SCORER = (
    "Leave one of the two out: only the default scorer is known to forward each batch as in "
    "training."
)
_OTHERWISE = "Forward each micro-batch once, with the model in training mode."

_WIDE, _NARROW = 5e-3, 5e-2
"""What a token may move when its layer is computed again among other rows, in float32 (TF32 is
below) and in 16 bits."""


class Audit:
    """How far recomputed layers are from what was held, and what that may be.

    A token counts as much as another, however large its states are: single tokens and channels of
    language models are so large that one norm over all would show nothing else. Nothing waits for
    the device until :meth:`check`.

    Attributes:
        at_once: Whether each layer is checked when it is recomputed, and not at the step's end.
    """

    def __init__(self) -> None:
        self.at_once = True
        self._compared = False
        self._worst: dict[tuple[str, float], Tensor] = {}

    def compare(
        self, layer: str, before: Tensor, now: Tensor, known: Tensor, dtype: torch.dtype
    ) -> None:
        """Compare one call of a layer.

        Args:
            layer: Its name in the error.
            before: ``(n, T, d)`` what was held.
            now: ``(n, T, d)`` what it gives.
            known: ``(n, T)`` bool, the tokens that count.
            dtype: In which the layer multiplies.
        """
        apart = torch.linalg.vector_norm(before.float() - now.float(), dim=2)
        size = torch.linalg.vector_norm(before.float(), dim=2).clamp(min=1e-20)
        error = torch.where(known, apart / size, 0.0).sum() / known.sum().clamp(min=1)
        wide = dtype in (torch.float32, torch.float64)
        key = layer, _WIDE if wide else _NARROW
        error = error.to(self._worst[key].device) if key in self._worst else error
        self._worst[key] = torch.maximum(self._worst.get(key, error), error)
        self._compared = True
        if self.at_once:
            self.check()

    def finish(self) -> None:
        """End a step: from the second on one look at its end is enough."""
        self.check()
        self.at_once = not self._compared

    def check(self) -> None:
        """Stop where a layer gave its rows something else.

        Raises:
            ValueError: The gradient was not that of the step.
        """
        worst, self._worst = self._worst, {}
        errors = to_host(list(worst.values()))
        for (layer, allowed), error in zip(worst, errors, strict=True):
            if float(error) > allowed:
                refuse(
                    "layers", "such that the rows that train come out as among all candidates",
                    f"tokens of {layer} that are {float(error):.1%} apart",
                    "The layer depends on the rest of the batch, on chance or on what changes "
                    "between scoring and training, or positions follow the padding. Pad on the "
                    "right, or set it to False.",
                )  # fmt: skip


@dataclass
class HeldRows:
    """What the scoring forward left for the rows of one micro-batch that trains.

    Attributes:
        layers: The checkpointed layers in the order of their calls.
        values: Output of each call, ``(n, T, d)``, 0 where nothing is held; None for no row.
        known: ``(n, T)`` bool, tokens of which the outputs are held and that are no padding.
        fresh: ``(f,)`` int64 rows of which nothing is held.
        audit: Is told how far recomputed layers are from what was held.
    """

    layers: list[nn.Module]
    values: list[Tensor | None]
    known: Tensor
    fresh: Tensor
    audit: Audit


def refuse(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the designed error of reused forwards, whatever the host is."""
    raise ValueError(f"reuse_forward: {argument} must be {rule}, got {got}. {remedy}")


def check_limit(wanted: bool, limit: float | None) -> None:
    """Refuse a bound that bounds nothing."""
    if limit is not None and not (wanted and limit > 0):
        refuse(
            "reuse_limit", "positive, and None without it", repr(limit),
            "It bounds the GiB of layer outputs that are held.",
        )  # fmt: skip


class Replay:
    """Let one training forward take the outputs of its layers from what is held.

    Args:
        held: Of the rows of the forward; None forwards as ever.

    Raises:
        ValueError: The layers are called otherwise than when they were scored.
    """

    def __init__(self, held: HeldRows | None) -> None:
        self._held, self._count = held, 0
        self._overridden = ExitStack()

    def __enter__(self) -> Replay:
        layers = [] if self._held is None else self._held.layers
        for layer in dict.fromkeys(layers):
            function = {"_gradient_checkpointing_func": partial(self._call, layer)}
            self._overridden.enter_context(overridden(layer, function))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        layers = [] if self._held is None else self._held.layers
        self.cancel()
        if kind is None and self._count not in (0, len(layers)):  # 0: the batch was skipped
            refuse(
                "checkpointed layers",
                f"called as often as in the scoring forward ({len(layers)} times)",
                self._count, _OTHERWISE,
            )  # fmt: skip

    def cancel(self) -> None:
        """Give the layers back, whatever was forwarded."""
        self._overridden.close()
        self._held = None

    def _call(self, layer: nn.Module, function: partial[Tensor], *args: Any) -> Tensor:
        """Stand in for ``checkpoint(function, *args)``."""
        held, count = self._held, self._count
        assert held is not None
        if count >= len(held.layers) or held.layers[count] is not layer:
            refuse(
                "checkpointed layers", "called in the order of the scoring forward",
                f"{type(layer).__name__} as number {count + 1} of {len(held.layers)}", _OTHERWISE,
            )  # fmt: skip
        for name, value in function.keywords.items():
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
                refuse(
                    "checkpointed layers", "given what needs gradients by position",
                    f"the keyword {name}", "Set it to False for this model.",
                )  # fmt: skip
        self._count += 1
        value, held.values[count] = held.values[count], None  # the graph keeps it from here on
        call = _Call(layer, function, value, held)
        return _Recomputed.apply(call, len(args), *args, *call.parameters())


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
        narrow = torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device) if narrow else None
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
        self._fresh = self._fresh.to(value.device)  # layers may lie on several devices
        if self._fresh.numel():
            value.index_copy_(0, self._fresh, self._fresh_rows(args).to(value.dtype))
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

    def compare(self, output: Tensor) -> None:
        """Tell the audit what the layer gives now; what it gave is the next layer's input."""
        value, self._value = self._value, None
        if value is not None:
            self._audit.compare(
                type(self.layer).__name__, value, output.detach(), self._known.to(value.device),
                self._dtype or value.dtype,
            )  # fmt: skip


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
        ctx.call.compare(output)
        inputs = [*args, *ctx.call.parameters()]
        wanted = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.requires_grad]
        found = torch.autograd.grad(
            output, [inputs[i] for i in wanted], gradient, allow_unused=True
        )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, found, strict=True):
            gradients[i] = value
        return None, None, *gradients
