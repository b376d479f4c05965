"""``onlinesel bench step``: rows per second of training steps, on all rows and on chosen ones.

    onlinesel bench step                                            # a small model, on a CPU
    onlinesel bench step --preset qwen2.5-0.5b --dtype bfloat16 --rows 8 --tokens 512   # on a GPU

What it does: transformers' Trainer trains a Qwen2 of random weights (the presets have the sizes of
the published models, vocabulary included) in five ways: on all candidate rows, without and with
activation checkpointing; and on one of every ``--candidates`` of them, chosen by
``OnlineSelection`` without checkpointing, with it, and with ``reuse_forward``. A step is timed from
end to end: loading, scoring, choosing, training, optimizer. Rows per second are candidate rows,
which all five ways go through equally often.

In one untimed step of each it is counted how often a layer forwards a candidate row, and what the
matrix products add up to; and the gradients are compared: checkpointing and reusing must not
change them. A forward costs one, a backward two: with a kept share ``k`` the layers allow
``3 / (1 + 3k)`` times the rows of training on all of them without checkpointing, and with it
``4 / (1 + 4k)``, or ``4 / (1 + 3k)`` if the scoring forward is reused.

Measured (``onlinesel bench step``, float32, one thread of an AMD EPYC, torch 2.13, 2026-11-25; a
model of 8 layers, width 384, 16 candidates of 128 tokens, UDS; median of 6 steps, seed 0;
``recipes/results/bench_step_cpu.json``): 1.81 times the rows per second of training on all of them
without checkpointing, and against all of them with it 1.98, or 2.11 with ``reuse_forward``.
``docs/gpu.md`` has what a GPU measured.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from statistics import median
from typing import Any

import torch

from onlinesel.bench._measure import in_fresh_process, release
from onlinesel.bench._settings import (
    add_common,
    at_least,
    command,
    load,
    machine,
    threads_set,
)
from onlinesel.bench._text import bars, headline, new_figure, remarks, table, unmeasured
from onlinesel.bench._ways import note_failure

try:
    from onlinesel.recipes._bench_trainer import (
        PRESETS,
        SIDES,
        StepSizes,
        first_step,
        seconds,
        step_peak,
    )
except ImportError as error:
    raise ImportError(
        'onlinesel bench step needs transformers: pip install "onlinesel[hf]".'
    ) from error

__all__ = ["StepSizes", "add_arguments", "as_text", "bench_step", "figure", "run"]

_NOTES = (
    "Weights and rows are random: what the choice does to learning is not part of this.",
    "Rows are equally long, and there is one process.",
    "Limits count the layers alone; where scoring leaves out the LM head, as UDS does, more can be "
    "reached. The counted ratio is of all matrix products and attention, and of nothing else.",
)
_BOUND = {"float32": 1e-5}  # on the difference of gradients; 16-bit rounding has none of its own


def bench_step(
    sizes: StepSizes | None = None,
    *,
    steps: int | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    memory: bool = True,
) -> dict[str, Any]:
    """Time training steps on all candidate rows, and on the chosen ones.

    Args:
        sizes: What is trained.
        steps: Timed steps of a turn; by default 2 on a CPU and 10 on a GPU.
        repeats: Turns of each way; by default 3.
        threads: Threads of torch on the CPU, or None to leave them. Restored at the end.
        memory: Measure peak memory as well.

    Returns:
        Settings, and ``sides``: seconds of a step (median of all steps of all turns), rows per
        second, how often a layer forwards a candidate, ratios to training on all rows with the
        limits that forwards and backwards set and those that the products set, difference of the
        gradient to that of the way it must equal, and mebibytes.

    Raises:
        ValueError: A number below 1.

    Example:
        >>> sizes = StepSizes("tiny", rows=1, tokens=8, device="cpu")
        >>> result = bench_step(sizes, steps=1, repeats=1, memory=False)
        >>> result["sides"]["selected_reused"]["forwards"]
        1.25
    """
    sizes = sizes or StepSizes()
    steps = (10 if sizes.where.type == "cuda" else 2) if steps is None else steps
    repeats = 3 if repeats is None else repeats
    at_least("bench_step", 1, steps=steps, repeats=repeats)
    with threads_set(threads):
        result: dict[str, Any] = {"what": "whole training steps", **PRESETS[sizes.preset]}
        result |= {**asdict(sizes), "micro_batch": sizes.together, "scored_rows": sizes.scored}
        result |= {"steps": steps, "repeats": repeats, **machine(sizes.where)}
        result["sides"] = sides = _measure(sizes, steps, repeats, memory)
        result["load_after"] = load()
    bound = _BOUND.get(sizes.dtype)
    for entry in sides.values():
        apart = entry.get("gradient_difference")
        if bound is not None and apart is not None and apart > bound:
            failed = f"its gradient differs by {apart:.1e}, more than {bound:g}"
            result["disagreement"] = {"label": entry["label"], "ours": True, "failed": failed}
    return {**result, "notes": list(_NOTES), "not_measured": unmeasured(list(sides.values()))}


def _measure(sizes: StepSizes, steps: int, repeats: int, memory: bool) -> dict[str, Any]:
    """Count, time and weigh every side; one that raises is left out with its error."""
    found: dict[str, dict[str, Any]] = {
        name: {"label": side.label, "ours": side.selects} for name, side in SIDES.items()
    }
    _count(sizes, found)
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(repeats + memory):
        for name, side in SIDES.items():
            entry = found[name]
            if "failed" in entry:
                continue
            try:
                if turn < repeats:
                    taken[name] += seconds(sizes, side, steps)
                elif sizes.where.type == "cuda":
                    entry["peak_mib"] = step_peak(sizes, side)
                else:
                    entry["peak_mib"] = in_fresh_process(step_peak, sizes, side)
            except Exception as error:
                note_failure(entry, error)
            release(sizes.where)
    for name, entry in found.items():
        if "failed" not in entry:
            middle = median(taken[name])
            entry |= {
                "seconds": middle, "spread": [min(taken[name]), max(taken[name])],
                "rows_per_second": sizes.scored / middle,
            }  # fmt: skip
    for base in ("all", "all_checkpointed"):
        _compare(found, base)
    return found


def _count(sizes: StepSizes, found: dict[str, dict[str, Any]]) -> None:
    """Take one step of every side, count what it does, and compare gradients."""
    gradients: dict[str, Any] = {}
    for name, side in SIDES.items():
        entry = found[name]
        try:
            step = first_step(sizes, side)
        except Exception as error:
            note_failure(entry, error)
            gradients = {}
            continue
        finally:
            release(sizes.where)
        share = 1 / sizes.candidates if side.selects else 1.0
        # A backward costs two forwards.
        entry |= {"forwards": step.forwards, "forward_units": step.forwards + 2 * share}
        entry["gflop"] = step.flops / 1e9
        if side.like in gradients:
            other = gradients[side.like]
            entry["gradient_difference"] = _apart(step.gradient, other)
        gradients = {name: step.gradient}  # the next one is compared with this one, if at all


def _apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two gradients, relative to that of the second."""
    assert one.keys() == two.keys()
    # The difference of two 16-bit numbers is exact in float32, and its norm is summed in parallel.
    apart = sum(float((one[n].float() - two[n].float()).norm()) ** 2 for n in one)
    whole = sum(float(two[n].float().norm()) ** 2 for n in one)
    return (apart / whole) ** 0.5


def _compare(found: dict[str, dict[str, Any]], base: str) -> None:
    """Note how many times the rows per second of a base each side reaches, and what limits it."""
    for entry in found.values():
        for key, value in (
            (f"over_{base}", "seconds"),
            (f"limit_over_{base}", "forward_units"),
            (f"counted_over_{base}", "gflop"),
        ):
            if value in found[base] and value in entry:
                entry[key] = found[base][value] / entry[value]


def as_text(result: dict[str, Any]) -> str:
    """Return a result as the table that the command prints."""

    def cell(name: str, form: str, heading: str) -> Any:
        return heading, lambda entry: entry.get(name), form

    kept = f"1 of {result['candidates']} candidates trains, chosen by {result['strategy']}"
    title = (
        f"{result['preset']}: {result['scored_rows']} candidate rows of {result['tokens']} tokens "
        f"a step; {headline(result)}\n{kept}. Ratios of rows per second to training on all rows, "
        "without\nand with (ck.) checkpointing; limits by forwards and backwards of the layers."
    )
    columns = [
        cell("rows_per_second", ".2f", "rows/s"),
        cell("forwards", ".2f", "forwards"),
        cell("over_all", ".2f", "ratio"),
        cell("limit_over_all", ".2f", "limit"),
        cell("over_all_checkpointed", ".2f", "ratio ck."),
        cell("limit_over_all_checkpointed", ".2f", "limit ck."),
        cell("counted_over_all", ".2f", "counted"),
        cell("peak_mib", ".0f", "peak MiB"),
        cell("gradient_difference", ".0e", "gradient"),
    ]
    lines = [table(title, list(result["sides"].values()), columns), ""]
    if "disagreement" in result:
        lines.append("{label}: {failed}".format(**result["disagreement"]))
    like = [f"{side.label} = {SIDES[side.like].label}" for side in SIDES.values() if side.like]
    lines.append(f"gradient: relative difference of {'; '.join(like)}.")
    lines.append("counted: ratio of the products of a whole step, LM head and scoring included.")
    lines.append("peak MiB: beyond weights and optimizer states, gradients included.")
    return "\n".join([*lines, *remarks(result)])


def figure(result: dict[str, Any], path: str) -> None:
    """Draw the rows per second with their limits, and peak memory.

    Args:
        result: What :func:`bench_step` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing = new_figure("step", 2, 3.2)
    sides = [entry for entry in result["sides"].values() if "seconds" in entry]
    labels = [entry["label"] for entry in sides]
    speed, memory = drawing.axes
    ratios = {
        "measured": [entry.get("over_all") for entry in sides],
        "limit by forwards and backwards": [entry.get("limit_over_all") for entry in sides],
    }
    bars(speed, labels, ratios, "rows per second; all rows without checkpointing = 1")
    peaks = [entry.get("peak_mib") for entry in sides]
    bars(memory, labels, {"": peaks}, "peak MiB beyond weights and optimizer")
    drawing.suptitle(
        f"{result['preset']}, {result['scored_rows']} candidate rows of {result['tokens']} tokens, "
        f"{result['strategy']} keeps 1 of {result['candidates']}; {headline(result)}", fontsize=8,
    )  # fmt: skip
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench step``."""
    add = parser.add_argument
    add("--preset", default="small", help=f"model: one of {', '.join(PRESETS)}")
    add("--rows", type=int, default=4, help="rows that train in a micro-batch, if chosen")
    add("--candidates", type=int, default=4, help="rows scored for each of them")
    add("--tokens", type=int, default=128, help="length of a row")
    add("--accumulate", type=int, default=1, help="micro-batches of a step, if rows are chosen")
    add("--micro-batch", type=int, help="rows of a micro-batch, if all rows train; by default "
        "rows * candidates")  # fmt: skip
    add("--strategy", default="UDS", help="method that chooses")
    add("--steps", type=int, help="timed steps of a turn; by default 2 on a CPU, 10 on a GPU")
    add("--seed", type=int, default=0, help="of weights, rows and selection")
    add_common(parser, "turns of each way; by default 3")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    sizes = StepSizes(**{field.name: getattr(args, field.name) for field in fields(StepSizes)})
    result = bench_step(
        sizes, steps=args.steps, repeats=args.repeats, threads=args.threads,
        memory=not args.no_memory,
    )  # fmt: skip
    return {"command": command("step", args), **result}, as_text(result)
