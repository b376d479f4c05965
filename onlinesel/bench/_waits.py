"""Where the host waits for the device: counted, and listed by line.

A wait costs more than its copy: until it is over nothing new is queued, so the device idles for
as long as the host then needs to queue its next work.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from onlinesel.bench._simulated import SIMULATED, told

__all__ = ["HostWaits", "Wait"]

_MESSAGE = "called a synchronizing CUDA operation"
_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_COPIES = "Memcpy DtoH"
# Frames of the way from a line to what watches it.
_BETWEEN = frozenset({"torch", "warnings", *sys.stdlib_module_names})
_OWN = (__name__, "onlinesel.bench._simulated", "onlinesel._base.host")


@dataclass(frozen=True)
class Wait:
    """One wait.

    Attributes:
        kind: Such as ``"item"`` or ``"copy to the host"``; on CUDA ``"synchronises"``.
        line: ``module:line`` of the innermost code that is neither torch's nor Python's own.
        function: Qualified name of that function.
        through: ``module function`` of the innermost function of onlinesel, None if there is none
            on the way.
    """

    kind: str
    line: str
    function: str
    through: str | None


class HostWaits:
    """List the waits of the host for a device while it is entered.

    On CUDA the lines are those of torch's debug mode for synchronisation, which leaves out what
    extensions call by themselves, collectives, and explicit synchronisation; the calls that CUPTI
    saw are counted beside them, in :attr:`calls`. Elsewhere the device is the simulated one of
    ``onlinesel.bench._simulated``.

    Args:
        device: Of CUDA, or the simulated one.

    Attributes:
        waits: In their order.
        calls: On CUDA, how often the runtime was asked to synchronise and to copy to the host, by
            name; closing the profiler adds a ``cudaDeviceSynchronize`` of its own.

    Raises:
        ValueError: Another device.

    Example:
        ```python
        with HostWaits(torch.device("cuda")) as seen:
            tensor.sum().item()
        print(len(seen.waits), seen.waits[0].line)
        ```
    """

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cuda", SIMULATED):
            raise ValueError(
                f"HostWaits: device must be a CUDA device or the simulated one, got {device}. A "
                "CPU is never waited for: run inside of simulation()."
            )
        self._device = device
        self.waits: list[Wait] = []
        self.calls: dict[str, int] = {}

    def __enter__(self) -> HostWaits:
        """Begin."""
        self._stack = ExitStack()
        if self._device.type == SIMULATED:
            self._stack.enter_context(told(self._note))
        else:
            self._watch_cuda()
        return self

    def __exit__(self, *_: Any) -> None:
        """End, and restore what was changed."""
        self._stack.close()

    def _watch_cuda(self) -> None:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.start()
        self._stack.callback(self._count, profiler)
        self._stack.enter_context(warnings.catch_warnings())
        before = torch.cuda.get_sync_debug_mode()
        show = warnings.showwarning

        def heard(message: Any, *args: Any, **kwargs: Any) -> None:
            if _MESSAGE in str(message):
                self._note("synchronises")
            else:
                show(message, *args, **kwargs)

        with warnings.catch_warnings():  # which says that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("warn")
        self._stack.callback(torch.cuda.set_sync_debug_mode, before)
        warnings.filterwarnings("always", message=_MESSAGE)
        warnings.showwarning = heard

    def _count(self, profiler: Any) -> None:
        profiler.stop()
        for event in profiler.key_averages():
            if event.key in _CALLS or event.key.startswith(_COPIES):
                self.calls[event.key] = event.count

    def _note(self, kind: str) -> None:
        self.waits.append(_place(kind, sys._getframe(1)))

    def by_line(self) -> Counter[Wait]:
        """Return how often each wait came."""
        return Counter(self.waits)


def _place(kind: str, frame: FrameType | None) -> Wait:
    line, function, through = "backward", "", None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        # Comprehensions are no functions of their own from Python 3.12 on.
        name = frame.f_code.co_qualname.split(".<locals>")[0]
        if module.partition(".")[0] not in _BETWEEN and module not in _OWN:
            if line == "backward":
                line, function = f"{module}:{frame.f_lineno}", name
            if module.startswith("onlinesel."):
                through = f"{module} {name}"
                break
        frame = frame.f_back
    return Wait(kind, line, function, through)
