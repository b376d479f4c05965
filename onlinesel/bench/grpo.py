"""``onlinesel bench grpo``: a policy's head, forward and backward, with tokens that do not count.

A GRPO step wants log-probabilities and entropies that are differentiable. Where a loss drops, clips
or masks tokens, their upstream gradient is zero, and ``policy_logprobs`` leaves them out of its
backward pass. It is compared with plain torch, TRL's fused head and Liger, for several shares of
such tokens, up to the gradients of states and head. Roofs are the three bare products, and the same
with the backward's two over the kept tokens alone. Errors are of the gradients, against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import release, take_turns
from onlinesel.bench._policy import POLICY_WAYS, PolicyErrors, forwards
from onlinesel.bench._settings import add_common, command, load, machine, settle, threads_set
from onlinesel.bench._text import (
    Column,
    bars,
    headline,
    new_figure,
    remarks,
    speed_of,
    table,
    unmeasured,
)
from onlinesel.bench._ways import compare, note_failure

__all__ = ["add_arguments", "as_text", "bench_grpo", "figure", "run"]

_NOTES = (
    "States, head and upstream gradients are synthetic; no trained model was measured.",
    "The loss of the policy, which is elementwise, and the optimizer are not part of it.",
    "Liger's fused and cut-cross-entropy's loss give no entropy, and are not compared.",
)


def bench_grpo(
    tokens: int = 256,
    width: int = 896,
    vocab: int = 151936,
    repeats: int | None = None,
    *,
    dropped: Sequence[float] = (0.0, 0.5, 0.8),
    batch: int = 1,
    device: str = "auto",
    dtype: str = "float32",
    error_tokens: int = 64,
    threads: int | None = None,
    memory: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare ways to the gradients of log-probabilities and entropies.

    Args:
        tokens: Tokens of a row.
        width: Hidden size.
        vocab: Vocabulary size.
        repeats: Timed runs, whose median counts; 3 on a CPU and 20 on a GPU by default, and fewer
            of a way that takes over a minute for them.
        dropped: Shares of tokens without upstream gradient, each below 1.
        batch: Rows.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        dtype: Of states and head.
        error_tokens: Tokens whose gradients are compared with float64.
        threads: Threads of torch on the CPU, or None to leave them. Restored at the end.
        memory: Measure peak memory as well, gradients included.
        seed: Of the inputs.

    Returns:
        Settings, and ``points``: for each share what the ways take, their errors, and ratios.

    Raises:
        ValueError: A number is out of its range; an unknown device or dtype.

    Example:
        >>> result = bench_grpo(8, 8, 50, repeats=1, dropped=[0.5], device="cpu", memory=False)
        >>> result["points"][0]["ways"]["torch"]["error"]["weight"]["relative"] < 1e-5
        True
    """
    where, kind, repeats = settle(
        "bench_grpo", device, dtype, repeats, tokens=tokens, width=width, vocab=vocab, batch=batch,
        error_tokens=error_tokens,
    )  # fmt: skip
    for share in dropped:
        if not 0 <= share < 1:
            rule = "shares of at least 0 and below 1"
            raise ValueError(f"bench_grpo: dropped must be {rule}, got {share}. Keep some tokens.")
    sizes = [HeadSizes(batch, tokens, width, vocab, kind, where, x, seed) for x in dropped]
    with threads_set(threads, where):
        result = {"what": "gradients of a policy's head", "width": width, **sizes[0].facts()}
        result |= {"repeats": repeats, "error_tokens": error_tokens, **machine(where)}
        result["gradients_mib"] = (batch * tokens + vocab) * width * kind.itemsize / 2**20
        result["points"] = [_point(one, repeats, error_tokens, memory) for one in sizes]
    result["load_after"] = load()
    result["not_measured"] = unmeasured([e for p in result["points"] for e in p["ways"].values()])
    return {**result, "notes": list(_NOTES)}


def _point(sizes: HeadSizes, repeats: int, error_tokens: int, memory: bool) -> dict[str, Any]:
    release(sizes.device)
    inputs = HeadInputs(sizes)
    errors = PolicyErrors(inputs, error_tokens)
    ways = compare(POLICY_WAYS, inputs, errors, repeats=repeats, memory=memory)
    _time_backwards(ways, inputs, repeats)
    return {"dropped": sizes.dropped, "ways": ways, "speedup": _ratios(ways)}


def _time_backwards(ways: dict[str, Any], inputs: HeadInputs, repeats: int) -> None:
    """Note the seconds of the backward: what forward and backward take beyond the forward."""
    calls = forwards(inputs, [name for name, entry in ways.items() if "seconds" in entry])

    def failed(name: str, error: Exception) -> None:
        note_failure(ways[name], error)

    for name, seconds in take_turns(calls, repeats, inputs.sizes.device, failed).items():
        ways[name]["backward_seconds"] = max(0.0, ways[name]["seconds"] - median(seconds))


def _ratios(ways: dict[str, Any]) -> dict[str, float]:
    """Return how many times faster the fastest backend is than each of the others.

    ``over_`` is for forward and backward, ``backward_over_`` for the backward of that backend.
    """
    ran = {name: entry for name, entry in ways.items() if "seconds" in entry}
    backends = [ran[name] for name in ("torch", "tile", "triton") if name in ran]
    if not backends:
        return {}
    best, found = min(backends, key=lambda entry: entry["seconds"]), {}
    for name in ("log_softmax", "trl", "liger_scaled"):
        if name in ran:
            found[f"over_{name}"] = ran[name]["seconds"] / best["seconds"]
            if best.get("backward_seconds") and "backward_seconds" in ran[name]:
                ratio = ran[name]["backward_seconds"] / best["backward_seconds"]
                found[f"backward_over_{name}"] = ratio
    return found


def as_text(result: dict[str, Any]) -> str:
    """Return a result as the table that the command prints."""
    lines = [
        f"{result['batch']} x {result['tokens']} tokens, width {result['width']}, vocabulary "
        f"{result['vocab']}; {headline(result)}",
        "Forward and backward; errors of the gradients against float64, relative norms.",
    ]
    for point in result["points"]:
        entries = point["ways"]
        columns: list[Column] = [
            ("ms", lambda entry: entry["seconds"] * 1e3, ".3f"),
            ("backward", lambda entry: entry.get("backward_seconds", 0) * 1e3 or None, ".3f"),
            speed_of(entries["gemm"]),
            ("GFLOP", lambda entry: entry.get("gflop"), ".1f"),
            ("peak MiB", lambda entry: entry.get("peak_mib"), ".1f"),
            ("states", lambda entry: entry["error"].get("states", {}).get("relative"), ".1e"),
            ("weight", lambda entry: entry["error"].get("weight", {}).get("relative"), ".1e"),
        ]
        title = f"{point['dropped']:.0%} of the tokens without upstream gradient"
        lines += ["", table(title, list(entries.values()), columns)]
        lines += [f"speed ratio, {name}: {value:.2f}" for name, value in point["speedup"].items()]
    lines += ["", f"The gradients themselves take {result['gradients_mib']:.1f} MiB of the peaks."]
    return "\n".join([*lines, *remarks(result)])


def figure(result: dict[str, Any], path: str) -> None:
    """Draw seconds and peak memory, by the share of tokens without upstream gradient.

    Args:
        result: What :func:`bench_grpo` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing = new_figure("grpo", 2, 3.8)
    points = result["points"]
    labels = [entry["label"] for entry in points[0]["ways"].values()]
    parts = (("seconds", "seconds, forward and backward"), ("peak_mib", "peak MiB beyond inputs"))
    for axes, (key, unit) in zip(drawing.axes, parts, strict=True):
        series = {
            f"{p['dropped']:.0%} dropped": [e.get(key) for e in p["ways"].values()] for p in points
        }
        bars(axes, labels, series, unit)
    drawing.suptitle(
        f"{result['batch']} x {result['tokens']} tokens, width {result['width']}, vocabulary "
        f"{result['vocab']}; {headline(result)}", fontsize=9,
    )  # fmt: skip
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench grpo``."""

    def shares(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    add = parser.add_argument
    add("--batch", type=int, default=1, help="rows")
    add("--tokens", type=int, default=256, help="tokens of a row")
    add("--width", type=int, default=896, help="hidden size")
    add("--vocab", type=int, default=151936, help="vocabulary size")
    add("--dropped", type=shares, default="0,0.5,0.8",
        help="shares of tokens without upstream gradient, with commas between them")  # fmt: skip
    add("--error-tokens", type=int, default=64, help="tokens that are compared with float64")
    add("--seed", type=int, default=0, help="of the inputs")
    add_common(parser, "timed runs of each way; by default 3 on a CPU, 20 on a GPU")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    result = bench_grpo(
        args.tokens, args.width, args.vocab, args.repeats, dropped=args.dropped, batch=args.batch,
        device=args.device, dtype=args.dtype, error_tokens=args.error_tokens,
        threads=args.threads, memory=not args.no_memory, seed=args.seed,
    )  # fmt: skip
    return {"command": command("grpo", args), **result}, as_text(result)
