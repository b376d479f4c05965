"""Write what a GPU measured into the documentation: ``make results``.

    python -m onlinesel.bench.gpu.page recipes/results docs/evidence.md docs/gpu.md

Between ``<!-- gpu: targets -->`` or ``<!-- gpu: everything -->`` and ``<!-- end -->`` a document
has text that this module makes of the files ``gpu_*.json`` and of nothing else, so that no number
there was typed. A test fails where text and files differ.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onlinesel.bench import blocks, grpo, scores
from onlinesel.bench.gpu._runner import read_file
from onlinesel.bench.gpu._targets import judge

__all__ = ["draw", "filled", "main", "read_results"]

Result = dict[str, Any]
_BLOCK = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
_COMMAND = "`python -m onlinesel.bench gpu --minutes 8`"
_UNMEASURED = f"**Not yet measured: no GPU has run this code.** {_COMMAND} fills this place."


def read_results(folder: Path) -> dict[str, Result]:
    """Return the files of the phases by the phase's name; tiny ones are no measurements."""
    found = {path.stem.removeprefix("gpu_"): read_file(path) for path in folder.glob("gpu_*.json")}
    return {
        name: file
        for name, file in sorted(found.items())
        if file is not None and "key" in file and not file["key"]["tiny"]
    }


def filled(text: str, results: Mapping[str, Result]) -> str:
    """Return a document with its blocks made anew.

    Args:
        text: The document.
        results: What :func:`read_results` found.

    Raises:
        ValueError: A block that is neither ``targets`` nor ``everything``.

    Example:
        >>> print(filled("<!-- gpu: targets -->\\nold\\n<!-- end -->", {}))
        <!-- gpu: targets -->
        **Not yet measured: no GPU has run this code.** `python -m onlinesel.bench gpu --minutes 8` fills this place.
        <!-- end -->
    """  # noqa: E501

    def block(match: re.Match[str]) -> str:
        kind = match[2]
        if kind not in _MAKERS:
            raise ValueError(
                f"bench.gpu.page: a block must be one of {', '.join(_MAKERS)}, got {kind!r}. Mend "
                "the comment that begins it."
            )
        body = _MAKERS[kind](results) if results else _UNMEASURED
        return f"{match[1]}{body}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def _where(results: Mapping[str, Result]) -> str:
    """Return on what, with what and when, in a sentence."""
    machines = [file["machine"] for file in results.values()]
    dates = sorted({machine["date"][:10] for machine in machines})
    first = machines[0]
    parts = [first.get("gpu", first["processor"])]
    driver = results.get("environment", {}).get("result", {}).get("as_found", {})
    if "driver_version" in driver:
        parts.append(f"driver {driver['driver_version']}")
    parts += [f"torch {first['torch']}", f"Python {first['python']}"]
    parts += [f"{name} {number}" for name, number in first.get("versions", {}).items()]
    code = ", ".join(sorted({file["source"] for file in results.values()}))
    return f"{', '.join(parts)}; {' to '.join(dates)}; seed 0; code {code}; {_COMMAND}."


def _targets(results: Mapping[str, Result]) -> str:
    """Return the table of targets, met or missed."""
    lines = ["| | measured | target | |", "|---|---|---|---|"]
    for row in judge(results):
        value, unit = row["measured"], row["unit"]
        number = "-" if value is None else f"{value:.2f} {unit}".rstrip()
        goal = f"{'at most' if row['at_most'] else 'at least'} {row['goal']:g} {unit}".rstrip()
        verdict = f"**{row['verdict']}**" if row["verdict"] == "missed" else row["verdict"]
        lines.append(f"| {row['name']} | {number} | {goal} | {verdict} |")
    return "\n".join([*lines, "", _where(results)])


def _everything(results: Mapping[str, Result]) -> str:
    """Return the targets and each phase's own table; what failed is said with its error."""
    parts = [_targets(results)]
    for name, file in results.items():
        parts.append(f"### {name}: {file['what']}")
        if "error" in file or file["status"] not in ("done", "left out"):
            why = " ".join(file.get("error", "it ran into its limit").split())
            why = textwrap.shorten(why, 120, placeholder=" ...")
            parts.append(f"```text\n{file['status']}: {why}\n```")  # which may look like Markdown
        if "result" in file and name in _TEXTS_OF:
            text = _TEXTS_OF[name](file["result"])
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


_MAKERS: dict[str, Callable[[Mapping[str, Result]], str]] = {
    "targets": _targets,
    "everything": _everything,
}


def _environment(result: Result) -> str:
    lines = [f"{name}: {value}" for name, value in result["as_found"].items()]
    product, copy = result.get("product"), result.get("copy")
    if product:
        lines.append(
            f"product of {product['size']}^3 in {product['dtype']}: {product['tflops']:.0f} TFLOP/s"
        )
    if copy:
        lines.append(f"copy, read and written: {copy['tb_per_second']:.2f} TB/s")
    return "\n".join(lines)


def _tests(result: Result) -> str:
    lines = [f"{result['passed']} passed, {len(result['failed'])} failed, "
             f"{len(result['skipped'])} skipped"]  # fmt: skip
    lines += [f"failed: {failed['test']}" for failed in result["failed"]]
    return "\n".join([*lines, *(f"skipped: {text}" for text in result["skipped"])])


def _steps(result: Result) -> str:
    bench_step: Any = importlib.import_module("onlinesel.recipes.bench_step")  # needs a trainer
    return str(bench_step.as_text(result))


def _blocks(result: Result) -> str:
    return blocks.as_text(result)


def _callback(result: Result) -> str:
    idle = result["idle"]
    lines = [
        f"a step with nothing to choose: {idle['seconds'] * 1e3:.2f} ms, without the callback "
        f"{idle['plain_seconds'] * 1e3:.2f} ms: {idle['cost']:+.2%}"
    ]
    for name, waits in result.items():
        if name.startswith("waits_"):
            lines += ["", *_waits(name.removeprefix("waits_"), waits)]
    return "\n".join(lines)


def _waits(strategy: str, waits: Result) -> list[str]:
    lines = []
    for kind, found in waits["rows"].items():
        lines.append(
            f"{strategy}, {kind} rows: {found['selected']} waits a step, {found['plain']} of the "
            f"plain trainer, {found['beyond']} beyond those"
        )
        for row in found["lines"]:
            if row["beyond"]:
                lines.append(f"  {row['beyond']} x {row['kind']}: {row['function']}, {row['line']}")
    return lines


_TEXTS_OF: dict[str, Callable[[Result], str]] = {
    "environment": _environment,
    "tests": _tests,
    **dict.fromkeys(("steps", "steps_64", "steps_1536"), _steps),
    "policy": grpo.as_text,
    "callback": _callback,
    **dict.fromkeys(("scores_896", "scores_1536", "scores_3584"), scores.as_text),
    **dict.fromkeys(("uds_896", "uds_3584"), scores.as_text),
    **dict.fromkeys(("blocks_896", "blocks_3584"), _blocks),
}


# Imported when there is something to draw: a step needs a trainer.
_FIGURES_OF = {
    **dict.fromkeys(("scores_896", "scores_1536", "scores_3584"), "onlinesel.bench.scores"),
    **dict.fromkeys(("uds_896", "uds_3584"), "onlinesel.bench.scores"),
    **dict.fromkeys(("blocks_896", "blocks_3584"), "onlinesel.bench.blocks"),
    "policy": "onlinesel.bench.grpo",
    **dict.fromkeys(("steps", "steps_64", "steps_1536"), "onlinesel.recipes.bench_step"),
}


def draw(results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Draw the figures of the benchmarks beside their files; returns what was drawn."""
    drawn = []
    for name, file in results.items():
        if file["status"] == "done" and name in _FIGURES_OF:
            drawn.append(folder / f"gpu_{name}.png")
            importlib.import_module(_FIGURES_OF[name]).figure(file["result"], str(drawn[-1]))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Make the blocks of documents anew: folder of results first, then the documents."""
    folder, *documents = map(Path, sys.argv[1:] if argv is None else argv)
    results = read_results(folder)
    for path in documents:
        path.write_text(filled(path.read_text("utf-8"), results), "utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
