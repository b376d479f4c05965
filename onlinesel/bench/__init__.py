"""Benchmarks on the machine at hand: ``onlinesel bench scores|scale``.

``scores`` times the kernels against the plain way (:mod:`onlinesel.bench.scores`); ``scale`` times
the decision of a step for up to thousands of simulated ranks and models what they would send each
other (:mod:`onlinesel.bench.scale`). ``python -m onlinesel.bench`` does the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from onlinesel.bench import scale, scores
from onlinesel.bench.scale import bench_scale
from onlinesel.bench.scores import bench_scores

__all__ = ["bench_scale", "bench_scores", "main"]

_BENCHMARKS = {
    "scores": (scores, "scores from hidden states against scores from logits"),
    "scale": (scale, "the decision of a step, with simulated ranks and large ledgers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line, print its table and write its JSON.

    Args:
        argv: Arguments without the program's name, or None for those of the process.

    Returns:
        0, the exit status.

    Example:
        >>> main(["scores", "--tokens", "2", "--width", "4", "--vocab", "9", "--no-memory"])
        ... # doctest: +ELLIPSIS
        2 tokens, width 4, vocabulary 9; ...
        0
    """
    parser = argparse.ArgumentParser(
        prog="onlinesel bench", description="Time parts of onlinesel on this machine."
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (module, text) in _BENCHMARKS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(argv)
    module, _ = _BENCHMARKS[args.what]
    result, table = module.run(args)
    print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 0
