"""Seconds, memory and counted products of a call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onlinesel.bench._settings import clock

__all__ = ["CountedProducts", "Peak", "in_fresh_process", "release", "take_turns", "timed"]

Call = Callable[[], Any]

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_PATIENCE = {"cpu": 60.0, "cuda": 4.0}  # seconds for all timed runs of one call
_CUDA_WARM_UP = 2  # turns


def timed(call: Call, device: torch.device) -> float:
    """Return the seconds of a call: between two events on a GPU, else of :func:`clock`."""
    if device.type != "cuda":
        began = clock()
        call()
        return clock() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device,
    failed: Callable[[str, Exception], None],
) -> dict[str, list[float]]:
    """Time calls in turns, so that what else the machine does falls on all of them.

    A call that would take longer for its runs than a minute, on a GPU than four seconds, takes
    fewer, but at least one.

    Args:
        calls: What is timed, by name. Each has run once before.
        repeats: Timed runs of each; on a GPU some come before them, in which clocks rise.
        device: Where the work is done.
        failed: Told the name and the error of a call that raises, which is then left out.

    Returns:
        The seconds of every run.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    wanted = dict.fromkeys(calls, repeats)
    patience = _PATIENCE.get(device.type, 60.0)
    warm_up = _CUDA_WARM_UP if device.type == "cuda" else 0
    slow: set[str] = set()
    for turn in range(-warm_up, repeats):
        for name, call in calls.items():
            if len(found[name]) >= wanted[name] or (turn < 0 and name in slow):
                continue
            try:
                seconds = timed(call, device)
            except Exception as error:
                failed(name, error)
                wanted[name] = 0
                continue
            if turn >= 0:
                found[name].append(seconds)
            elif seconds > 0.5:
                slow.add(name)  # one turn warms it up
            wanted[name] = max(1, min(repeats, int(patience / max(seconds, 1e-9))))
    return {name: seconds for name, seconds in found.items() if wanted[name]}


def release(device: torch.device) -> None:
    """Give memory that nothing uses back to the device, or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        _libc("malloc_trim", 0)


def _libc(name: str, *args: int) -> None:
    """Call a function of glibc; other libraries have none of these, and other systems no glibc."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:
        function(*args)


class Peak:
    """By how much memory peaks over what it is when this is made.

    On CUDA that is what torch's allocator gave out; on Linux the resident memory of the process,
    so that a fresh one is needed for a number that means something.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        release(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 2**10
        elif self.known:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak to the present size
            self._before = _status_kib("VmRSS")

    @property
    def known(self) -> bool:
        """Whether the peak can be told here: elsewhere it is kept in other units, or not at all."""
        return self._device.type == "cuda" or sys.platform.startswith("linux")

    def mib(self) -> float | None:
        """Return the mebibytes so far, None where they cannot be told."""
        if not self.known:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            top = torch.cuda.max_memory_allocated(self._device) / 2**10
        else:
            top = _status_kib("VmHWM")
        return (top - self._before) / 2**10


def _status_kib(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(field + ":"))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a new process, with as many threads of torch as here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:  # which notices that a process died
        return pool.submit(_with_threads, torch.get_num_threads(), function, args).result()


def _with_threads(threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    _libc("mallopt", _MMAP_THRESHOLD, 2**16)  # what is freed is no longer resident
    torch.linalg.eigvalsh(torch.eye(8))  # loads the solver, which is no memory of the call's
    return function(*args)


class CountedProducts(TorchDispatchMode):
    """Count the multiplications and additions of matrix products and attention while it is entered.

    Kernels of its own that a package launches are not seen, nor are decompositions and transforms.

    Attributes:
        flops: The count.

    Example:
        >>> import torch
        >>> with CountedProducts() as counted:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> counted.flops
        60
    """

    def __init__(self) -> None:
        super().__init__()
        # Here, because it imports triton, which then can no longer be told to interpret.
        from torch.utils.flop_counter import flop_registry

        self._formulas = flop_registry
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += self._count(getattr(func, "_overloadpacket", None), args, kwargs, out)
        return out

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any) -> int:
        name = getattr(packet, "__name__", "")
        if name.startswith("_scaled_dot_product"):
            backward = name.endswith("_backward")
            query, key = args[1:3] if backward else args[:2]
            batch, heads, length, width = query.shape
            # Two products forward; five backward, which makes the scores again.
            return 2 * (5 if backward else 2) * batch * heads * length * key.shape[2] * width
        formula = self._formulas.get(_SAME.get(packet, packet))
        if formula is None:
            return 0
        # The sum of aten.addmm.dtype has a fourth place, which the formula takes for another thing.
        return int(formula(*args[: _PLACES.get(name, len(args))], **kwargs, out_val=out))


_PLACES = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3, "addmm_": 3, "baddbmm_": 3}

# Not in torch's table.
_SAME = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}
