"""Benchmarks on the machine at hand: ``onlinesel bench NAME``, by these names.

- ``gpu`` runs the others at the sizes of a GPU, with a time limit (:mod:`onlinesel.bench.gpu`);
- ``scores`` times scores from hidden states against those from logits, the heads of other packages
  and the bare product (:mod:`onlinesel.bench.scores`);
- ``step`` times whole training steps of transformers' Trainer, all rows and selected ones
  (``onlinesel.recipes.bench_step``, which needs ``onlinesel[hf]``);
- ``grpo`` times a policy's head, forward and backward (:mod:`onlinesel.bench.grpo`);
- ``blocks`` searches the fastest sizes of the fused kernel (:mod:`onlinesel.bench.blocks`);
- ``compiled`` counts what the kernels take of a GPU that is not there
  (:mod:`onlinesel.bench.compiled`);
- ``scale`` times the decision of a step for up to thousands of simulated ranks and models what they
  would send each other (:mod:`onlinesel.bench.scale`).

Each prints a table; ``--json`` and ``--figure`` write files. ``python -m onlinesel.bench`` does the
same. A benchmark is a module with ``add_arguments``, ``run`` and ``figure``, and a row in the table
below.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from onlinesel.bench._text import new_figure
from onlinesel.bench._ways import own_failures
from onlinesel.bench.blocks import bench_blocks
from onlinesel.bench.compiled import bench_compiled
from onlinesel.bench.gpu import bench_gpu
from onlinesel.bench.grpo import bench_grpo
from onlinesel.bench.scale import bench_scale
from onlinesel.bench.scores import bench_scores

__all__ = [
    "bench_blocks", "bench_compiled", "bench_gpu", "bench_grpo", "bench_scale", "bench_scores",
    "main",
]  # fmt: skip

# Imported when it is asked for: some need a trainer or triton.
_BENCHMARKS = {
    "gpu": ("onlinesel.bench.gpu", "everything that a GPU can say, within some minutes"),
    "scores": ("onlinesel.bench.scores", "scores from hidden states, and the heads of others"),
    "step": ("onlinesel.recipes.bench_step", "training steps, on all rows and on chosen ones"),
    "grpo": ("onlinesel.bench.grpo", "a policy's head, forward and backward"),
    "blocks": ("onlinesel.bench.blocks", "sizes of the fused kernel, and the fastest backend"),
    "compiled": ("onlinesel.bench.compiled", "what the Triton kernels take of a GPU, without one"),
    "scale": ("onlinesel.bench.scale", "the decision of a step, with many ranks and large ledgers"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line, print its table, write its JSON and its figure.

    Args:
        argv: Arguments without the program's name, or None for those of the process.

    Returns:
        The exit status: 0, or 1 if something of this project failed in it; the table and the JSON
        then say what.

    Example:
        >>> main("scores --tokens 2 --width 4 --vocab 9 --device cpu --no-memory".split())
        ... # doctest: +ELLIPSIS
        1 x 2 tokens, width 4, vocabulary 9; ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="onlinesel bench", description="Time parts of onlinesel on this machine."
    )
    commands = parser.add_subparsers(dest="what", required=True)
    chosen = next((word for word in arguments if word in _BENCHMARKS), None)
    for name, (place, text) in _BENCHMARKS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if name == chosen:
            module = importlib.import_module(place)
            module.add_arguments(command)
            command.add_argument("--json", metavar="FILE", help="write the result there")
            command.add_argument(
                "--figure", metavar="FILE", help="draw the result there (needs matplotlib)"
            )
    args = parser.parse_args(arguments)
    if args.figure:
        new_figure(args.what, 1, 1.0)  # what it needs is there, before minutes are spent
    result, table = module.run(args)
    print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    if args.figure:
        module.figure(result, args.figure)
    failures = own_failures(result)
    for line in failures:
        sys.stderr.write(f"onlinesel bench {args.what}: {line}\n")
    return 1 if failures else 0
