"""The arms of the GRPO demo, and one run of one arm: TRL's trainer with rollout selection."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.recipes._one_run import QUIET, begin_run
from onlinesel.recipes._problems import columns, correct, evaluate, held_out, pass_rates, pool
from onlinesel.recipes._rl_warm import RLStart, load_rl_start
from onlinesel.recipes._workers import Tell
from onlinesel.report.runlog import RunLog
from onlinesel.rl import PassRateBand, Refill, SharedDifficulty, ZeroVariance

__all__ = ["ARMS", "GENERATIONS", "Job", "Result", "run_job"]

GENERATIONS = 8


@dataclass(frozen=True)
class Arm:
    """One way of choosing problems and groups, on one task.

    Args:
        prompts: Groups that train in a step.
        rate: Learning rate.
        parts: Arguments of the callback.
    """

    prompts: int
    rate: float
    parts: dict[str, Any] = field(default_factory=dict)


_DAPO = {"gate": ZeroVariance(), "refill": Refill()}
_BAND = {"gate": PassRateBand(0.25, 0.75), "refill": Refill(), "prompts": SharedDifficulty()}

ARMS: dict[str, dict[str, Arm]] = {
    "uniform (plain GRPO)": {"mixed": Arm(16, 3e-5), "digits": Arm(16, 6e-5)},
    "DAPO's filter": {"mixed": Arm(8, 6e-5, _DAPO), "digits": Arm(8, 6e-5, _DAPO)},
    "band and sampler": {"mixed": Arm(8, 6e-5, _BAND), "digits": Arm(8, 6e-5, _BAND)},
    "sampler alone": {
        "mixed": Arm(8, 6e-5, {"prompts": SharedDifficulty()}),
        "digits": Arm(8, 6e-5, {"prompts": SharedDifficulty(target=None)}),
    },
}
"""Each at the best of the settings that were tried (see the header of the demo), by task."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        arm: Name in :data:`ARMS`.
        task: Name in :data:`onlinesel.recipes._problems.TASKS`.
        amount: CPU seconds of training.
        seed: Of the order of the problems, of sampling and of the selection.
        folder: Its run directory.
        start: Folder of the practised model.
        looks: Held-out evaluations, at equal shares of the budget.
        prompts: Groups that train in a step, instead of the arm's own.
        rate: Learning rate, instead of the arm's own.
    """

    arm: str
    task: str
    amount: float
    seed: int
    folder: str
    start: str
    looks: int = 20
    prompts: int | None = None
    rate: float | None = None

    def settings(self) -> Arm:
        """Return the arm as this run trains it."""
        arm = ARMS[self.arm][self.task]
        return replace(arm, prompts=self.prompts or arm.prompts, rate=self.rate or arm.rate)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    rollouts: int
    cpu_seconds: float
    reward: float


class _Looks(TrainerCallback):
    """Look at the held-out problems at equal shares of the budget, and end the run with it.

    Held-out reward is the mean probability that a sampled completion is right, which is exact:
    greedy accuracy and samples of completions are noisy, and say less of what was learnt.

    Args:
        job: The run.
        start: What it starts from.
        record: Where it is written down.
        meter: Counts rollouts and seconds, without these looks.
        tell: Called with the share of the budget that is spent.
    """

    def __init__(self, job: Job, start: RLStart, record: RunLog, meter: Any, tell: Tell) -> None:
        self.job, self.record, self.meter, self._tell = job, record, meter, tell
        self.task, self.tokenizer = start.task, start.tokenizer()
        self.problems = held_out(start.task)
        self.reward = float("nan")
        self._looked = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the practised model."""
        self._look(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what comes after this step."""
        share = self.meter.cpu_seconds / self.job.amount
        mark = int(share * self.job.looks)
        if mark > self._looked or share >= 1:
            self._look(state.global_step, kwargs["model"])
            self._looked = mark
        control.should_training_stop = share >= 1
        self._tell(min(share, 1.0))

    def _look(self, step: int, model: Any) -> None:
        goal = [problem for problem in self.problems if problem.kind in self.task.goal]
        model.eval()
        rates = pass_rates(model, self.tokenizer, goal)
        accuracy = evaluate(model, self.tokenizer, self.task, self.problems)
        model.train()
        self.reward = sum(rates) / len(rates)
        self.record.evaluation(
            step=step,
            seconds=self.meter.seconds,
            cpu_seconds=self.meter.cpu_seconds,
            rows=self.meter.rows,
            rollouts=self.meter.rollouts,
            reward=self.reward,
            greedy_accuracy=accuracy.goal,
        )


def run_job(job: Job, tell: Tell = lambda share: None) -> Result:
    """Train the practised model once, and leave a run directory behind.

    Args:
        job: What to run.
        tell: Called with the share of the budget that is spent, after every step.
    """
    start, arm = load_rl_start(Path(job.start)), job.settings()
    begin_run(job.seed)
    problems = pool(start.task)
    with RunLog(job.folder) as record:
        trainer = _trainer(job, arm, start)
        callback = RolloutSelection(trainer, seed=job.seed, record=record, **arm.parts)
        looks = _Looks(job, start, record, callback.meter, tell)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback)
        trainer.add_callback(looks)  # after the selection, which counts the step's cost
        record.start(
            name=job.arm,
            strategy=", ".join(f"{name}={part!r}" for name, part in arm.parts.items()),
            seed=job.seed,
            budget="time",
            amount=job.amount,
            clock="cpu",
            recipe="demo-grpo",
            task=job.task,
            prompts_per_step=arm.prompts,
            learning_rate=arm.rate,
        )
        record.rows((i, problem.kind, problem.prompt) for i, problem in enumerate(problems))
        trainer.train()
        meter = callback.meter
    return Result(trainer.state.global_step, meter.rollouts, meter.cpu_seconds, looks.reward)


def _trainer(job: Job, arm: Arm, start: RLStart) -> GRPOTrainer:
    arguments = GRPOConfig(
        output_dir=job.folder,
        max_steps=1_000_000,  # the budget says when it ends
        per_device_train_batch_size=arm.prompts * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=start.task.tokens,
        beta=0.0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        learning_rate=arm.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        seed=job.seed,
        **QUIET,
    )
    return GRPOTrainer(
        model=start.model(),
        reward_funcs=correct,
        args=arguments,
        train_dataset=Dataset.from_dict(columns(pool(start.task))),
        processing_class=start.tokenizer(),
    )
