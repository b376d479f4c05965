"""What a run did with its data and what that cost, for the log and for the report."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from onlinesel.report.runlog import RunLog
from onlinesel.selector import describe
from onlinesel.step import StepPlan

__all__ = ["Means", "Meter", "StepMeter"]


class Means:
    """Means of numbers by name, each over the times that it was there."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, **values: float) -> None:
        """Note numbers."""
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, and forget them."""
        result = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return result


class Meter:
    """What the meters of all trainers share: means for the log, and the record of a run.

    Args:
        record: Where every decision is written down: a folder, a :class:`RunLog` that the caller
            has started, or None.
        facts: Entries of ``run.json``, used if ``record`` is a folder.
    """

    def __init__(self, record: str | Path | RunLog | None, facts: dict[str, Any]) -> None:
        self._record, self._facts = record, facts
        self._log: RunLog | None = None
        self._means = Means()
        self.seconds = self.cpu_seconds = 0.0
        self.rows = 0

    def open(self, resume_step: int | None, writes: bool) -> None:
        """Open the record, where there is one; ``writes`` on the one process that keeps it.

        ``resume_step`` is None unless a checkpoint is resumed: a folder that holds a run already is
        then refused rather than emptied.
        """
        if self._record is None or not writes:
            return
        if isinstance(self._record, RunLog):
            self._log = self._record
            return
        self._log = RunLog(self._record, resume_step=resume_step)
        self._log.start(**self._facts)

    def stop(self) -> None:
        """Close the record."""
        if self._log is not None:
            self._log.close()
            self._log = None


class StepMeter(Meter):
    """Collect the decisions and times of the steps.

    Attributes:
        undefined: Whether the loss of a step was, since the last log.
    """

    _plan: StepPlan | None = None
    undefined = False
    candidates = 0

    def start(self, resume_step: int | None, writes: bool) -> None:
        """Begin a run, with the record as :meth:`open` does."""
        self._means.drain()
        self._plan, self.undefined = None, False
        self.open(resume_step, writes)

    def fetch(self) -> None:
        """Note that a step begins, with the loading of its candidates."""
        self._began = time.perf_counter(), time.process_time()

    def decided(self, plan: StepPlan) -> None:
        """Note a step's decisions."""
        self._plan = plan
        for signals, selection in plan.decisions:
            self._means.add(**describe(signals, selection))

    def note(self, **values: float) -> None:
        """Note numbers for the log."""
        self._means.add(**values)

    def end(self, step: int) -> None:
        """Note that the step which was decided has trained."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        wall, cpu = self._began
        seconds = time.perf_counter() - wall
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu
        self.rows += sum(int((s.weights > 0).sum()) for _, s in plan.decisions)
        self.candidates += sum(s.size for s, _ in plan.decisions)
        self._means.add(score_seconds=plan.seconds, step_seconds=seconds)
        if self._log is not None:
            self._write(self._log, plan, step, seconds)

    def _write(self, log: RunLog, plan: StepPlan, step: int, seconds: float) -> None:
        signals, selections = zip(*plan.decisions, strict=True)
        scores = [s.scores for s in selections if s.scores is not None]
        log.choice(
            step,
            torch.cat([s.row_ids() for s in signals]),
            torch.cat([s.weights for s in selections]),
            torch.cat(scores) if len(scores) == len(selections) else None,
            torch.cat([s.tokens for s in signals]),
        )
        log.step(
            step=step,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            rows=self.rows,
            candidates=self.candidates,
            score_seconds=plan.seconds,
            step_seconds=seconds,
        )

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Note a held-out loss; evaluation is not part of the training time."""
        if self._log is not None and "eval_loss" in metrics:
            self._log.evaluation(
                step=step,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                rows=self.rows,
                loss=metrics["eval_loss"],
            )

    def tell(self, logs: dict[str, float]) -> None:
        """Put the means into what a trainer logs beside its loss.

        The loss is nan if it was undefined in one of the steps: a trainer may put its own mean in
        the place of such a loss, and rows without a score have no gradient to show it either.
        """
        logs.update(self.drain())
        if self.undefined:
            logs["loss"] = math.nan
        self.undefined = False

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, under ``selection/``, and forget them.

        Each is the mean over the decisions that had it: a warm-up has no scores to report.

        ``score_share`` is the part of a step spent on choosing. ``break_even`` is the share of the
        optimizer steps of uniform training that the method may need at most before it costs more
        time than it saves. Where the scoring forward is reused, both count a forward as choosing
        that uniform training would do as well, and so make choosing look dearer than it is.
        """
        result = self._means.drain()
        if "step_seconds" not in result:
            return {}
        whole = result.pop("step_seconds")
        result["score_share"] = result["score_seconds"] / whole
        result["break_even"] = 1.0 - result["score_share"]
        return {f"selection/{name}": value for name, value in result.items()}
