"""``onlinesel bench blocks``: which sizes of the fused kernel are the fastest on this device.

The fused kernel runs with each of :func:`candidate_blocks`, beside the bare product of states and
head and beside the tile backend. Each is compiled, compared with float64 and timed in turns with
the bare product; the best are then timed together, which decides. The result holds a row for the
table of measurements that ``backend="auto"`` and the fused kernel look into, ready to paste.

Without CUDA everything runs in Triton's interpreter, with the same sizes: whether it is right can
be seen there, how fast it is cannot.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onlinesel.bench._inputs import HeadSizes
from onlinesel.bench._interpreter import interpret_without_cuda
from onlinesel.bench._search import Search
from onlinesel.bench._settings import command, load, machine, numbers, settle, threads_set
from onlinesel.bench._text import bars, headline, new_figure, remarks, table, unmeasured
from onlinesel.kernels._blocks import Blocks, candidate_blocks, shared_memory
from onlinesel.kernels._measured import entry_text

__all__ = ["add_arguments", "as_text", "bench_blocks", "figure", "run"]

_NO_SPEED = "Interpreted on a CPU: the seconds are no speeds of a GPU, and nothing is to be pasted."
_SYNTHETIC = "States and heads are synthetic; no trained model was measured."


def bench_blocks(
    tokens: int = 8192,
    width: int | Sequence[int] = (896, 3584),
    vocab: int = 151936,
    repeats: int | None = None,
    *,
    seconds: float = 60.0,
    candidates: Sequence[Blocks] | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    error_tokens: int = 256,
    threads: int | None = None,
    seed: int = 0,
    source: str = "bench_blocks",
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Search the fastest sizes of the fused kernel.

    Args:
        tokens: Tokens.
        width: Hidden size, or several: each candidate is tried with all of them.
        vocab: Vocabulary size.
        repeats: Timed runs of the finalists, whose median counts; 3 on a CPU, 20 on a GPU.
        seconds: When no further candidate is begun; the best are then timed together.
        candidates: What is tried, in this order, or None for those of this device and dtype.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        dtype: Of states and head.
        error_tokens: Tokens that are compared with float64.
        threads: Threads of torch on the CPU, or None to leave them. Restored at the end.
        seed: Of the inputs.
        source: What the comment of the row names: the command.
        progress: Told the result so far, ready for JSON, after every candidate.

    Returns:
        Settings, and ``points``: for each width the ``ways`` by name, the ``winner`` among the
        candidates, the ``fastest`` backend, and ``entry``, the text of the row.

    Raises:
        ValueError: A number is out of its range; an unknown device or dtype.
        RuntimeError: There is no CUDA, and triton does not interpret.
    """
    began = time.perf_counter()
    widths = [width] if isinstance(width, int) else list(width)
    where, kind, repeats = settle(
        "bench_blocks", device, dtype, repeats, tokens=tokens, vocab=vocab,
        error_tokens=error_tokens, width=min(widths),
    )  # fmt: skip
    if not seconds > 0:
        raise ValueError(f"bench_blocks: seconds must be positive, got {seconds}. Give it time.")
    if where.type != "cuda":
        interpret_without_cuda("bench_blocks")
    tried = candidate_blocks(kind, shared_memory(where)) if candidates is None else candidates
    sizes = [HeadSizes(1, tokens, one, vocab, kind, where, seed=seed) for one in widths]
    with threads_set(threads, where):
        result = _facts(sizes[0], repeats)
        result |= {"seconds": seconds, "error_tokens": error_tokens, "source": source}
        searches = [Search(one, error_tokens, tried, repeats) for one in sizes]
        result["points"] = [search.point for search in searches]
        _run(searches, tried, began + seconds, result, progress)
    return result


def _facts(sizes: HeadSizes, repeats: int) -> dict[str, Any]:
    interpreted = sizes.device.type != "cuda"
    return {
        "what": "sizes of the fused kernel", **sizes.facts(), "repeats": repeats,
        **machine(sizes.device), "triton": importlib.import_module("triton").__version__,
        "interpreted": interpreted, "notes": [_SYNTHETIC, *([_NO_SPEED] if interpreted else [])],
    }  # fmt: skip


def _run(
    searches: Sequence[Search],
    candidates: Sequence[Blocks],
    end: float,
    result: dict[str, Any],
    progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    def tell() -> None:
        entries = [entry for search in searches for entry in search.point["ways"].values()]
        result["not_measured"] = unmeasured(entries)
        if progress is not None:
            progress(result)

    for search in searches:
        search.begin()
    tell()
    # Candidates outside, widths inside: a kernel is compiled once, and all widths see as many.
    for blocks in candidates:
        if time.perf_counter() >= end:
            break
        for search in searches:
            search.look(blocks)
        tell()
    for search in searches:
        search.decide()
        search.point["entry"] = _row_text(search, result)
    result["load_after"] = load()
    tell()


def _row_text(search: Search, result: Mapping[str, Any]) -> str | None:
    """Return the row that was chosen, with what gave it as a comment."""
    if search.chosen is None:
        return None
    ways = search.point["ways"]
    shares = ", ".join(
        f"{name} {ways[name]['of_gemm']:.2f}"
        for name in ("tile", search.point["winner"]) if name and "of_gemm" in ways[name]
    )  # fmt: skip
    where = result.get("gpu") or result["processor"]
    versions = f"torch {result['torch']}, triton {result['triton']}"
    lines = [f"{where}, {versions}, {result['date']}", f"of the bare product: {shares}"]
    lines.insert(0, result["source"])
    if result["interpreted"]:
        lines.insert(0, "Interpreted on a CPU, no speed: do not paste. No device is (0, 0).")
    return entry_text(search.chosen, "\n".join(lines))


def as_text(result: dict[str, Any]) -> str:
    """Return a result as the table that the command prints."""
    lines = []
    for point in result["points"]:
        lines += [
            f"{result['tokens']} tokens, width {point['width']}, vocabulary {result['vocab']}; "
            f"{headline(result)}, triton {result['triton']}", "",
            _width_table(point), "",
            f"fastest sizes: {point['winner']}; fastest backend: {point['fastest']}", "",
        ]  # fmt: skip
        if point["entry"] is not None:
            lines += ["A row for MEASURED in onlinesel/kernels/_measured.py:", point["entry"], ""]
    return "\n".join([*lines, *remarks(result)])


def _width_table(point: dict[str, Any]) -> str:
    def error(name: str, kind: str) -> Any:
        return lambda entry: entry.get("error", {}).get(name, {}).get(kind)

    return table(
        f"Tokens x entries x depth, w warps, s stages, t tiles, g together; logits up to "
        f"{point['largest_logit']:.0f}",
        list(point["ways"].values()),
        [
            ("ms", lambda entry: entry["seconds"] * 1e3, ".3f"),
            ("of GEMM", lambda entry: entry.get("of_gemm"), ".2f"),
            ("first s", lambda entry: entry.get("first_seconds"), ".2f"),
            ("nll abs", error("nll", "max_abs"), ".1e"),
            ("entropy", error("entropy", "max_abs"), ".1e"),
            ("el2n rel", error("el2n", "max_rel"), ".1e"),
        ],
    )


def figure(result: dict[str, Any], path: str) -> None:
    """Draw the speed of every way against the bare product.

    Args:
        result: What :func:`bench_blocks` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing = new_figure("blocks", 1, 4.2)
    points = result["points"]
    labels = [entry["label"] for entry in points[0]["ways"].values()]
    series = {
        f"width {point['width']}": [entry.get("of_gemm") for entry in point["ways"].values()]
        for point in points
    }
    bars(drawing.axes[0], labels, series, "speed of the bare product = 1")
    title = f"{result['tokens']} tokens, vocabulary {result['vocab']}; {headline(result)}"
    title += "; interpreted: no speeds" if result["interpreted"] else ""
    drawing.suptitle(title, fontsize=7)
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench blocks``."""
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="tokens")
    add("--width", type=numbers, default="896,3584", help="hidden sizes, with commas between them")
    add("--vocab", type=int, default=151936, help="vocabulary size")
    add("--seconds", type=float, default=60.0, help="when no further candidate is begun")
    add("--error-tokens", type=int, default=256, help="tokens that are compared with float64")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto takes CUDA where there is one")
    add("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    add("--repeats", type=int, help="timed runs of the best; by default 3 on a CPU, 20 on a GPU")
    add("--threads", type=int, default=1, help="threads of torch on the CPU")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    line = command("blocks", args)
    result = bench_blocks(
        args.tokens, args.width, args.vocab, args.repeats, seconds=args.seconds,
        device=args.device, dtype=args.dtype, error_tokens=args.error_tokens,
        threads=args.threads, seed=args.seed, source=line,
    )  # fmt: skip
    return {"command": line, **result}, as_text(result)
