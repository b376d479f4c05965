"""Start a module of the tests on two processes, and fail rather than wait for ever."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATIENCE = 840
"""Seconds after which a launch hangs: no loaded machine needs as many, and pytest waits longer."""


def torchrun(
    module: str,
    *arguments: str,
    port: int,
    processes: int = 2,
    restarts: int = 0,
) -> str:
    """Run ``tests.<module>`` under torchrun; returns what it printed.

    Args:
        module: Below ``tests``, with dots.
        *arguments: Of its command line.
        port: Distinct for each launch that may run at the same time.
        processes: Number of ranks.
        restarts: How often all ranks begin anew after one has died.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if restarts:
        command += [f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=localhost:{port}"]
    else:
        command += [f"--master_port={port}"]
    command += ["-m", f"tests.{module}", *arguments]
    # DeepSpeed compiles an operation on its first use, with the ninja of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}
    # torch 2.13 shares one store between attempts, which still holds the addresses of the dead.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def settle() -> None:
    """Spare a process that has imported all it needs what other packages do in every run.

    Accelerate collects garbage when a trainer begins, which walks through all that was ever
    imported (0.3 s), and parses the metadata of a package whenever it asks whether that is there,
    and in which version.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # for what some packages check when Python ends
    for name in ("metadata", "version"):
        setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))


def begin() -> None:
    """Begin a rank, with one thread as the tests have."""
    torch.set_num_threads(1)
    settle()


def leave() -> None:
    """End this rank when all are done, without a teardown of gloo that aborts now and then."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
