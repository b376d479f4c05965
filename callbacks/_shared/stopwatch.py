"""Times a stretch of work on the device that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up stretches of work, on CUDA by the device's own events and without a wait for it.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.running(torch.device("cpu")):
        ...     time.sleep(0.01)
        >>> 0.01 <= watch.seconds() < 5
        True
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin at 0."""
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the work that is begun inside."""
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record(torch.cuda.current_stream(device))
            yield
            ended.record(torch.cuda.current_stream(device))
            self._events.append((began, ended))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Return the sum; on CUDA of work that is known to be over, as once scores are read."""
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
