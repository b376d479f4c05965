"""Runs of a demo, each in a process of its own with one thread, and how far they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Tell", "Workers", "clear_runs"]

Tell = Callable[[float], None]
"""Called by a run with the share of its budget that is spent."""

_JobT = TypeVar("_JobT")
_ResultT = TypeVar("_ResultT")


class _Work(Protocol):
    def __call__(self, job: Any, tell: Tell) -> Any: ...


class Workers(Generic[_JobT, _ResultT]):
    """Processes that run jobs.

    Args:
        count: Runs at a time.
        work: A function of a module: runs one job.
    """

    def __init__(self, count: int, work: _Work) -> None:
        context = get_context("spawn")
        self._told: Queue[tuple[int, float]] = context.Queue()
        self._work = work
        self._pool = ProcessPoolExecutor(count, context, _begin, (self._told,))
        for _ in range(count):
            self._pool.submit(_import_of, work)  # while the start is prepared

    def __enter__(self) -> Workers[_JobT, _ResultT]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also when interrupted: begin no further run.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> Iterable[Any]:
        """Apply a function of a module to items, in the processes."""
        return self._pool.map(function, *items)

    def run(
        self,
        jobs: Sequence[_JobT],
        *,
        line: Callable[[_JobT, _ResultT, float], str],
        doing: Callable[[_JobT], str],
    ) -> None:
        """Run the jobs, in their order, and print how far they are.

        Args:
            jobs: What to run.
            line: Says how a run ended: job, result, seconds since the first one began.
            doing: Names a run while it goes on.
        """
        began = time.perf_counter()
        futures = {self._pool.submit(_run, self._work, n, job): n for n, job in enumerate(jobs)}
        shares: dict[int, float] = {}
        waiting: set[Future[_ResultT]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            while not self._told.empty():
                number, share = self._told.get()
                shares[number] = share
            for future in done:
                job, result = jobs[futures[future]], future.result()
                shares.pop(futures[future], None)
                over = f"[{len(jobs) - len(waiting)}/{len(jobs)}]"
                _say(f"  {over} {line(job, result, time.perf_counter() - began)}\n")
            # A last message may come after the result.
            running = (f"{doing(jobs[n])} {100 * s:.0f} %" for n, s in shares.items() if s < 1)
            _say("  " + ", ".join(running), live=True)


def clear_runs(folder: Path, recipe: str) -> None:
    """Remove the run directories of an earlier demo, and nothing else that may lie there.

    Args:
        folder: Holds the run directories.
        recipe: What ``run.json`` names as their recipe.
    """
    for file in folder.glob("*/run.json"):
        if json.loads(file.read_bytes()).get("recipe") == recipe:
            shutil.rmtree(file.parent)


def _say(text: str, *, live: bool = False) -> None:
    """Print a line over the live one, which only a terminal gets to see."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\x1b[2K{text}")
    elif not live:
        sys.stdout.write(text)
    sys.stdout.flush()


_told: Queue[tuple[int, float]] | None = None  # set in each worker process as it begins


def _begin(told: Queue[tuple[int, float]]) -> None:
    global _told
    _told = told
    # Ctrl-C ends a worker at once; else it would go on to the runs that it was handed already.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the demo is gone: a pool that was killed leaves its workers behind."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _import_of(work: _Work) -> None:
    """Do nothing: what takes time is that the worker imports the module of its work."""


def _run(work: _Work, number: int, job: Any) -> Any:
    assert _told is not None
    return work(job, lambda share: _told.put((number, share)))
