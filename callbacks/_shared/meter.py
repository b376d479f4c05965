"""What a run did with its data and what that cost, for the log and for the report."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from onlinesel.callbacks._shared.announce import counted, percent, say
from onlinesel.callbacks._shared.record import Record
from onlinesel.callbacks._shared.texts import Texts
from onlinesel.report.runlog import RunLog
from onlinesel.selector import describe
from onlinesel.step import StepPlan

if TYPE_CHECKING:
    from onlinesel.callbacks._shared.reuse import ReusedForward

__all__ = ["BRIEF", "Means", "Meter", "StepMeter"]

BRIEF = ("kept_share", "score_share", "score_kept", "nonfinite")
"""What the log of a step has by default, the last where it is not 0."""


Place: TypeAlias = str | Path | RunLog | Record | None
"""Where a run is written down."""

Facts: TypeAlias = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""Entries of ``run.json``, or what gives them."""


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
        facts: Entries of ``run.json``, used if ``record`` is a folder; or what gives them when a
            run begins.
    """

    def __init__(self, record: Place, facts: Facts) -> None:
        self._record = record if isinstance(record, Record) else Record(record)
        self._facts = facts
        self._said: dict[str, Any] = {}
        self._log: RunLog | None = None
        self._opened = False
        self._writes = True
        self._means = Means()
        self.texts: Texts | None = None
        self.seconds = self.cpu_seconds = 0.0
        self.rows = 0

    def read_texts(self, trainer: Any, wanted: bool) -> None:
        """Write texts into the record, if they are ``wanted``; a trainer can tell what rows say."""
        self.texts = Texts(trainer) if wanted else None

    def open(self, resume_step: int | None, writes: bool, trial: int | None = None) -> None:
        """Open the record, where there is one; ``writes`` on the one process that keeps it.

        ``resume_step`` is None unless a checkpoint is resumed: a folder that holds a run already is
        then refused rather than emptied.
        """
        self._opened, self._writes = False, writes
        self._said = dict(self._facts() if callable(self._facts) else self._facts)
        if writes:
            self._log = self._record.open(self._said, resume_step, trial)
        if self.texts is not None:
            self.texts.start(self._log)

    def announce(self, opening: Callable[[], str]) -> None:
        """Say the line with which a run starts, once, on the one process that writes."""
        if self._writes and not self._opened:
            self._opened = True
            say(f"onlinesel: {opening()}")

    def stop(self) -> None:
        """Say the line with which a run ends, once, and close the record."""
        if self._opened:
            self._opened = False
            closing = self.closing()
            if closing is not None:
                say(f"onlinesel: {closing}")
        if self._log is not None:
            if self.texts is not None:
                self.texts.send()
                self.texts.start(None)
            self._log.close()
            self._log = None

    def closing(self) -> str | None:
        """Return what choosing cost and what was dropped; None before the first step."""
        raise NotImplementedError


@dataclass
class _Tally:
    """What the steps of one run came to.

    Attributes:
        steps: That trained.
        rows: Candidates that were given weight.
        candidates: That were decided about.
        nonfinite: Candidates with a signal that is not finite.
        choosing: Seconds that choosing took, less what reused forwards saved.
        seconds: Of all steps.
    """

    steps: int = 0
    rows: int = 0
    candidates: int = 0
    nonfinite: int = 0
    choosing: float = 0.0
    seconds: float = 0.0


class StepMeter(Meter):
    """Collect the decisions and times of the steps.

    Args:
        record: As of :class:`Meter`.
        facts: As of :class:`Meter`; ``name`` is that of the method.
        log_all: Whether the log has every number, or those of :data:`BRIEF`.
        shadow: Whether all candidates train, whatever is decided.

    Attributes:
        undefined: Whether the loss of a step was, since the last log.
    """

    _plan: StepPlan | None = None
    undefined = False
    candidates = _step = 0

    def __init__(
        self,
        record: Place,
        facts: Facts,
        *,
        log_all: bool = False,
        shadow: bool = False,
    ) -> None:
        super().__init__(record, facts)
        self._log_all, self._trained = log_all, "would have trained" if shadow else "trained"
        self._tally = _Tally()
        self._asked: set[str] = set()

    def start(self, resume_step: int | None, writes: bool, trial: int | None = None) -> None:
        """Begin a run, with the record as :meth:`open` does.

        Seconds and rows go on from those of the record's last step that stays.
        """
        self._means.drain()
        self._plan, self._saved, self.undefined, self._step = None, 0.0, False, 0
        self._tally = _Tally()
        self.open(resume_step, writes, trial)
        last = None if self._log is None or resume_step is None else self._log.last_step()
        self.seconds = 0.0 if last is None else last.seconds
        self.cpu_seconds = 0.0 if last is None else last.cpu_seconds
        self.rows, self.candidates = (0, 0) if last is None else (last.rows, last.candidates)

    def fetch(self) -> None:
        """Note that a step begins, with the loading of its candidates."""
        self._began = time.perf_counter(), self._cpu()

    def _cpu(self) -> float:
        """Return the processor time that a record is given; nobody else is told."""
        return 0.0 if self._log is None else time.process_time()

    def deciding(
        self,
        plan: Callable[[], StepPlan],
        reuse: ReusedForward | None,
        batches: Sequence[dict[str, Any]],
        ids: Sequence[Tensor] = (),
    ) -> StepPlan:
        """Let a step be decided, and note its decisions.

        Args:
            plan: Decides.
            reuse: Holds the layers' outputs of the scoring forward, if they are to be reused.
            batches: The candidates, changed in place where they are.
            ids: Of their rows, if their texts can be told.
        """
        self._saved = 0.0
        if self.texts is not None and ids:
            self.texts.look(ids, batches)
        if reuse is None:
            planned = plan()
        else:
            planned, numbers = reuse.decide(batches, plan)
            self._saved = reuse.saved_seconds
            self._asked |= numbers.keys()
            self._means.add(**numbers)
        self.decided(planned)
        return planned

    def decided(self, plan: StepPlan) -> None:
        """Note a step's decisions."""
        self._plan = plan
        for signals, selection in plan.decisions:
            found = describe(signals, selection, brief=not self._log_all)
            self._tally.nonfinite += int(found.get("nonfinite", 0))
            self._means.add(**found)

    def end(self, step: int) -> None:
        """Note that the step which was decided has trained."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        wall, cpu = self._began
        seconds = time.perf_counter() - wall
        self.seconds += seconds
        self.cpu_seconds += self._cpu() - cpu
        rows = sum(int((s.weights > 0).sum()) for _, s in plan.decisions)
        candidates = sum(s.size for s, _ in plan.decisions)
        self.rows += rows
        self.candidates += candidates
        choosing = max(plan.seconds - self._saved, 0.0)
        self._means.add(score_seconds=plan.seconds, choosing=choosing, step_seconds=seconds)
        tally = self._tally
        tally.steps, tally.seconds = tally.steps + 1, tally.seconds + seconds
        tally.rows, tally.candidates = tally.rows + rows, tally.candidates + candidates
        tally.choosing += choosing
        self._step = step
        if self._log is not None:
            self._write(self._log, plan, step, (choosing, seconds))

    def closing(self) -> str | None:
        """Return what choosing cost and what was dropped; None before the first step."""
        tally = self._tally
        if not tally.steps:
            return None
        share = tally.choosing / max(tally.seconds, 1e-9)
        line = (
            f"{self._said['name']} {self._trained} {tally.rows:,} of {tally.candidates:,} "
            f"candidate rows in {counted(tally.steps, 'step')} and dropped "
            f"{tally.candidates - tally.rows:,}; choosing took {tally.choosing:,.3g} s, "
            f"{percent(share)} of the steps' {tally.seconds:,.3g} s: it saves time if it needs at "
            f"most {percent(1 - share)} of the steps that uniform rows need"
        )
        if tally.nonfinite:
            line += f"; {counted(tally.nonfinite, 'row')} had a score that is not finite"
        return line

    def _write(self, log: RunLog, plan: StepPlan, step: int, seconds: tuple[float, float]) -> None:
        signals, selections = zip(*plan.decisions, strict=True)
        parts = [s.scores for s in selections if s.scores is not None]
        ids = torch.cat([s.row_ids() for s in signals]).tolist()
        weights = torch.cat([s.weights for s in selections]).tolist()
        scores = torch.cat(parts).tolist() if len(parts) == len(selections) else None
        log.choice(step, ids, weights, scores, torch.cat([s.tokens for s in signals]))
        if self.texts is not None:
            self.texts.write()
            self.texts.count(ids, (weight > 0 for weight in weights), scores)
        log.step(
            step=step,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            rows=self.rows,
            candidates=self.candidates,
            score_seconds=seconds[0],
            step_seconds=seconds[1],
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
        if self._log is not None and self._step:
            self._log.logged(
                step=self._step,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                rows=self.rows,
                loss=logs["loss"],
            )
        self.undefined = False

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, under ``selection/``, and forget them.

        Each is the mean over the decisions that had it: a warm-up has no scores to report.

        ``score_share`` is the part of a step spent on choosing. ``break_even`` is the share of the
        optimizer steps of uniform training that the method may need at most before it costs more
        time than it saves. Where the scoring forward is reused, what it saves of the training
        forward does not count as choosing: uniform training would do that as well.
        """
        result = self._means.drain()
        if "step_seconds" not in result:
            return {}
        whole = result.pop("step_seconds")
        result["score_share"] = result.pop("choosing") / whole
        result["break_even"] = 1.0 - result["score_share"]
        if not result.get("nonfinite", 1.0):
            del result["nonfinite"]
        wanted = result if self._log_all else {*BRIEF, *self._asked}
        return {f"selection/{n}": value for n, value in result.items() if n in wanted}
