"""Phases in processes of their own, each with a time limit and a file.

A phase that hangs, crashes the driver or is killed takes nothing with it: every one runs in a fresh
process, which the limit ends. The processes are forked from a server that has imported torch and
has never touched a GPU, so that each starts within a second or two.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from onlinesel.bench._settings import LeftOut

__all__ = ["Phase", "Task", "read_file", "run_phase", "write_file"]

Result = dict[str, Any]

_GRACE = 3.0  # seconds between asking a process to end and ending it
# What the server imports must not ask for a GPU, not even how many there are: processes forked from
# one that did could not use any. transformers is not sure to keep to that.
_SERVER = ["torch", "onlinesel.bench"]


@dataclass(frozen=True)
class Phase:
    """A part of the whole measurement.

    Attributes:
        name: In file names and tables.
        what: One line about it.
        limit: Seconds it may take.
        work: A function of a module: gets the :class:`Task`, returns the result for JSON. It
            raises :class:`onlinesel.bench._settings.LeftOut` where it cannot run here.
    """

    name: str
    what: str
    limit: float
    work: Callable[[Task], Result]


@dataclass(frozen=True)
class Task:
    """What a phase is told.

    Attributes:
        device: ``"cpu"``, or ``"cuda:0"``: the only one that the process sees.
        tiny: Use sizes that a CPU goes through in seconds.
        seconds: What is left for it.
        save: Writes what is there so far, which then survives the limit.
    """

    device: str
    tiny: bool
    seconds: float
    save: Callable[[Result], None]


def read_file(path: Path) -> Result | None:
    """Return the content of a result file, None where there is none or it is no JSON."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def write_file(path: Path, content: Result) -> None:
    """Write JSON; whoever reads finds the old content or the new, never a part."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(aside, path)


def _context(tiny: bool) -> Any:
    """Return how processes are started; their server starts here, and keeps this environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SERVER)
    given = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # is_available() then starts no driver
    if tiny:
        given["TRITON_INTERPRET"] = "1"  # read while triton is imported, as torch does
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def run_phase(
    phase: Phase,
    path: Path,
    facts: Result,
    *,
    device: str,
    tiny: bool,
    limit: float,
    alive: Callable[[float], None],
) -> str:
    """Run a phase in a process of its own; its file says how it ended.

    Args:
        phase: The phase.
        path: Its file. What it prints goes to a file of the same name that ends in ``.log``.
        facts: Written into the file beside the result.
        device: See :class:`Task`.
        tiny: See :class:`Task`.
        limit: Seconds it may take, the start of its process included.
        alive: Called once a second with the seconds so far.

    Returns:
        ``"done"``, ``"failed"``, ``"left out"``, or ``"overran"`` if the limit ended it.
    """
    context = _context(tiny)
    began = time.monotonic()
    facts = {"phase": phase.name, "what": phase.what, "limit": round(limit, 1), **facts}
    write_file(path, {**facts, "status": "running"})
    process = context.Process(
        target=_work, args=(phase.work, path, facts, device, tiny, limit), name=phase.name
    )
    process.start()
    try:
        while process.is_alive() and time.monotonic() - began < limit:
            process.join(min(1.0, max(0.0, limit - (time.monotonic() - began))))
            alive(time.monotonic() - began)
        overran = process.is_alive()
    finally:
        _end(process)
    found = read_file(path) or dict(facts)
    if found.get("status", "running") == "running":
        found["status"] = "overran" if overran else "failed"
        if not overran:
            found["error"] = f"its process ended with exit code {process.exitcode}"
    found["seconds"] = round(time.monotonic() - began, 2)
    write_file(path, found)
    return str(found["status"])


def _end(process: Any) -> None:
    """End a process and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if not process.is_alive():
            break
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            os.kill(process.pid, sign)  # it has not made its own group yet
        process.join(_GRACE)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    except (ProcessLookupError, PermissionError):
        pass
    process.join()


def _work(
    work: Callable[[Task], Result],
    path: Path,
    facts: Result,
    device: str,
    tiny: bool,
    limit: float,
) -> None:
    """Be the process of a phase."""
    os.setsid()
    if device != "cpu":
        device = _alone(device)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(path.with_suffix(".log"), "w", buffering=1, encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        faulthandler.enable(log)

        def save(status: str, **found: Any) -> None:
            write_file(path, {**facts, "status": status, **found})

        task = Task(device, tiny, limit, lambda result: save("running", result=result))
        try:
            save("done", result=work(task))
        except LeftOut as reason:
            save("left out", error=str(reason))
        except Exception as error:
            before = read_file(path) or {}
            kept = {"result": before["result"]} if "result" in before else {}
            text = traceback.format_exc()
            sys.stderr.write(text)
            save("failed", error=f"{type(error).__name__}: {error}", traceback=text, **kept)


def _alone(device: str) -> str:
    """Hide the other GPUs, which a trainer would use as well; return this one's name then."""
    index = device.partition(":")[2] or "0"
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(index)] if seen != [""] else index
    return "cuda:0"


def _end_with_parent() -> None:
    """End this process and its children when whoever started it is gone: a GPU is not to be held
    for a result that nobody reads.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
