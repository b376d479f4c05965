"""The run directory as values; `reading` reads it and `runlog` writes it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Choice",
    "Evaluation",
    "Generation",
    "Prompt",
    "Row",
    "Run",
    "Step",
]


@dataclass(frozen=True)
class Step:
    """One optimizer step; numbers that were not measured are NaN.

    Example:
        >>> Step(step=1, seconds=0.5, rows=8, candidates=32).loss
        nan
    """

    step: int
    seconds: float
    rows: int
    candidates: int
    cpu_seconds: float = math.nan
    score_seconds: float = math.nan
    step_seconds: float = math.nan
    loss: float = math.nan
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The decision of one optimizer step over its candidates.

    Compact arrays, because a long run has millions of candidates: `ids` and `tokens` are int64,
    `weights` and `scores` float64, and a score written as null is NaN.

    Example:
        >>> Choice(step=1, ids=array("q", [7]), weights=array("d", [0.0])).scores is None
        True
    """

    step: int
    ids: array[int]
    weights: array[float]
    scores: array[float] | None = None
    tokens: array[int] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss after `step` steps; `seconds` count training only, not evaluation.

    What else was measured is in `metrics`; of a run that generates, `reward` and `rollouts`. What
    the trainer logged while it trained (`Run.logs`) has the same form.

    Example:
        >>> Evaluation(step=0, seconds=0.0, rows=0, loss=4.2).cpu_seconds
        nan
    """

    step: int
    seconds: float
    rows: int
    loss: float
    cpu_seconds: float = math.nan
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """One generation batch: what it cost so far, and what became of each of its groups.

    A group is the completions of one prompt. The last four fields have one entry per scored group:
    int64 id of its prompt (-1 unknown), successes (NaN unknown), completions that could be scored,
    and 1 if the group trains, else 0.

    Example:
        >>> Generation(0, 2.5, 2.4, rollouts=16, tokens=80, rejected_tokens=0, rounds=1).trials
        array('q')
    """

    step: int
    seconds: float
    cpu_seconds: float
    rollouts: int
    tokens: int
    rejected_tokens: int
    rounds: int
    prompts: array[int] = field(default_factory=lambda: array("q"))
    successes: array[float] = field(default_factory=lambda: array("d"))
    trials: array[int] = field(default_factory=lambda: array("q"))
    kept: array[int] = field(default_factory=lambda: array("b"))


class Prompt(NamedTuple):
    """What is believed of a prompt: the pass rate that is predicted for its next group.

    `std` is the standard deviation of that prediction, `last` the optimizer step of the last visit.

    Example:
        >>> Prompt(7, rate=0.5, std=0.1, visits=0, last=None).last is None
        True
    """

    id: int
    rate: float
    std: float
    visits: int
    last: int | None


class Row(NamedTuple):
    """One row of the training pool.

    Example:
        >>> Row(3, "wiki", "Water boils at 100 °C.").source
        'wiki'
    """

    id: int
    source: str | None
    text: str


@dataclass(frozen=True)
class Run:
    """One run directory in memory; `rows` is empty when the run has no `rows.jsonl`.

    Example:
        >>> Run(path=Path("runs/uds-0"), name="UDS", seed=0).budget is None
        True
    """

    path: Path
    name: str
    strategy: str = ""
    candidates: int | None = None
    scope: str = ""
    seed: int | None = None
    budget: str | None = None
    command: str = ""
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    choices: tuple[Choice, ...] = ()
    evals: tuple[Evaluation, ...] = ()
    rows: Mapping[int, Row] = field(default_factory=dict)
    generations: tuple[Generation, ...] = ()
    prompts: Mapping[int, Prompt] = field(default_factory=dict)
    logs: tuple[Evaluation, ...] = ()
