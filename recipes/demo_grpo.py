"""What choosing problems gains in GRPO, on a CPU, in minutes: `make demo-grpo`.

    onlinesel demo-grpo --seeds 1 --output runs/demo-grpo

What it does: a small Llama practises on procedural problems and then learns from verifiable
rewards, with TRL's ``GRPOTrainer``. Plain GRPO, DAPO's filter (drop groups without spread, generate
again), the balanced filter with the shared sampler, and that sampler alone are compared by their
held-out reward, at equal CPU time, each at the best prompts per step and learning rate of a small
sweep. Two tasks: ``mixed`` (trivial, learnable and impossible problems, easy to tell apart) and
``digits`` (sums of 1 to 6 digits, of smoothly growing difficulty). It ends with what paid, a
table and one page, ``report.html``, for each task. Practised models are kept in ``start/`` of the
output folder; ``--fresh`` makes them anew.

Measured (``SEEDS=5 make demo-grpo``, 2 CPU cores (AMD EPYC), one thread a run, 40 CPU seconds,
seeds 0 to 4, 2026-11-22, mean and 95 % t-interval; both tables and the sweep behind the settings
are in ``recipes/results/demo_grpo_cpu_5_seeds.md``). On ``mixed``, to plain GRPO's best held-out
reward: the sampler alone needs 32 ± 9 % of its rollouts and 39 ± 15 % of its time, band and sampler
49 ± 12 % and 44 ± 14 %, DAPO's filter 150 ± 33 % and 94 ± 22 %. On ``digits``, where two thirds of
the groups have spread anyway: the sampler alone 76 ± 11 % and 84 ± 14 %, DAPO's filter 102 ± 4 %
and 86 ± 8 %; band and sampler with a target of one half got there in one run of five.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from onlinesel.recipes._demos import add_common, check_amounts, run_command, write_up
    from onlinesel.recipes._problems import TASKS
    from onlinesel.recipes._rl_arms import ARMS, Job, Result, run_job
    from onlinesel.recipes._rl_warm import RLStart, RLWarmSettings, prepare_rl
    from onlinesel.recipes._workers import Workers, clear_runs
except ImportError as error:
    raise ImportError(
        'onlinesel.recipes.demo_grpo needs TRL and the report: pip install "onlinesel[trl,report]".'
    ) from error

__all__ = ["GRPODemo", "jobs_of", "main", "run_demo"]

_TITLES = {
    "mixed": "GRPO on trivial, learnable and impossible problems",
    "digits": "GRPO on sums of 1 to 6 digits",
}


@dataclass(frozen=True)
class GRPODemo:
    """What is run.

    Args:
        output: Folder of everything that is written.
        seeds: Runs of each arm and task.
        seconds: Budget of each run, in CPU seconds of training.
        tasks: Names in :data:`onlinesel.recipes._problems.TASKS`.
        arms: Names in :data:`onlinesel.recipes._rl_arms.ARMS`.
        fresh: Practise again.
        workers: Runs at a time, each in a process of its own with one thread.
        practice: Most steps of practice; it usually ends earlier.
        prompts: Groups that train in a step, instead of each arm's own.
        rate: Learning rate, instead of each arm's own.
    """

    output: Path
    seeds: int = 1
    seconds: float = 40.0
    tasks: tuple[str, ...] = tuple(TASKS)
    arms: tuple[str, ...] = tuple(ARMS)
    fresh: bool = False
    workers: int = 2
    practice: int = RLWarmSettings.limit
    prompts: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        amounts = ("seeds", "seconds", "workers", "prompts", "rate")
        check_amounts("onlinesel demo-grpo", self, amounts)


def jobs_of(demo: GRPODemo, starts: dict[str, Path]) -> list[Job]:
    """Return the runs in the order in which they are begun."""
    return [
        Job(
            arm,
            task,
            demo.seconds,
            seed,
            str(demo.output / task / "runs" / f"{_slug(arm)}-{seed}"),
            str(starts[task]),
            prompts=demo.prompts,
            rate=demo.rate,
        )
        for seed in range(demo.seeds)
        for task in demo.tasks
        for arm in demo.arms
    ]


def _slug(arm: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in arm.lower()).strip("-")


def run_demo(demo: GRPODemo) -> list[Path]:
    """Run all arms on all tasks and return the pages about them.

    Args:
        demo: What to run.
    """
    began = time.perf_counter()
    with Workers[Job, Result](demo.workers, run_job) as workers:
        print("Practising, so that there is something to learn from", flush=True)
        settings = [RLWarmSettings(task, limit=demo.practice) for task in demo.tasks]
        folders = [demo.output / "start"] * len(settings)
        made = workers.map(_prepare, settings, folders, [demo.fresh] * len(settings))
        starts: dict[str, RLStart] = dict(zip(demo.tasks, made, strict=True))
        for task, start in starts.items():
            print(f"  {task}: {_practised(start)}", flush=True)
            clear_runs(demo.output / task / "runs", "demo-grpo")
        jobs = jobs_of(demo, {task: start.folder for task, start in starts.items()})
        print(f"Learning: {len(jobs)} runs of {demo.seconds:g} CPU seconds each", flush=True)
        workers.run(jobs, line=_line, doing=lambda job: f"{job.arm} ({job.task})")
    pages = [_tell(demo, task, [job for job in jobs if job.task == task]) for task in demo.tasks]
    print(f"All in {time.perf_counter() - began:.0f} s.", flush=True)
    return pages


def _prepare(settings: RLWarmSettings, folder: Path, fresh: bool) -> RLStart:
    return prepare_rl(settings, folder, fresh=fresh)[0]


def _practised(start: RLStart) -> str:
    rates = ", ".join(f"{kind} {rate:.2f}" for kind, rate in start.facts["pass_rate"].items())
    return f"share of sampled answers that are right: {rates}"


def _line(job: Job, result: Result, seconds: float) -> str:
    cost = f"{result.steps} steps, {result.rollouts} rollouts, {result.cpu_seconds:.1f} CPU s"
    what = f"{job.task}, {job.arm}, seed {job.seed}"
    return f"{what}: held-out reward {result.reward:.3f} after {cost} (at {seconds:.0f} s)"


def _tell(demo: GRPODemo, task: str, jobs: Sequence[Job]) -> Path:
    """Write and print what came out on one task."""
    arms = {job.arm: job.settings() for job in jobs}
    listed = "; ".join(f"{n}: {a.prompts} prompts a step, rate {a.rate:g}" for n, a in arms.items())
    folders, notes = [job.folder for job in jobs], f"Settings: {listed}."
    return write_up(demo.output / task, folders, _TITLES[task], lambda _: notes, axis="rollouts")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlinesel demo-grpo",
        description="Compare ways of choosing problems for GRPO, on this machine's CPU.",
    )
    add_common(parser, "runs/demo-grpo", GRPODemo.seconds, tuple(ARMS))
    add: Any = parser.add_argument
    add("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS), metavar="TASK",
        help=f"among {', '.join(TASKS)}")  # fmt: skip
    add("--prompts", type=int, help="groups that train in a step (each arm's own)")
    add("--rate", type=float, help="learning rate (each arm's own)")
    add("--fresh", action="store_true", help="practise again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit status.

    Args:
        argv: Arguments without the program's name, or None for those of the process.
    """
    return run_command(_parser(), argv, lambda **options: run_demo(GRPODemo(**options)))


if __name__ == "__main__":
    sys.exit(main())
