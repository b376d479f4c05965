"""The results of ``onlinesel bench scale`` as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["figure", "table"]

_PARTS = ("plan", "observe", "merge", "describe", "network")


def _number(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}".replace("e+0", "e") if value >= 100_000 else str(value)


def _line(point: dict[str, Any]) -> str:
    seconds = point["seconds"]
    ids = _number(point["known"])
    if point["known"] is not None:
        ids += "" if point["dense"] else " hashed"
    if point.get("extrapolated"):
        ids += " *"
    size = point["rows"] * (1 if point["strategy"] == "InfoBatch" else point["candidates"])
    head = f"{point['strategy']:18}{point['ranks']:6}{size:7}{ids:>14}"
    parts = "".join(f"{seconds[name] * 1e3:9.2f}" for name in _PARTS)
    return f"{head}{parts}{point['total'] * 1e3:9.2f}{point['share']:9.2%}"


def table(result: dict[str, Any]) -> str:
    """Return the results as text, one line a workload, in milliseconds of a step."""
    network = result["network"]
    head = f"{'':18}{'ranks':>6}{'cand.':>7}{'ids':>14}"
    head += "".join(f"{name:>9}" for name in (*_PARTS, "total", "share"))
    lines = [
        f"Decision of a step of {result['step_seconds']:.2f} s, {result['rows']} rows of "
        f"{result['tokens']} tokens on each rank; milliseconds.",
        f"Measured: plan, observe, merge, describe ({result['threads']} threads, "
        f"{result['processor']}, torch {result['torch']}).",
        f"Modelled: network ({network['gather']}; alpha {network['alpha_intra'] * 1e6:g} and "
        f"{network['alpha_inter'] * 1e6:g} us, beta {network['beta_intra'] / 1e9:g} and "
        f"{network['beta_inter'] / 1e9:g} GB/s within and between nodes of {network['gpus']}; "
        f"{network['start'] * 1e6:g} us to start).",
    ]
    for name in ("ranks", "candidates", "ids"):
        points = result[f"against_{name}"]
        if points:
            lines += ["", f"Against {name}", head, *map(_line, points)]
    if any(point.get("extrapolated") for point in result["against_ids"]):
        lines += ["", "* extrapolated from the two largest ledgers that were measured"]
    return "\n".join([*lines, *_ledgers(result["against_ids"])])


def _ledgers(points: Sequence[dict[str, Any]]) -> list[str]:
    if not points:
        return []
    head = f"{'ids':>14}{'bytes/id':>10}{'rows rewritten/step':>21}{'all rewritten':>16}{'in s':>8}"
    lines = ["", "Ledgers", head]
    for point in points:
        if point["dense"] and "worst_seconds" in point:
            lines.append(
                f"{_number(point['known']):>14}{point['bytes_per_id']:10.1f}"
                f"{point['rewritten_rows']:21.0f}{'every ' + str(point['steps_between']):>16}"
                f"{point['worst_seconds']:8.2f}" + (" *" if point.get("extrapolated") else "")
            )
    return lines


def figure(result: dict[str, Any], path: str) -> None:
    """Draw the share of a step against ranks, candidates and ids.

    Args:
        result: What :func:`onlinesel.bench.bench_scale` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'onlinesel bench scale --figure needs matplotlib: pip install "onlinesel[report]".'
        ) from error
    names = [name for name in ("ranks", "candidates", "ids") if result[f"against_{name}"]]
    drawing = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw(axes, result[f"against_{name}"], "known" if name == "ids" else name)
        axes.set_xlabel({"candidates": "candidates for each trained row"}.get(name, name))
        axes.axhline(1.0, color="0.6", linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    drawing.axes[0].set_ylabel(f"% of a step of {result['step_seconds']:.2f} s")
    drawing.savefig(path, dpi=150)


def _draw(axes: Any, points: Sequence[dict[str, Any]], name: str) -> None:
    """Draw one line a method, hollow where it is extrapolated."""
    labels = dict.fromkeys(_label(point, name) for point in points)
    for label, marker in zip(labels, "os^Dv", strict=False):
        mine = [point for point in points if _label(point, name) == label]
        values = [(point[name], 100 * point["share"]) for point in mine]
        (line,) = axes.plot(*zip(*values, strict=True), label=label, linewidth=1.4)
        for point, (x, y) in zip(mine, values, strict=True):
            filled = line.get_color() if not point.get("extrapolated") else "white"
            axes.plot(x, y, marker, color=line.get_color(), markerfacecolor=filled, markersize=5)
    axes.set_xscale("log", base=10 if name == "known" else 2)
    if name != "known":
        ticks = sorted({point[name] for point in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _label(point: dict[str, Any], name: str) -> str:
    if name != "known":
        return str(point["strategy"])
    return f"{point['strategy']}, ids " + ("row numbers" if point["dense"] else "hashes")
