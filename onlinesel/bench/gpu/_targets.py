"""What is promised of a GPU, and whether it was measured so.

The targets were set before any GPU ran the code (``docs/gpu.md`` says where from). A target that is
missed stays in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target", "judge", "target_table"]

Result = dict[str, Any]
_BACKENDS = ("tile", "triton")


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        name: In tables.
        phase: Whose result it is read from.
        goal: The number.
        read: Returns what was measured, None where the result does not say.
        at_most: Whether less is better.
        unit: Of the number.
    """

    name: str
    phase: str
    goal: float
    read: Callable[[Result], float | None]
    at_most: bool = False
    unit: str = "x"


def _seconds(entries: Mapping[str, Any], *names: str) -> float | None:
    """Return the seconds of the fastest of these, None where none of them ran."""
    found = [entries[n]["seconds"] for n in names if "seconds" in entries.get(n, {})]
    return min(found) if found else None


def _times(one: float | None, two: float | None) -> float | None:
    """Return how many times faster the second is."""
    return one / two if one and two else None


def _scores_over(other: str) -> Callable[[Result], float | None]:
    def read(result: Result) -> float | None:
        entries = result["points"][0]["token_scores"]
        return _times(_seconds(entries, other), _seconds(entries, *_BACKENDS))

    return read


def _fastest_sizes(result: Result) -> float | None:
    """Return the share of the bare product that the winner of a search reached."""
    point = result["points"][0]
    share: float | None = point["ways"].get(point["winner"], {}).get("of_gemm")
    return share


def _uds_ms(result: Result) -> float | None:
    seconds = _seconds(result["points"][0]["uds"], "uds")
    return None if seconds is None else 1e3 * seconds


def _uds_over(result: Result) -> float | None:
    entries = result["points"][0]["uds"]
    return _times(_seconds(entries, "plain"), _seconds(entries, "uds"))


def _backward_over_trl(result: Result) -> float | None:
    point = max(result["points"], key=lambda point: point["dropped"])
    return point["speedup"].get("backward_over_trl")


def _rows_over(base: str, *sides: str) -> Callable[[Result], float | None]:
    def read(result: Result) -> float | None:
        found = [result["sides"][side].get(f"over_{base}") for side in sides]
        return max((value for value in found if value is not None), default=None)

    return read


def _waits(strategy: str, rows: str) -> Callable[[Result], float | None]:
    return lambda result: result[f"waits_{strategy}"]["rows"][rows]["beyond"]


TARGETS = (
    *(
        Target(f"token scores, d={width}: speed of the bare product", f"scores_{width}", goal,
               _scores_over("gemm"))
        for width, goal in ((896, 0.70), (1536, 0.75), (3584, 0.85))
    ),
    *(
        Target(f"the same, d={width}, with the sizes that a search found", f"blocks_{width}", goal,
               _fastest_sizes)
        for width, goal in ((896, 0.70), (3584, 0.85))
    ),
    *(
        Target(f"token scores, d={width}: speed of TRL's head", f"scores_{width}", 1.0,
               _scores_over("trl"))
        for width in (896, 1536, 3584)
    ),
    Target("UDS, 16 x 512, d=3584: time", "uds_3584", 10.0, _uds_ms, at_most=True, unit="ms"),
    Target("UDS, d=3584: over logits + svdvals + FFT", "uds_3584", 100.0, _uds_over),
    Target("head backward, 80 % of tokens without gradient: speed of TRL's", "policy", 3.0,
           _backward_over_trl),
    *(
        target
        for phase, rows in (("steps", "4 of 16"), ("steps_64", "16 of 64"))
        for target in (
            Target(f"selected step, {rows} rows: rows per second of all rows", phase, 1.6,
                   _rows_over("all", "selected")),
            Target(f"the same, checkpointing, {rows} rows", phase, 2.1,
                   _rows_over("all_checkpointed", "selected_checkpointed", "selected_reused")),
        )
    ),
    *(
        Target(f"waits of a step beyond the plain trainer's, {strategy}, {rows} rows", "callback",
               2.0, _waits(strategy, rows), at_most=True, unit="")
        for strategy in ("UDS", "TopLoss")
        for rows in ("full", "padded")
    ),
)  # fmt: skip


def judge(results: Mapping[str, Result], targets: Sequence[Target] = TARGETS) -> list[Result]:
    """Hold the files of the phases against the targets.

    Returns:
        One entry a target: ``measured`` and ``share`` of the goal (above 1 is better; both None
        where it was not measured), and ``verdict``, ``"met"``, ``"missed"`` or ``"not measured"``.
        Tiny sizes are never judged.

    Example:
        >>> speed = Target("speed", "phase", 2.0, lambda result: result["x"])
        >>> judge({"phase": {"result": {"x": 3.0}}}, [speed])[0]["verdict"]
        'met'
    """
    return [_judged(target, results.get(target.phase, {})) for target in targets]


def _judged(target: Target, found: Result) -> Result:
    value = None
    if "result" in found and not found.get("key", {}).get("tiny"):
        try:
            value = target.read(found["result"])
        except (KeyError, IndexError):
            value = None  # the phase ended before it came to this
    entry: Result = {
        "name": target.name, "phase": target.phase, "goal": target.goal, "unit": target.unit,
        "at_most": target.at_most, "measured": value, "share": None, "verdict": "not measured",
    }  # fmt: skip
    if value is not None:
        goal = target.goal
        entry["share"] = (goal / value if value else 2.0) if target.at_most else value / goal
        entry["verdict"] = "met" if entry["share"] >= 1 else "missed"
    return entry


def target_table(entries: Sequence[Result]) -> str:
    """Return one line a target: measured, wanted, verdict.

    Example:
        >>> print(target_table(judge({}, TARGETS[:1])))
        token scores, d=896: speed of the bare product           -    >= 0.70 x  not measured
    """
    width = max(len(entry["name"]) for entry in entries)
    lines = []
    for entry in entries:
        measured = "-" if entry["measured"] is None else f"{entry['measured']:.2f}"
        goal = f"{'<=' if entry['at_most'] else '>='} {entry['goal']:.2f} {entry['unit']}".rstrip()
        lines.append(f"{entry['name']:{width}}  {measured:>10}  {goal:>11}  {entry['verdict']}")
    return "\n".join(lines)
