"""What a run is judged by, and how far it goes until it gets there.

Runs are judged by their held-out loss; runs that generate completions by their held-out reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onlinesel.report.records import Evaluation, Generation, Run, Step

__all__ = ["LOSS", "REWARD", "Goal", "goal_of", "mark_of", "reach", "scored", "trained", "value_of"]


@dataclass(frozen=True)
class Goal:
    """What runs are judged by: a name among the numbers of an evaluation, and its direction.

    Example:
        >>> LOSS.better(2.0, 3.0), REWARD.better(2.0, 3.0), REWARD.mark([0.1, 0.6, 0.5])
        (True, False, 0.6)
    """

    field: str
    higher: bool = False

    @property
    def name(self) -> str:
        """Its name within a sentence."""
        return f"held-out {self.field}"

    @property
    def side(self) -> str:
        """Where the better value lies."""
        return "above" if self.higher else "below"

    @property
    def sign(self) -> int:
        """1 or -1; a value times this is the smaller, the better."""
        return -1 if self.higher else 1

    def better(self, value: float, than: float) -> bool:
        """Whether `value` is at least as good as `than`; False if one of them is NaN."""
        return self.sign * value <= self.sign * than

    def mark(self, values: Sequence[float]) -> float:
        """Return what a run with these `values` asks others to reach.

        It is the last loss, but the best reward: under a high learning rate a reward rises and
        falls again, and an arm must not win because the other one happens to end in a trough.
        """
        if not self.higher:
            return values[-1] if values else math.nan
        return max((v for v in values if math.isfinite(v)), default=math.nan)


LOSS = Goal("loss")
REWARD = Goal("reward", higher=True)


def goal_of(run: Run) -> Goal:
    """Return what `run` is judged by: its reward if it generates completions, else its loss.

    Example:
        >>> from pathlib import Path
        >>> goal_of(Run(Path(), "UDS")).name
        'held-out loss'
    """
    measured = (*run.evals, *run.logs)
    rewarded = bool(run.generations) or any(REWARD.field in e.metrics for e in measured)
    return REWARD if rewarded else LOSS


def value_of(record: Step | Evaluation | Generation, name: str) -> float:
    """Return the number called `name`, a field or a metric of `record`; NaN if there is none.

    Example:
        >>> value_of(Evaluation(0, 0.0, 0, 4.0, metrics={"rollouts": 64}), "rollouts")
        64.0
    """
    metrics = getattr(record, "metrics", {})
    value = metrics[name] if name in metrics else getattr(record, name, None)
    return float(value) if isinstance(value, (int, float)) else math.nan


def scored(run: Run) -> list[tuple[Evaluation, float]]:
    """Return the evaluations of `run` that measured its goal, each with the value.

    Example:
        >>> from pathlib import Path
        >>> scored(Run(Path(), "UDS", evals=(Evaluation(0, 0.0, 0, 4.0),)))[0][1]
        4.0
    """
    name = goal_of(run).field
    return [(e, value_of(e, name)) for e in run.evals if hasattr(e, name) or name in e.metrics]


def trained(run: Run) -> list[tuple[Evaluation | Generation, float]]:
    """Return what was logged of the goal while `run` trained, each record with the value.

    It is not held out: a loss is that of the rows which were chosen. Without a logged reward it is
    the share of successes in each generation batch.

    Example:
        >>> from pathlib import Path
        >>> trained(Run(Path(), "UDS", logs=(Evaluation(10, 2.0, 80, 3.5),)))[0][1]
        3.5
    """
    name = goal_of(run).field
    logged = [(record, value_of(record, name)) for record in run.logs]
    known = [(record, value) for record, value in logged if math.isfinite(value)]
    if known or name != REWARD.field:
        return [*known]
    rates = []
    for batch in run.generations:
        pairs = zip(batch.successes, batch.trials, strict=True)
        scored_groups = [(won, tried) for won, tried in pairs if math.isfinite(won)]
        if tried := sum(tried for _, tried in scored_groups):
            rates.append((batch, sum(won for won, _ in scored_groups) / tried))
    return [*rates]


def mark_of(run: Run) -> float:
    """Return the value that `run` asks others to reach, see `Goal.mark`.

    Example:
        >>> from pathlib import Path
        >>> mark_of(Run(Path(), "UDS"))
        nan
    """
    return goal_of(run).mark([value for _, value in scored(run)])


def reach(run: Run, target: float, axis: str) -> float:
    """Return where the held-out loss (or reward) of `run` first gets to `target`, NaN if never.

    Args:
        run: The run; between two evaluations its loss is taken as a straight line.
        target: Held-out loss to fall to, or reward to rise to.
        axis: Number of an evaluation to measure along: "step", "seconds", "cpu_seconds", "rows",
            "rollouts".

    Example:
        >>> from pathlib import Path
        >>> evals = (Evaluation(0, 0.0, 0, 4.0), Evaluation(10, 8.0, 80, 2.0))
        >>> reach(Run(Path(), "UDS", evals=evals), 3.0, "seconds")
        4.0
    """
    goal = goal_of(run)
    start, before = math.nan, math.nan
    for evaluation, now in scored(run):
        here = value_of(evaluation, axis)
        if goal.better(now, target):
            if not math.isfinite(before):
                return here
            return start + (here - start) * (before - target) / (before - now)
        start, before = here, now
    return math.nan
