"""Phases for the tests of the runner: each does one thing that a real one may do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from onlinesel.bench._settings import LeftOut
from onlinesel.bench.gpu import Phase
from onlinesel.bench.gpu._runner import Task


def works(task: Task) -> dict[str, Any]:
    print("a line for the log")
    return {"device": task.device, "tiny": task.tiny, "pid": os.getpid()}


def raises(task: Task) -> dict[str, Any]:
    task.save({"so far": 1})
    raise RuntimeError("the kernel is wrong")


def sleeps(task: Task) -> dict[str, Any]:
    """Start a child of its own and hang, as a test run within a phase would."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    task.save({"child": child.pid, "so far": 2})
    time.sleep(60)
    return {}


def dies(task: Task) -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}


def left_out(task: Task) -> dict[str, Any]:
    raise LeftOut("transformers is not installed")


def waits_for_a_file(task: Task) -> dict[str, Any]:
    """Hang in the first call, and be done in the second."""
    marker = Path(os.environ["ONLINESEL_TEST_MARKER"])
    if not marker.exists():
        task.save({"pid": os.getpid()})
        time.sleep(60)
    return {"second": True}


WORKS = Phase("works", "works", 20, works)
RAISES = Phase("raises", "raises", 20, raises)
SLEEPS = Phase("sleeps", "overruns", 2, sleeps)
DIES = Phase("dies", "dies", 20, dies)
LEFT_OUT = Phase("left_out", "is left out", 20, left_out)
WAITS = Phase("waits", "is interrupted", 30, waits_for_a_file)
