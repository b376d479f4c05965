"""A device that is not there, which tells where a host would wait for it.

Its tensors lie in the memory of the host but name a device of their own. Code therefore takes the
paths that it takes on an accelerator, reading a value or copying it is an operation that can be
seen, and a tensor of the host among those of the device is an error, as it is on CUDA. Which
operations make the host wait follows what CUDA's do in PyTorch: those whose result has a size that
depends on values, those that give a Python number, and copies, unless they go from pinned memory to
the device with ``non_blocking``.

A process that has registered the device keeps it, and libraries may find it there: use a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["SIMULATED", "SimulatedTensor", "simulation", "told"]

SIMULATED = "simulated"
"""Type of the device."""

_ATEN = torch.ops.aten

# Each copies a count, a flag or a value to the host and waits for it: aten/src/ATen/native/cuda has
# Nonzero.cu, IndexKernel.cpp (masked_select), Unique.cu and UniqueCub.cu, Equal.cpp,
# SummaryOps.cu (bincount) and CUDAScalar.cu; Repeat.cpp reads the last of the running sums,
# TensorCompare.cpp the result of allclose, and BatchLinearAlgebra.cpp the flags of a factorisation
# that is to raise.
_WAITING = {
    _ATEN._local_scalar_dense: "item",
    _ATEN.nonzero: "nonzero",
    _ATEN.masked_select: "masked_select",
    _ATEN._unique2: "unique",
    _ATEN.unique_dim: "unique",
    _ATEN.unique_consecutive: "unique",
    _ATEN.equal: "equal",
    _ATEN.allclose: "equal",
    _ATEN.bincount: "bincount",
    _ATEN._linalg_check_errors: "linalg check",
}
_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._unsafe_index)
_COPYING = (_ATEN._to_copy, _ATEN.copy_, _ATEN._copy_from, *_INDEXING)


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device.

    Attributes:
        content: What it holds, a tensor of the host.
        number: Whether it was made from a Python number, which CUDA passes to a kernel by value.
    """

    content: Tensor
    number = False

    @staticmethod
    def __new__(cls, content: Tensor) -> SimulatedTensor:
        """Mark a tensor."""
        made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, layout=content.layout, device=torch.device(SIMULATED, 0),
        )  # fmt: skip
        made.content = content
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values, as torch does after a copy to the host."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape, not the values, which would be a read."""
        return f"SimulatedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


class _Simulation(TorchDispatchMode):
    """Make tensors of the device where they are asked for by its name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_ears: list[Callable[[str], None]] = []


@contextmanager
def told(ear: Callable[[str], None]) -> Iterator[None]:
    """Call ``ear`` with the kind of each wait, within the operation that waits."""
    _ears.append(ear)
    try:
        yield
    finally:
        _ears.remove(ear)


@contextmanager
def simulation() -> Iterator[torch.device]:
    """Make the device usable, and return it; for a process of its own.

    Raises:
        ImportError: torch cannot take a device that is written in Python.
    """
    _register()
    with _Simulation():
        yield torch.device(SIMULATED, 0)


@cache
def _register() -> torch.library.Library:
    """Tell torch of the device; returns what keeps its operations alive."""
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        raise ImportError(
            "simulation: torch must take devices written in Python, got "
            f"{torch.__version__}. Use torch >= 2.11, or count on CUDA."
        )

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    setup(SIMULATED, backend_module=Module())
    library = torch.library.Library("aten", "IMPL")
    # torch.tensor(..., device=...) looks past modes.
    for name in ("empty_strided", "empty.memory_format", "copy_", "_copy_from"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(_ATEN, packet), overload or "default")
        library.impl(name, _kernel(func), "PrivateUse1")
    return library


def _kernel(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, mark what it gives, and tell of waits."""
    packet = func.overloadpacket
    if packet is _ATEN.is_pinned:
        return getattr(args[0], "pinned", False)
    if packet is _ATEN._pin_memory:
        return _pinned(args[0].clone())
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = any(isinstance(x, SimulatedTensor) for x in tensors)
    if here and packet not in _COPYING:
        _check_together(func, tensors)
    reason = _reason(packet, args, kwargs, here)
    if reason is not None:
        for ear in list(_ears):
            ear(reason)
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == SIMULATED
        inner_kwargs["device"] = torch.device("cpu")
        if packet is _ATEN._to_copy:  # to the device of the host it stays where it is, uncopied
            inner_kwargs["non_blocking"] = False
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    out = func(*inner_args, **inner_kwargs)
    if packet is _ATEN._local_scalar_dense:
        return out
    given = _written(func, args, kwargs)
    if given is not None:
        return given
    made = tree_map(lambda x: SimulatedTensor(x) if here and type(x) is Tensor else x, out)
    if packet is _ATEN.scalar_tensor and isinstance(made, SimulatedTensor):
        made.number = True
    return made


def _inner(value: Any) -> Any:
    return value.content if isinstance(value, SimulatedTensor) else value


def _pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


def _check_together(func: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of the host, but for those of one number, beside tensors of the device."""
    if any(type(x) is Tensor and x.dim() for x in tensors):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two, "
            f"{SIMULATED} and cpu."
        )


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the argument that an operation writes into and gives back, None if there is none."""
    returned = [r.alias_info for r in func._schema.returns]
    if not returned or not all(alias is not None and alias.is_write for alias in returned):
        return None
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, SimulatedTensor) and value.shape != value.content.shape:
                raise NotImplementedError(f"{func} resizes a tensor of the simulated device.")
            found.append(value)
    return found[0] if len(returned) == 1 else tuple(found)


def _reason(packet: Any, args: Any, kwargs: dict[str, Any], here: bool) -> str | None:
    """Return the kind of wait that an operation is on CUDA, None if the host goes on."""
    if packet is _ATEN._to_copy:
        if kwargs.get("device") is None:
            return None
        target = torch.device(kwargs["device"]).type
        return _copy_reason(args[0], here, target == SIMULATED, bool(kwargs.get("non_blocking")))
    if packet in (_ATEN.copy_, _ATEN._copy_from):
        target, source = args[:2] if packet is _ATEN.copy_ else args[1::-1]
        rest = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        to = isinstance(target, SimulatedTensor)
        return _copy_reason(source, isinstance(source, SimulatedTensor), to, bool(rest))
    if not here:
        return None
    if packet is _ATEN.repeat_interleave:
        return None if kwargs.get("output_size") is not None else "repeat_interleave"
    if packet in _INDEXING:
        return _index_reason(packet, args)
    return _WAITING.get(packet)


def _copy_reason(source: Tensor, here: bool, there: bool, non_blocking: bool) -> str | None:
    if here == there or not source.numel():
        return None
    if here:  # into pinned memory of torch's own, if it is not to wait
        return None if non_blocking else "copy to the host"
    return None if non_blocking and getattr(source, "pinned", False) else "copy to the device"


def _index_reason(packet: Any, args: Any) -> str | None:
    if not isinstance(args[0], SimulatedTensor):
        return None
    indices = [x for x in args[1] if x is not None]
    if any(not isinstance(x, SimulatedTensor) for x in indices):
        return "copy to the device"
    masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
    if masks and packet in (_ATEN.index_put, _ATEN.index_put_) and len(indices) == 1:
        if getattr(args[2], "number", False):  # a number is filled in without a list of places
            return None
    return "index by a mask" if masks else None
