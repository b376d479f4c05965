"""What every benchmark says about where it ran."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["clock", "machine", "threads_set"]


def clock() -> float:
    """Return seconds: of the processor where a single thread works, else of the wall.

    Other work on the machine is not ours.
    """
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def machine() -> dict[str, Any]:
    """Return date, processor, threads, load and versions, ready for JSON."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Use so many threads of torch (None leaves them) and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
