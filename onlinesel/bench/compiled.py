"""``onlinesel bench compiled``: what every Triton kernel takes of a GPU, counted without one.

Each kernel is compiled for the kinds of devices asked for: the fused one with all sizes that a
search tries there, the tile backend's with the tiles it uses. Registers and stack are what the
assembler reports; a stack is where spilled registers go. Nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from onlinesel.bench._compile import (
    compiled_fused,
    compiled_gradient,
    compiled_merge,
    compiled_tile,
    usage,
)
from onlinesel.bench._settings import command, machine, numbers
from onlinesel.bench._text import bars, new_figure, table
from onlinesel.bench._ways import note_failure
from onlinesel.kernels._backend import interpreting
from onlinesel.kernels._blocks import Blocks, candidate_blocks

__all__ = ["HARMFUL", "add_arguments", "bench_compiled", "figure", "markdown", "run"]

HARMFUL = 64  # bytes of stack above which spills are read again and again in the product

# Kibibytes of shared memory of a multiprocessor, one of which each program needs for itself.
_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228}
_REGISTERS = 65536  # of a multiprocessor
_TILES = ((8192, 8), (4096, 8), (1024, 4))  # columns of a tile, most are 4,096, with warps
_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync", "tcgen05": "tcgen05.mma",
    "tma": "cp.async.bulk.tensor", "cp.async": "cp.async.c",
}  # fmt: skip


def bench_compiled(arch: Sequence[int] = (80, 90, 100)) -> dict[str, Any]:
    """Compile every Triton kernel for kinds of devices, and count what each takes.

    Args:
        arch: Compute capabilities without their dot: 80, 86, 89, 90 or 100.

    Returns:
        Versions, and ``points``: for each of ``arch`` its ``kernels``, each with ``registers`` of
        a thread, ``stack`` and ``shared`` bytes, ``programs`` that fit a multiprocessor, the
        ``instructions`` that load and multiply, and a ``verdict``.

    Raises:
        ValueError: A capability that is not known here.
        RuntimeError: Triton interprets in this process.
    """
    for one in arch:
        if one not in _SHARED:
            known = ", ".join(map(str, _SHARED))
            raise ValueError(f"bench_compiled: arch must be of {known}, got {one}. Leave it out.")
    if interpreting():
        raise RuntimeError(
            "bench_compiled: kernels must be compiled, got a process that interprets them. Unset "
            "TRITON_INTERPRET."
        )
    result = {"what": "kernels compiled for GPUs, none of which is needed", **machine()}
    result["triton"] = importlib.import_module("triton").__version__
    result["points"] = [
        {"arch": one, "shared_kib": _SHARED[one] - 1, "kernels": [
            _counted(name, blocks, make, warps, one) for name, blocks, make, warps in _kernels(one)
        ]} for one in arch
    ]  # fmt: skip
    return result


def _kernels(arch: int) -> Iterator[tuple[str, Blocks | None, Any, int]]:
    """Yield label, sizes, how to compile it, and warps of every kernel."""
    shared = (_SHARED[arch] - 1) * 1024
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        candidates = candidate_blocks(dtype, shared)
        twins = [] if arch < 90 or dtype == torch.float32 else _twins(candidates)
        for blocks in (*candidates, *twins):
            kind = str(dtype).removeprefix("torch.")
            other = " (not searched)" if blocks in twins else ""

            def fused(blocks: Blocks = blocks, pointer: str = pointer) -> Any:
                return compiled_fused(blocks, pointer, arch)

            yield f"fused {kind} {blocks}{other}", blocks, fused, blocks.warps
    for columns, warps in _TILES:

        def tile(columns: int = columns, warps: int = warps) -> Any:
            return compiled_tile(columns, warps, arch)

        yield f"tile, {columns} columns w{warps}", None, tile, warps
    yield "gradient, 2048 columns w4", None, lambda: compiled_gradient(2048, 4, arch), 4
    yield "merge", None, lambda: compiled_merge(arch), 4


def _twins(candidates: Sequence[Blocks]) -> list[Blocks]:
    """Return the same sizes with the other kind of loads, where no candidate has them."""
    seen = {(*blocks[:5], blocks.described) for blocks in candidates}
    twins: dict[tuple[object, ...], Blocks] = {}
    for blocks in candidates:
        key = (*blocks[:5], not blocks.described)
        if key not in seen:
            twins.setdefault(key, blocks._replace(described=not blocks.described))
    return list(twins.values())


def _counted(label: str, blocks: Blocks | None, make: Any, warps: int, arch: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": label, "ours": True}
    entry["blocks"] = None if blocks is None else blocks._asdict()
    try:
        result = make()
        found = usage(result)
    except Exception as error:
        note_failure(entry, error)
        return entry
    shared, ptx = result.metadata.shared, result.asm["ptx"]
    limit = (_SHARED[arch] - 1) * 1024
    registers = -(-found["REG"] // 8) * 8 * 32 * warps  # given out by eights
    programs = min(_SHARED[arch] * 1024 // (shared + 1024), _REGISTERS // registers)
    verdict = "fits" if found["STACK"] == 0 else "fits, spills a few"
    if found["STACK"] > HARMFUL:
        verdict = "spills"
    if shared > limit or programs == 0:
        verdict = "does not fit"
    return entry | {
        "registers": found["REG"], "stack": found["STACK"], "shared": shared,
        "programs": programs, "verdict": verdict,
        "instructions": [name for name, word in _INSTRUCTIONS.items() if word in ptx],
    }  # fmt: skip


def _table(result: dict[str, Any]) -> str:
    lines = [f"triton {result['triton']}; w warps, s stages, t tiles, g together", ""]
    for point in result["points"]:
        title = f"sm_{point['arch']}, {point['shared_kib']} KiB of shared memory for a program"
        columns = [
            (name, lambda entry, key=key: entry[key], "d")
            for name, key in (("registers", "registers"), ("stack B", "stack"),
                              ("shared B", "shared"), ("programs", "programs"))
        ]  # fmt: skip
        text = table(title, point["kernels"], columns).splitlines()
        ends = (
            f"  {e['verdict']}; {', '.join(e['instructions'])}" if "verdict" in e else ""
            for e in point["kernels"]
        )
        lines += [*text[:2], *map("".join, zip(text[2:], ends, strict=True)), ""]
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as tables of Markdown, as docs/kernels.md holds them."""
    lines = []
    for point in result["points"]:
        lines += [
            f"#### sm_{point['arch']}, triton {result['triton']}", "",
            "| kernel | registers | stack, bytes | shared, KiB | programs | instructions | |",
            "|---|---:|---:|---:|---:|---|---|",
        ]  # fmt: skip
        for entry in point["kernels"]:
            if "failed" in entry:
                lines.append(f"| {entry['label']} | | | | | | failed: {entry['failed']} |")
                continue
            lines.append(
                f"| {entry['label']} | {entry['registers']} | {entry['stack']} | "
                f"{entry['shared'] / 1024:.0f} | {entry['programs']} | "
                f"{', '.join(entry['instructions'])} | {entry['verdict']} |"
            )
        lines.append("")
    return "\n".join(lines)


def figure(result: dict[str, Any], path: str) -> None:
    """Draw registers and spilled bytes of every kernel, one panel a kind of device.

    Args:
        result: What :func:`bench_compiled` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing = new_figure("compiled", len(result["points"]), 6.0)
    for axes, point in zip(drawing.axes, result["points"], strict=True):
        labels = [entry["label"] for entry in point["kernels"]]
        series = {
            name: [entry.get(key) for entry in point["kernels"]]
            for name, key in (("registers", "registers"), ("stack, bytes", "stack"))
        }
        bars(axes, labels, series, f"sm_{point['arch']}, triton {result['triton']}")
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench compiled``."""
    parser.add_argument(
        "--arch", type=numbers, default="80,90,100",
        help="compute capabilities without their dot, with commas between them",
    )  # fmt: skip
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables as docs/kernels.md holds them"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    result = bench_compiled(args.arch)
    return {"command": command("compiled", args), **result}, (
        markdown if args.markdown else _table
    )(result)
