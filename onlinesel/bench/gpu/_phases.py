"""The phases of ``onlinesel bench gpu``: which benchmark runs at which sizes.

Sizes of a GPU are those of the models that people fine-tune; the tiny ones are for trying the whole
script on a CPU, where Triton's interpreter plays the kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import onlinesel
from onlinesel.bench._measure import release, timed
from onlinesel.bench._settings import LeftOut, machine
from onlinesel.bench.blocks import bench_blocks
from onlinesel.bench.gpu._runner import Phase, Result, Task
from onlinesel.bench.grpo import bench_grpo
from onlinesel.bench.scores import bench_scores

__all__ = ["PHASES"]

_HEAD: dict[str, Any] = {"batch": 16, "tokens": 512, "vocab": 151936, "dtype": "bfloat16"}
_TINY_HEAD = {**_HEAD, "batch": 2, "tokens": 8, "vocab": 300, "width": 64, "repeats": 1}
_QUERY = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,"
    "power.limit,utilization.gpu,memory.used"
)


def _sizes(task: Task, width: int) -> dict[str, Any]:
    """Return the sizes of a head: those of a model of this width, or tiny ones."""
    given = _TINY_HEAD if task.tiny else {**_HEAD, "width": width}
    return {**given, "device": task.device, "memory": not task.tiny}


def _environment(task: Task) -> Result:
    """Return versions, clocks as found, and two ceilings: a large product and a large copy."""
    device = torch.device(task.device)
    found: Result = {"machine": machine(device), "as_found": _driver(device)}
    task.save(found)
    size, kind = (256, torch.float32) if task.tiny else (8192, torch.bfloat16)
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=device, dtype=kind) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _fastest(lambda: torch.mm(a, b, out=out), device)
    found["product"] = {"size": size, "dtype": str(kind).removeprefix("torch."),
                        "seconds": seconds, "tflops": 2 * size**3 / seconds / 1e12}  # fmt: skip
    source = torch.randn(2**20 if task.tiny else 2**30, generator=g, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), device)
    found["copy"] = {"bytes": 2 * source.nbytes, "seconds": seconds,
                     "tb_per_second": 2 * source.nbytes / seconds / 1e12}  # fmt: skip
    return found


def _fastest(call: Any, device: torch.device) -> float:
    for _ in range(3):
        call()
    return median(timed(call, device) for _ in range(10))


def _driver(device: torch.device) -> Result:
    """Return driver, clocks, temperature and power as ``nvidia-smi`` reads them."""
    if device.type != "cuda":
        return {"left_out": "no GPU"}
    words = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    words.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")  # the one that this process sees
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"left_out": f"{type(error).__name__}: {error}"}
    return dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def _tests(task: Task) -> Result:
    """Run the tests marked ``gpu``, those of them that find here what they import."""
    root = Path(onlinesel.__file__).parents[1]
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    marked = re.compile(r"\bmark\.gpu\b")
    files = sorted(
        path for path in (root / "tests").glob("**/test_*.py") if marked.search(path.read_text())
    )
    if not files:
        raise LeftOut(f"no tests beside the package in {root}: run it from a clone")
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # Other versions than those of constraints.txt warn of other things.
    words += ["-o", "filterwarnings=default", "--continue-on-collection-errors", "--tb=short"]
    if task.device != "cpu" and importlib.util.find_spec("xdist") is not None:
        words += ["-n", "4"]  # most of their time is compiling kernels, on the processor
    words += [str(path.relative_to(root)) for path in files]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run([*words, f"--junitxml={report}"], cwd=root, env=environment)
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode}; see the log")
        found = {"exit_code": done.returncode, **_outcomes(report)}
    task.save(found)
    if found["failed"]:
        first = found["failed"][0]["test"]
        raise RuntimeError(f"{len(found['failed'])} tests failed, the first: {first}")
    return found


def _outcomes(report: Path) -> Result:
    """Read pytest's report: how many passed, and what of the others."""
    found: Result = {"passed": 0, "skipped": [], "failed": []}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [*case.findall("failure"), *case.findall("error")]
        skipped = case.find("skipped")
        if bad:
            found["failed"].append({"test": name, "text": (bad[0].text or "")[-2000:]})
        elif skipped is not None:
            found["skipped"].append(f"{name}: {skipped.get('message')}")
        else:
            found["passed"] += 1
    return found


def _scores(task: Task, width: int) -> Result:
    return bench_scores(parts=["token_scores"], **_sizes(task, width))


def _uds(task: Task, width: int) -> Result:
    return bench_scores(parts=["uds"], **_sizes(task, width))


def _policy(task: Task) -> Result:
    return bench_grpo(**_sizes(task, 896))


def _blocks(task: Task, width: int) -> Result:
    tokens, vocab = (32, 600) if task.tiny else (8192, 151936)
    return bench_blocks(
        tokens, 64 if task.tiny else width, vocab, dtype="bfloat16", device=task.device,
        seconds=task.seconds - 15, source="bench gpu", progress=task.save,
    )  # fmt: skip


def _trainer(task: Task, preset: str, rows: int, micro_batch: int | None) -> Any:
    """Return the benchmark of steps and its sizes."""
    if importlib.util.find_spec("transformers") is None:
        raise LeftOut("transformers is not installed")
    bench_step: Any = importlib.import_module("onlinesel.recipes.bench_step")
    if task.tiny:
        return bench_step, bench_step.StepSizes("tiny", rows=1, tokens=8, device=task.device)
    return bench_step, bench_step.StepSizes(
        preset, rows=rows, tokens=512, micro_batch=micro_batch, dtype="bfloat16",
        device=task.device,
    )  # fmt: skip


def _steps(task: Task, preset: str, rows: int, micro_batch: int | None) -> Result:
    bench, sizes = _trainer(task, preset, rows, micro_batch)
    few = {"steps": 1, "repeats": 1, "memory": False} if task.tiny else {"steps": 5, "repeats": 2}
    return bench.bench_step(sizes, **few)


def _callback(task: Task) -> Result:
    """What the callback costs with nothing to choose, and where a chosen step waits."""
    _, sizes = _trainer(task, "qwen2.5-0.5b", 4, None)
    trainer: Any = importlib.import_module("onlinesel.recipes._bench_trainer")
    waits: Any = importlib.import_module("onlinesel.recipes._bench_waits")
    steps, turns = (2, 1) if task.tiny else (10, 3)
    taken: dict[str, list[float]] = {"all": [], "idle": []}
    for _ in range(turns):
        for name, side in (("all", trainer.SIDES["all"]), ("idle", trainer.IDLE)):
            taken[name] += trainer.seconds(sizes, side, steps)
            release(sizes.where)
    plain, idle = (median(taken[name]) for name in ("all", "idle"))
    found: Result = {"idle": {"seconds": idle, "plain_seconds": plain, "cost": idle / plain - 1}}
    found |= {"steps": steps, "turns": turns, **machine(sizes.where)}
    task.save(found)
    counted = waits.count_all_waits([replace(sizes, strategy=name) for name in ("UDS", "TopLoss")])
    return found | {f"waits_{entry['strategy']}": entry for entry in counted}


_HALF, _LARGER = "qwen2.5-0.5b", "qwen2.5-1.5b"
PHASES = (
    Phase("environment", "versions, clocks as found, two ceilings", 30, _environment),
    Phase("tests", "the tests marked gpu", 90, _tests),
    Phase("blocks_896", "sizes of the fused kernel, width 896", 60, partial(_blocks, width=896)),
    Phase("blocks_3584", "the same, width 3584", 60, partial(_blocks, width=3584)),
    Phase("scores_896", "token scores, width 896", 45, partial(_scores, width=896)),
    Phase("policy", "a policy's head, forward and backward", 75, _policy),
    Phase("uds_3584", "UDS, 16 x 512 tokens, width 3584", 45, partial(_uds, width=3584)),
    Phase("steps_64", "whole steps of the sizes of Qwen2.5-0.5B, 16 of 64 rows", 120,
          partial(_steps, preset=_HALF, rows=16, micro_batch=32)),
    Phase("scores_3584", "token scores, width 3584", 45, partial(_scores, width=3584)),
    Phase("callback", "nothing to choose; waits of a chosen step", 75, _callback),
    Phase("steps_1536", "whole steps of the sizes of Qwen2.5-1.5B, 8 of 32 rows", 120,
          partial(_steps, preset=_LARGER, rows=8, micro_batch=16)),
    Phase("scores_1536", "token scores, width 1536", 45, partial(_scores, width=1536)),
    Phase("uds_896", "UDS, width 896", 45, partial(_uds, width=896)),
    Phase("steps", "whole steps of the sizes of Qwen2.5-0.5B, 4 of 16 rows", 75,
          partial(_steps, preset=_HALF, rows=4, micro_batch=None)),
)  # fmt: skip
"""Most valuable first."""
