"""``onlinesel bench scores``: scores from hidden states against the same scores from logits.

Two comparisons, for every width asked for. Scores of tokens: each backend of ``token_scores``, a
plain log-softmax, TRL's fused head, Liger and cut-cross-entropy, and the bare product of states and
head, which is the roof. Scores of UDS, which are nuclear norm and embedding of a row's logits: from
the logits, as the paper (arXiv 2510.16882) takes them, and from the hidden states.

All ways work on the same synthetic inputs, in one process and in turns. Errors are against float64
from the same inputs. Peak memory is what a call takes beyond its inputs: on a GPU by torch's
allocator, on a CPU by the resident memory of a fresh process.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import release
from onlinesel.bench._settings import (
    add_common,
    command,
    load,
    machine,
    numbers,
    settle,
    threads_set,
)
from onlinesel.bench._text import (
    bars,
    headline,
    new_figure,
    remarks,
    speed_of,
    table,
    unmeasured,
)
from onlinesel.bench._tokens import TOKEN_WAYS, TokenErrors
from onlinesel.bench._uds import UDS_WAYS, UDSErrors
from onlinesel.bench._ways import compare

__all__ = ["PARTS", "add_arguments", "as_text", "bench_scores", "figure", "run"]

PARTS = ("token_scores", "uds")

_NOTES = (
    "States and heads are synthetic; no trained model was measured.",
    "Liger's fused loss and cut-cross-entropy's give no entropy. TRL's EL2N is worked out from "
    "what its head gives, which cancels where a label is nearly certain; the others give none.",
)


def bench_scores(
    tokens: int = 256,
    width: int | Sequence[int] = 896,
    vocab: int = 151936,
    repeats: int | None = None,
    *,
    batch: int = 1,
    device: str = "auto",
    dtype: str = "float32",
    error_tokens: int = 64,
    threads: int | None = None,
    memory: bool = True,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Compare ways to score tokens, and ways to the scores of UDS.

    Args:
        tokens: Tokens of a row.
        width: Hidden size, or several.
        vocab: Vocabulary size.
        repeats: Timed runs, whose median counts; 3 on a CPU and 20 on a GPU by default, and fewer
            of a way that takes over a minute for them.
        batch: Rows.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        dtype: Of states and head.
        error_tokens: Tokens that are compared with float64.
        threads: Threads of torch on the CPU, or None to leave them. Restored at the end.
        memory: Measure peak memory as well.
        seed: Of the inputs.
        parts: What is compared: ``"token_scores"``, ``"uds"``, or both.

    Returns:
        Settings, and ``points``: for each width what the ways take, their errors, and ratios.

    Raises:
        ValueError: A size or the number of repeats is below 1; an unknown device, dtype or part.

    Example:
        >>> result = bench_scores(4, 8, 50, repeats=1, device="cpu", memory=False)
        >>> result["points"][0]["uds"]["uds"]["error"]["nuclear_norm"]["relative"] < 1e-5
        True
    """
    widths = [width] if isinstance(width, int) else list(width)
    where, kind, repeats = settle(
        "bench_scores", device, dtype, repeats, tokens=tokens, vocab=vocab, batch=batch,
        error_tokens=error_tokens, width=min(widths),
    )  # fmt: skip
    if not parts or set(parts) - set(PARTS):
        rule = f"among {', '.join(PARTS)}, got {','.join(parts)!r}"
        raise ValueError(f"bench_scores: parts must be {rule}. Pass one of them, or both.")
    sizes = [HeadSizes(batch, tokens, size, vocab, kind, where, seed=seed) for size in widths]
    with threads_set(threads, where):
        result = {"what": "scores of tokens, and of UDS, from hidden states", **sizes[0].facts()}
        result |= {"repeats": repeats, "error_tokens": error_tokens, **machine(where)}
        result["points"] = [_point(one, repeats, error_tokens, memory, parts) for one in sizes]
        result["load_after"] = load()
    entries = [e for p in result["points"] for part in parts for e in p[part].values()]
    return {**result, "notes": list(_NOTES), "not_measured": unmeasured(entries)}


def _point(
    sizes: HeadSizes, repeats: int, error_tokens: int, memory: bool, parts: Sequence[str]
) -> dict[str, Any]:
    release(sizes.device)
    inputs = HeadInputs(sizes)
    found: dict[str, Any] = {"width": sizes.width}
    if "token_scores" in parts:
        errors = TokenErrors(inputs, error_tokens)
        found["largest_logit"] = errors.largest_logit
        found["token_scores"] = compare(TOKEN_WAYS, inputs, errors, repeats=repeats, memory=memory)
    if "uds" in parts:
        found["uds"] = compare(UDS_WAYS, inputs, UDSErrors(inputs), repeats=repeats, memory=memory)
    return {**found, "speedup": _ratios(found.get("token_scores", {}), found.get("uds", {}))}


def _ratios(tokens: Mapping[str, Any], uds: Mapping[str, Any]) -> dict[str, float]:
    """Return how many times faster ours is, where both sides were measured.

    For tokens that is the fastest backend with all its six scores, whatever the other gives.
    """
    seconds = {name: e["seconds"] for name, e in {**tokens, **uds}.items() if "seconds" in e}
    found = {}
    if "plain" in seconds and "uds" in seconds:
        found["uds"] = seconds["plain"] / seconds["uds"]
        once = seconds["once_gram"] + seconds["once_fold"]
        found["uds_paying_once_every_batch"] = seconds["plain"] / (seconds["uds"] + once)
    backends = [seconds[name] for name in ("torch", "tile", "triton") if name in seconds]
    for name in ("log_softmax", "trl", "liger", "liger_scaled", "cut"):
        if name in seconds and backends:
            found[f"token_scores_over_{name}"] = seconds[name] / min(backends)
    return found


def as_text(result: dict[str, Any]) -> str:
    """Return a result as the table that the command prints."""
    lines = []
    for point in result["points"]:
        size = f"{result['batch']} x {result['tokens']} tokens, width {point['width']}, vocabulary "
        lines += [f"{size}{result['vocab']}; {headline(result)}", ""]
        for part, text in (("token_scores", _token_table), ("uds", _uds_table)):
            if part in point:
                lines += [text(point), ""]
        lines += [f"speed ratio, {name}: {value:.2f}" for name, value in point["speedup"].items()]
        lines.append("")
    return "\n".join([*lines, *remarks(result)])


def _token_table(point: dict[str, Any]) -> str:
    entries = point["token_scores"]

    def error(name: str, kind: str) -> Any:
        return lambda entry: entry["error"].get(name, {}).get(kind)

    return table(
        f"Token scores; errors against float64, logits up to {point['largest_logit']:.0f}",
        list(entries.values()),
        [
            ("ms", lambda entry: entry["seconds"] * 1e3, ".3f"),
            speed_of(entries["gemm"]),
            ("peak MiB", lambda entry: entry.get("peak_mib"), ".1f"),
            ("nll abs", error("nll", "max_abs"), ".1e"),
            ("entropy", error("entropy", "max_abs"), ".1e"),
            ("el2n rel", error("el2n", "max_rel"), ".1e"),
        ],
    )


def _uds_table(point: dict[str, Any]) -> str:
    def error(name: str) -> Any:
        return lambda entry: entry["error"].get(name, {}).get("relative")

    return table(
        "UDS: nuclear norm and embedding of each row; errors against float64",
        list(point["uds"].values()),
        [
            ("ms", lambda entry: entry["seconds"] * 1e3, ".3f"),
            ("peak MiB", lambda entry: entry.get("peak_mib"), ".1f"),
            ("norm rel", error("nuclear_norm"), ".1e"),
            ("emb. rel", error("embedding"), ".1e"),
        ],
    )


def figure(result: dict[str, Any], path: str) -> None:
    """Draw speed against the bare product, peak memory, and the seconds of UDS.

    Args:
        result: What :func:`bench_scores` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = result["points"]
    tokens, uds = (part in points[0] for part in PARTS)
    drawing = new_figure("scores", 2 * tokens + uds, 4.2)

    def draw(axes: Any, part: str, value: Any, unit: str) -> None:
        labels = [entry["label"] for entry in points[0][part].values()]
        series = {
            f"width {point['width']}": [value(point, entry) for entry in point[part].values()]
            for point in points
        }
        bars(axes, labels, series, unit)

    def share(point: dict[str, Any], entry: dict[str, Any]) -> float | None:
        roof = point["token_scores"]["gemm"].get("seconds")
        return roof / entry["seconds"] if roof and "seconds" in entry else None

    if tokens:
        speed, memory = drawing.axes[:2]
        draw(speed, "token_scores", share, "speed of the bare product = 1")
        draw(
            memory, "token_scores", lambda _, entry: entry.get("peak_mib"), "peak MiB beyond inputs"
        )
    if uds:
        draw(drawing.axes[-1], "uds", lambda _, e: e.get("seconds"), "seconds, logarithmic")
        drawing.axes[-1].set_xscale("log")
    drawing.suptitle(
        f"{result['batch']} x {result['tokens']} tokens, vocabulary {result['vocab']}; "
        f"{headline(result)}", fontsize=9,
    )  # fmt: skip
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench scores``."""
    add = parser.add_argument
    add("--batch", type=int, default=1, help="rows")
    add("--tokens", type=int, default=256, help="tokens of a row")
    add("--width", type=numbers, default="896", help="hidden sizes, with commas between them")
    add("--vocab", type=int, default=151936, help="vocabulary size")
    add("--error-tokens", type=int, default=64, help="tokens that are compared with float64")
    add("--parts", type=lambda text: text.split(","), default=",".join(PARTS),
        help="what is compared, with a comma between them")  # fmt: skip
    add("--seed", type=int, default=0, help="of the inputs")
    add_common(parser, "timed runs of each way; by default 3 on a CPU, 20 on a GPU")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    result = bench_scores(
        args.tokens, args.width, args.vocab, args.repeats, batch=args.batch, device=args.device,
        dtype=args.dtype, error_tokens=args.error_tokens, threads=args.threads,
        memory=not args.no_memory, seed=args.seed, parts=args.parts,
    )  # fmt: skip
    return {"command": command("scores", args), **result}, as_text(result)
