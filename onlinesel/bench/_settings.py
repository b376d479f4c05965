"""What every benchmark says about where it ran, and how."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = [
    "LeftOut",
    "add_common",
    "at_least",
    "clock",
    "command",
    "find_device",
    "listed",
    "load",
    "machine",
    "numbers",
    "settle",
    "threads_set",
]

_PACKAGES = ("transformers", "trl", "triton", "liger-kernel", "cut-cross-entropy")


class LeftOut(Exception):
    """A part of a benchmark cannot run on this machine; the text says why."""


def clock() -> float:
    """Return seconds: of the processor where a single thread works, else of the wall.

    Other work on the machine is not ours.
    """
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return date, processor, threads, load and versions, ready for JSON."""
    found = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": load(),
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device is None:
        return found
    found["versions"] = _versions()
    found["device"] = str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["gpu_gib"] = properties.total_memory / 2**30
        found["cuda"] = torch.version.cuda
    return found


def load() -> list[float] | None:
    """Return how many processes wanted to run in the last 1, 5 and 15 minutes, where it is told."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    """Return the versions of the packages that are compared or trained with, where installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


@contextmanager
def threads_set(threads: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Use so many threads of torch (None leaves them), and this GPU; restore both afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gpu = device is not None and device.type == "cuda"
    try:
        with torch.cuda.device(device) if gpu else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def find_device(owner: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of these names.

    Args:
        owner: Who asks, for errors.
        device: Such as ``"cpu"`` or ``"cuda:1"``; ``"auto"`` is CUDA where there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: A name that is none of these, or CUDA where there is none.

    Example:
        >>> find_device("bench_scores", "cpu", "bfloat16")
        (device(type='cpu'), torch.bfloat16)
    """
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(
            f"{owner}: dtype must be one of {', '.join(kinds)}, got {dtype!r}. Float64 is what "
            "the others are compared with."
        )
    present = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if present else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not present):
        here = "auto, cpu or cuda" if present else "auto or cpu on a machine without CUDA"
        raise ValueError(f"{owner}: device must be {here}, got {device!r}. Pass auto.")
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where, kinds[dtype]


def at_least(owner: str, least: int, **values: int) -> None:
    """Refuse numbers below the least.

    Example:
        >>> at_least("bench_scores", 1, tokens=0)
        Traceback (most recent call last):
        ValueError: bench_scores: tokens must be at least 1, got 0. Pass a positive integer.
    """
    for name, value in values.items():
        if value < least:
            remedy = "a positive integer" if least == 1 else "more"
            raise ValueError(
                f"{owner}: {name} must be at least {least}, got {value}. Pass {remedy}."
            )


def settle(
    owner: str, device: str, dtype: str, repeats: int | None, **sizes: int
) -> tuple[torch.device, torch.dtype, int]:
    """Return device, dtype and the runs of each way: 3 on a CPU and 20 on a GPU for None.

    Raises:
        ValueError: An unknown name, or a number below 1.
    """
    where, kind = find_device(owner, device, dtype)
    repeats = (20 if where.type == "cuda" else 3) if repeats is None else repeats
    at_least(owner, 1, **sizes, repeats=repeats)
    return where, kind, repeats


def numbers(text: str) -> list[int]:
    """Read whole numbers with commas between them, ``1e6`` being one.

    Example:
        >>> numbers("8,1e3")
        [8, 1000]
    """
    return [int(float(part)) for part in text.split(",")]


def add_common(parser: argparse.ArgumentParser, repeats: str) -> None:
    """Add the arguments that say where and how often something is timed."""
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto takes CUDA where there is one")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    add("--repeats", type=int, help=repeats)
    add("--threads", type=int, default=1, help="threads of torch on the CPU")
    add("--no-memory", action="store_true", help="leave out peak memory")


def command(name: str, args: argparse.Namespace) -> str:
    """Return the command line that gives these arguments, defaults included.

    Example:
        >>> command("grpo", argparse.Namespace(what="grpo", width=[8, 16], no_memory=True, x=None))
        'python -m onlinesel.bench grpo --width 8,16 --no-memory'
    """
    words = [f"python -m onlinesel.bench {name}"]
    for key, value in vars(args).items():
        if key in ("what", "json", "figure") or value is None or value is False:
            continue
        flag = f"--{key.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {listed(value)}")
    return " ".join(words)


def listed(value: Any) -> str:
    """Return a value as the command line takes it, several with commas between them."""
    if isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Sequence) else f"{value:g}"
