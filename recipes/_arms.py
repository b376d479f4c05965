"""The arms of the demo, and one run of one arm: a plain Trainer with online selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.recipes._one_run import QUIET, begin_run
from onlinesel.recipes._warm import Start, as_dataset, load_start
from onlinesel.report.runlog import RunLog
from onlinesel.strategies import UDS, RHOLoss, TopLoss, Uniform
from onlinesel.types import Strategy

__all__ = ["ARMS", "Arm", "Budget", "Job", "Record", "Result", "run_job"]

_MARKS = 4  # held-out evaluations of a run, at equal shares of its budget


@dataclass(frozen=True)
class Arm:
    """One way of choosing.

    Args:
        strategy: The method.
        rows: Rows that train in a step.
        candidates: Rows scored for each that trains.
        reference: Column of reference losses, if the method compares with one.
    """

    strategy: Strategy
    rows: int = 8
    candidates: int = 4
    reference: str | None = None


ARMS: dict[str, Arm] = {
    "uniform": Arm(Uniform(), candidates=1),
    "full batches": Arm(Uniform(), rows=32, candidates=1),
    "UDS": Arm(UDS()),
    "RHO-Loss": Arm(RHOLoss(), reference="reference_loss"),
    "top loss": Arm(TopLoss()),
}
"""Uniform training is the baseline; "full batches" trains all that the others look at."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        arm: Name in :data:`ARMS`.
        budget: ``"time"`` or ``"steps"``.
        amount: CPU seconds of training, or optimizer steps.
        seed: Of the order of the rows and of the selection.
        folder: Its run directory.
        start: Folder of the warm model and the data.
        rate: Highest learning rate.
    """

    arm: str
    budget: str
    amount: float
    seed: int
    folder: str
    start: str
    rate: float = 1e-3


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    cpu_seconds: float
    loss: float


class Record(RunLog):
    """A run directory that also remembers the cost and the loss of the run so far."""

    steps = candidates = 0
    cpu_seconds = 0.0
    loss = float("nan")

    def step(self, **facts: Any) -> None:
        """Append one optimizer step."""
        self.steps, self.cpu_seconds = facts["step"], facts["cpu_seconds"]
        self.candidates = facts["candidates"]
        super().step(**facts)

    def evaluation(self, **facts: Any) -> None:
        """Append one held-out evaluation."""
        self.loss = facts["loss"]
        super().evaluation(**facts)


class Budget(TrainerCallback):
    """End a run with its budget, evaluate at equal shares of it, and lower the rate along it.

    A schedule over a number of steps that nobody knows beforehand would favour some arm; the share
    of the budget that is spent is the same thing for all.

    Args:
        kind: ``"time"`` counts CPU seconds of training, without evaluation; ``"steps"`` steps.
        amount: How many.
        record: Where the cost comes from.
        tell: Called with the share after every step.
    """

    def __init__(
        self, kind: str, amount: float, record: Record, tell: Callable[[float], None]
    ) -> None:
        self.kind, self.amount, self.record, self._tell = kind, amount, record, tell
        self._evaluated = 0

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        spent = self.record.cpu_seconds if self.kind == "time" else self.record.steps
        return min(spent / self.amount, 1.0)

    def rate(self, _: int) -> float:
        """Return the learning rate as a share of the highest: a short rise, then down to 0."""
        return min(1.0, 0.1 + 10 * self.share) * (1.0 - self.share)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what comes after this step."""
        step = 1.0 if self.kind == "steps" else self.record.cpu_seconds / self.record.steps
        # A time budget ends with the step that comes closest to it, or long steps would gain.
        over = self.share + (0.5 * step / self.amount if self.kind == "time" else 0.0) >= 1.0
        mark = int(self.share * _MARKS + 1e-9)
        control.should_evaluate = over or mark > self._evaluated
        self._evaluated = max(self._evaluated, mark)
        control.should_training_stop = over
        self._tell(1.0 if over else self.share)


def run_job(job: Job, tell: Callable[[float], None] = lambda share: None) -> Result:
    """Fine-tune the warm model once, and leave a run directory behind.

    Args:
        job: What to run.
        tell: Called with the share of the budget that is spent, after every step.
    """
    start, arm = load_start(Path(job.start)), ARMS[job.arm]
    begin_run(job.seed)
    with Record(job.folder) as record:
        facts: dict[str, Any] = {
            "name": job.arm,
            "strategy": repr(arm.strategy),
            "candidates": arm.candidates,
            "scope": "global",
            "seed": job.seed,
            "budget": job.budget,
            "amount": job.amount,
            "clock": "cpu",
            "recipe": "demo",
        }
        record.start(**facts)
        record.rows(_pool_rows(start))
        # The same for all: the warm model before its first step.
        loss = start.facts["held_out_loss"]
        record.evaluation(step=0, seconds=0.0, cpu_seconds=0.0, rows=0, loss=loss)
        _trainer(job, arm, start, record, tell).train()
        if arm.reference:  # what the reference of the rows that were looked at took beforehand
            share = min(record.candidates / len(start.pool), 1.0)
            spent = share * float(start.facts["reference_cpu_seconds"])
            record.start(**facts, reference=f"column {arm.reference}", reference_seconds=spent)
        return Result(record.steps, record.cpu_seconds, record.loss)


def _trainer(
    job: Job, arm: Arm, start: Start, record: Record, tell: Callable[[float], None]
) -> Trainer:
    model = start.model()
    budget = Budget(job.budget, job.amount, record, tell)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate)
    arguments = TrainingArguments(
        output_dir=job.folder,
        # A time budget ends earlier than this; the budget says when.
        max_steps=int(job.amount) if job.budget == "steps" else 1_000_000,
        per_device_train_batch_size=arm.rows,
        per_device_eval_batch_size=32,
        prediction_loss_only=True,
        seed=job.seed,
        **QUIET,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=as_dataset(start.pool, reference_loss=start.reference_loss.tolist()),
        eval_dataset=as_dataset(start.held_out),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, budget.rate)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        OnlineSelection(
            trainer,
            arm.strategy,
            candidates=arm.candidates,
            seed=job.seed,
            reference=arm.reference,
            record=record,
        )
    )
    trainer.add_callback(budget)  # after the selection, which counts the step's cost
    return trainer


def _pool_rows(start: Start) -> list[tuple[int, str, str]]:
    texts = start.tokenizer().decode_batch(start.pool.tolist())
    sources = ["corrupted" if bad else "clean" for bad in start.corrupted.tolist()]
    return [(i, *pair) for i, pair in enumerate(zip(sources, texts, strict=True))]
