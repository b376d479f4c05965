"""What choosing rows gains and costs, on a CPU, in minutes: `make demo`, or `onlinesel demo`.

    onlinesel demo --seeds 1 --output runs/demo

What it does: a small Llama is warmed up on the sources of Python's standard library and then
fine-tuned on other files of it, of whose rows half are corrupted (the tokens after the 32nd
shuffled). Uniform training of 8 rows, full batches of 32, UDS, RHO-Loss and top loss (each 8 rows
out of 32) are compared by held-out loss, once at equal CPU time and once at equal optimizer steps.
Every run is a plain Hugging Face ``Trainer`` with ``OnlineSelection``. It ends with what paid, a
table, a figure of both budgets, ``headline.png`` (equal time over CPU seconds, equal steps over
steps), and one page, ``report.html``. The corpus and the warm model are kept in ``start/`` of the
output folder for the next time; ``--fresh`` makes them again.

Measured (``SEEDS=5 make demo``, 2 CPU cores (AMD EPYC), one thread a run, seeds 0 to 4,
2026-11-22, mean and 95 % t-interval; whole table in ``recipes/results/demo_cpu_5_seeds.md``):
held-out loss after 30 CPU seconds: RHO-Loss 4.514 ± 0.009, uniform 4.589 ± 0.014, UDS 4.624 ±
0.016, full batches 4.659 ± 0.008, top loss 5.325 ± 0.032; after 80 steps 4.527, 4.707, 4.637,
4.608, 5.298. So RHO-Loss pays, UDS gains by the step and not by the second, and top loss trains
on the noise (97 % of its rows).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onlinesel.report import Run
from onlinesel.report.summary import group_arms, reach, t_interval

try:
    from onlinesel.recipes._arms import ARMS, Job, Result, run_job
    from onlinesel.recipes._demos import add_common, check_amounts, run_command, write_up
    from onlinesel.recipes._warm import Start, WarmSettings, prepare
    from onlinesel.recipes._workers import Workers, clear_runs
except ImportError as error:
    raise ImportError(
        "onlinesel.recipes.demo needs transformers, datasets and the report: "
        'pip install "onlinesel[hf,report]".'
    ) from error

__all__ = ["Demo", "jobs_of", "main", "run_demo"]

_UNITS = {"time": "CPU seconds", "steps": "optimizer steps"}
_TITLE = "Choosing rows when half of the pool is corrupted"


@dataclass(frozen=True)
class Demo:
    """What is run.

    Args:
        output: Folder of everything that is written.
        seeds: Runs of each arm.
        seconds: Budget of each run at equal time, in CPU seconds of training.
        steps: Budget of each run at equal steps.
        arms: Names in :data:`onlinesel.recipes._arms.ARMS`.
        warm: Corpus, model and warm-up.
        fresh: Build corpus and warm model again.
        workers: Runs at a time, each in a process of its own with one thread.
    """

    output: Path
    seeds: int = 1
    seconds: float = 30.0
    steps: int = 80
    arms: tuple[str, ...] = tuple(ARMS)
    warm: WarmSettings = field(default_factory=WarmSettings)
    fresh: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        check_amounts("onlinesel demo", self, ("seeds", "seconds", "steps", "workers"))


def jobs_of(demo: Demo, start: Path) -> list[Job]:
    """Return the runs in the order in which they are begun.

    Two runs at a time share a processor, and each is slower for it. Those that are compared by time
    come first, so that none of them runs alone; the longest of the others follow.
    """
    timed = [(seed, arm, "time", demo.seconds) for seed in range(demo.seeds) for arm in demo.arms]
    stepped = [(s, arm, "steps", float(demo.steps)) for s in range(demo.seeds) for arm in demo.arms]
    stepped.sort(key=lambda job: ARMS[job[1]].rows * -1 - 4 * ARMS[job[1]].candidates)
    return [
        Job(
            arm,
            budget,
            amount,
            seed,
            str(demo.output / "runs" / budget / f"{arm.replace(' ', '-').lower()}-{seed}"),
            str(start),
        )
        for seed, arm, budget, amount in [*timed, *stepped]
    ]


def run_demo(demo: Demo) -> Path:
    """Run all arms and return the page about them.

    Args:
        demo: What to run.
    """
    began = time.perf_counter()
    with Workers[Job, Result](demo.workers, run_job) as workers:
        start = _prepare(demo, workers, began)
        jobs = jobs_of(demo, start.folder)
        budgets = " or ".join(dict.fromkeys(f"{job.amount:g} {_UNITS[job.budget]}" for job in jobs))
        print(f"Fine-tuning: {len(jobs)} runs of {budgets} each", flush=True)
        workers.run(jobs, line=_line, doing=lambda job: f"{job.arm} ({job.budget})")
    folders = [job.folder for job in jobs]
    page = write_up(demo.output, folders, _TITLE, lambda runs: _notes(runs, start))
    print(f"All in {time.perf_counter() - began:.0f} s.", flush=True)
    return page


def _prepare(demo: Demo, workers: Workers[Job, Result], began: float) -> Start:
    """Return what all runs start from, and make room for them."""
    print("Preparing what all runs start from", flush=True)
    folder = demo.output / "start"
    start, cached = prepare(demo.warm, folder, fresh=demo.fresh, each=workers.map)
    source = f"from {start.folder} (--fresh builds it again)" if cached else "built"
    loss = start.facts["held_out_loss"]
    print(f"  {source}: held-out loss {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    for budget in _UNITS:
        clear_runs(demo.output / "runs" / budget, "demo")
    return start


def _line(job: Job, result: Result, seconds: float) -> str:
    cost = f"{result.steps} steps, {result.cpu_seconds:.1f} CPU s"
    what = f"{job.arm}, equal {job.budget}, seed {job.seed}"
    return f"{what}: held-out loss {result.loss:.3f} after {cost} (at {seconds:.0f} s)"


def _notes(runs: Sequence[Run], start: Start) -> str:
    """Say where the runs start, and what is left of RHO-Loss's gain if it pays its reference."""
    seconds, rows = start.facts["reference_cpu_seconds"], len(start.pool)
    loss = start.facts["held_out_loss"]
    note = (
        f"All runs start from a held-out loss of {loss:.3f}. The reference losses of RHO-Loss "
        f"({rows} rows, one forward each) took {seconds:.1f} CPU s before the runs and are not in "
        "their time; the verdicts count those of the rows that RHO-Loss looked at."
    )
    timed = {arm.name: arm for arm in group_arms(r for r in runs if r.budget == "time")}
    if not {"uniform", "RHO-Loss"} <= set(timed):
        return note
    ends = {run.seed: run.evals[-1] for run in timed["uniform"].runs}
    shares = []
    for run in timed["RHO-Loss"].runs:
        end = ends[run.seed]
        looked_at = reach(run, end.loss, "step") * run.steps[-1].candidates / run.steps[-1].step
        paid = reach(run, end.loss, "cpu_seconds") + looked_at * seconds / rows
        shares.append(paid / end.cpu_seconds)
    found = t_interval(shares)
    if not found.n:
        return note
    return (
        f"{note} With those of the rows that it looked at counted, RHO-Loss needs {found.text(2)} "
        "of uniform's time to uniform's loss."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlinesel demo",
        description="Compare ways of choosing rows on a small model, on this machine's CPU.",
    )
    add_common(parser, "runs/demo", Demo.seconds, tuple(ARMS))
    add: Any = parser.add_argument
    add("--steps", type=int, default=Demo.steps, help="optimizer steps a run (%(default)s)")
    add("--fresh", action="store_true", help="build corpus and warm model again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit status.

    Args:
        argv: Arguments without the program's name, or None for those of the process.
    """
    return run_command(_parser(), argv, lambda **options: run_demo(Demo(**options)))


if __name__ == "__main__":
    sys.exit(main())
