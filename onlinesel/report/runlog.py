"""Write the run directory: what was scored, what trained, and what it cost.

A run directory holds `run.json` (who and where) and JSON-lines files: `steps.jsonl` (cost of every
optimizer step), `choices.jsonl` (candidates and weights of every step), `evals.jsonl` (held-out
loss), `logs.jsonl` (what the trainer logged) and, optionally, `rows.jsonl` (text and source of the
training pool, or of a part of it). A run that generates its
completions has `rollouts.jsonl` (cost and groups of every generation batch) and may have
`prompts.jsonl` (the pass rates that it predicts). Every line is flushed when it is written, so a
killed run loses at most the line that it was writing.

Only one process may write a run directory: under data parallelism, rank 0.
"""

from __future__ import annotations

import json
import operator
import os
import shlex
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from onlinesel.report._lines import (
    check_columns,
    drop_after,
    items,
    number,
    open_lines,
    plain,
    replace_file,
)
from onlinesel.report._machine import hardware, versions
from onlinesel.report.reading import (
    FORMAT,
    find_runs,
    prompt_of,
    read_lines,
    read_meta,
    read_run,
    row_of,
    step_of,
)
from onlinesel.report.records import Choice, Evaluation, Generation, Prompt, Row, Run, Step

__all__ = [
    "Choice",
    "Evaluation",
    "Generation",
    "Prompt",
    "Row",
    "Run",
    "RunLog",
    "Step",
    "find_runs",
    "read_run",
]

# File -> steps that its line of step k lies ahead of the checkpoint of step k: a run that goes on
# after step k has trained that step, but generates anew for the next.
_STEPPED = {
    "steps.jsonl": 0, "choices.jsonl": 0, "evals.jsonl": 0, "logs.jsonl": 0, "rollouts.jsonl": 1,
}  # fmt: skip


class RunLog:
    """Append to a run directory, one flushed line at a time.

    Args:
        path: Directory of this run; created if needed. It must not hold steps already, unless
            `resume_step` is given, so that two runs never mix.
        resume_step: Continue a run after this optimizer step: lines with a later step are dropped,
            so that the steps done again are not counted twice. 0 starts the run afresh.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with RunLog(folder) as log:
        ...     log.start(name="UDS", seed=0)
        ...     log.step(step=1, seconds=0.2, rows=1, candidates=2, loss=float("nan"))
        ...     log.choice(1, ids=[2**60, 5], weights=[1.0, 0.0], scores=[0.9, 0.1], tokens=[7, 3])
        >>> run = read_run(folder)
        >>> run.name, list(run.choices[0].ids), run.steps[0].loss
        ('UDS', [1152921504606846976, 5], nan)
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        if resume_step is not None and resume_step < 0:
            raise ValueError(
                f"RunLog: resume_step must be >= 0, got {resume_step}. "
                "Pass the number of optimizer steps in the checkpoint."
            )
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        used = self.stepped(self.path)
        if used and resume_step is None:
            raise ValueError(
                f"RunLog: path must be a directory without steps, got {self.path} with {used[0]}. "
                "Name another folder (record=), remove this one, or resume from a checkpoint of "
                "that run. A RunLog of your own takes resume_step."
            )
        for name in used:
            drop_after(self.path / name, operator.index(resume_step or 0) - _STEPPED[name])
        if resume_step == 0:  # what an earlier run believed of its prompts is no start
            (self.path / "prompts.jsonl").unlink(missing_ok=True)

    @staticmethod
    def stepped(path: Path) -> list[str]:
        """Return the files in `path` that hold steps of a run."""
        files = ((name, path / name) for name in _STEPPED)
        return [name for name, file in files if file.exists() and file.stat().st_size]

    def last_step(self) -> Step | None:
        """Return the last step of the record as it stands, None if there is none.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.step(step=1, seconds=0.2, rows=8, candidates=32)
            ...     log.last_step().rows
            8
        """
        found = deque(read_lines(self.path / "steps.jsonl", step_of), maxlen=1)
        return found[0] if found else None

    def start(self, **meta: Any) -> None:
        """Write `run.json` in one move.

        Args:
            **meta: `name` (of the arm, required), `strategy`, `candidates`, `scope`, `seed`,
                `budget` ("time", "steps", "rollouts" or None), and any further key. `command`,
                `hardware`, `versions` and `date` are filled in when left out; a resumed run keeps
                its first date. `clock` ("cpu" or "wall") names the seconds that arms are compared
                by.

        Example:
            >>> import tempfile
            >>> RunLog(tempfile.mkdtemp()).start(name="Uniform", seed=1, budget="steps")
        """
        if not isinstance(meta.get("name"), str) or not meta["name"]:
            raise ValueError(
                f"RunLog.start: name must be a non-empty string, got {meta.get('name')!r}. "
                "Name the arm: runs that differ only by seed share it."
            )
        target = self.path / "run.json"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        defaults: dict[str, Any] = {
            "strategy": "", "candidates": None, "scope": "", "seed": None, "budget": None,
            "command": shlex.join(sys.argv), "hardware": hardware(), "versions": versions(),
            "date": read_meta(self.path).get("date", now) if target.exists() else now,
        }  # fmt: skip
        record = {"format": FORMAT} | defaults | meta
        replace_file(target, [json.dumps(plain(record), ensure_ascii=False, indent=1)])

    def step(
        self,
        *,
        step: int,
        seconds: float,
        rows: int,
        candidates: int,
        cpu_seconds: float | None = None,
        score_seconds: float | None = None,
        step_seconds: float | None = None,
        loss: float | None = None,
        **metrics: Any,
    ) -> None:
        """Append one optimizer step.

        Args:
            step: Optimizer steps done, this one included.
            seconds: Training seconds so far by the wall clock, without evaluation.
            rows: Rows trained so far.
            candidates: Rows scored so far.
            cpu_seconds: CPU seconds so far.
            score_seconds: Seconds of this step spent on scoring and choosing.
            step_seconds: Seconds of this whole step.
            loss: Training loss of this step.
            **metrics: Further numbers, kept under their names.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.step(step=1, seconds=0.2, rows=8, candidates=32, lr=1e-3)
        """
        self._append("steps.jsonl", {
            "step": operator.index(step), "seconds": seconds, "cpu_seconds": cpu_seconds,
            "rows": operator.index(rows), "candidates": operator.index(candidates),
            "score_seconds": score_seconds, "step_seconds": step_seconds, "loss": loss, **metrics,
        })  # fmt: skip

    def choice(
        self,
        step: int,
        ids: Iterable[int],
        weights: Iterable[float],
        scores: Iterable[float | None] | None = None,
        tokens: Iterable[int] | None = None,
    ) -> None:
        """Append the decision of one optimizer step; lists, arrays and tensors are accepted.

        Args:
            step: Optimizer step that trained the chosen rows.
            ids: (N,) int64 ids of the candidates.
            weights: (N,) weights, 0 for a dropped row.
            scores: (N,) scores that the strategy compared, if it has any.
            tokens: (N,) loss tokens of each candidate, if known.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.choice(1, ids=[4, 9], weights=[0.0, 1.0])
        """
        columns: dict[str, list[Any] | None] = {
            "ids": [operator.index(i) for i in items(ids)],
            "weights": [number(w) for w in items(weights)],
            "scores": None if scores is None else [number(s) for s in items(scores)],
            "tokens": None if tokens is None else [operator.index(t) for t in items(tokens)],
        }
        check_columns("choice", columns, "id", "Pass every candidate, weight 0 where dropped.")
        self._append("choices.jsonl", {"step": operator.index(step), **columns})

    def evaluation(
        self,
        *,
        step: int,
        seconds: float,
        rows: int,
        loss: float | None = None,
        cpu_seconds: float | None = None,
        **metrics: Any,
    ) -> None:
        """Append one held-out evaluation; its own time must not be in `seconds`.

        The report of a run that generates reads `reward` (held-out reward) and `rollouts`
        (completions generated so far) among the `metrics`.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.evaluation(step=0, seconds=0.0, rows=0, loss=4.17)
        """
        self._append("evals.jsonl", {
            "step": operator.index(step), "seconds": seconds, "cpu_seconds": cpu_seconds,
            "rows": operator.index(rows), "loss": loss, **metrics,
        })  # fmt: skip

    def logged(
        self,
        *,
        step: int,
        seconds: float,
        rows: int,
        loss: float | None = None,
        cpu_seconds: float | None = None,
        **metrics: Any,
    ) -> None:
        """Append what a trainer logged of its training, which is drawn where nothing was evaluated.

        The report reads `loss`, and of a run that generates `reward` and `rollouts`.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.logged(step=10, seconds=2.0, rows=80, loss=3.1)
        """
        self._append("logs.jsonl", {
            "step": operator.index(step), "seconds": seconds, "cpu_seconds": cpu_seconds,
            "rows": operator.index(rows), "loss": loss, **metrics,
        })  # fmt: skip

    def generation(
        self,
        *,
        step: int,
        seconds: float,
        cpu_seconds: float | None,
        rollouts: int,
        tokens: int,
        rejected_tokens: int,
        rounds: int,
        prompts: Iterable[int],
        successes: Iterable[float | None],
        trials: Iterable[int],
        kept: Iterable[bool],
    ) -> None:
        """Append one generation batch; lists, arrays and tensors are accepted.

        Args:
            step: Optimizer steps done when it was generated.
            seconds: Training seconds so far by the wall clock, without evaluation.
            cpu_seconds: CPU seconds so far.
            rollouts: Completions generated so far in the run.
            tokens: Their tokens.
            rejected_tokens: Those of them in groups that did not train.
            rounds: Calls that generated this batch; 1 if nothing was refilled.
            prompts: (Q,) int64 id of the prompt of each scored group, -1 if unknown.
            successes: (Q,) successes of each group, None or NaN if unknown.
            trials: (Q,) completions of each group that could be scored.
            kept: (Q,) whether the group trains.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.generation(
            ...         step=0, seconds=1.5, cpu_seconds=1.4, rollouts=16, tokens=90, rounds=1,
            ...         rejected_tokens=40, prompts=[4, 9], successes=[0, 3], trials=[8, 8],
            ...         kept=[False, True],
            ...     )
        """
        groups: dict[str, list[Any] | None] = {
            "prompts": [operator.index(i) for i in items(prompts)],
            "successes": [number(s) for s in items(successes)],
            "trials": [operator.index(t) for t in items(trials)],
            "kept": [bool(k) for k in items(kept)],
        }
        check_columns("generation", groups, "prompt", "Pass every scored group, kept or not.")
        self._append("rollouts.jsonl", {
            "step": operator.index(step), "seconds": seconds, "cpu_seconds": cpu_seconds,
            "rollouts": operator.index(rollouts), "tokens": operator.index(tokens),
            "rejected_tokens": operator.index(rejected_tokens), "rounds": operator.index(rounds),
            **groups,
        })  # fmt: skip

    def prompt_table(
        self,
        rows: Iterable[Prompt | tuple[int, float, float, int, int | None] | Mapping[str, Any]],
    ) -> None:
        """Write `prompts.jsonl` about every prompt, in place of an earlier one.

        Example:
            >>> import tempfile
            >>> log = RunLog(tempfile.mkdtemp())
            >>> log.prompt_table([Prompt(4, rate=0.1, std=0.05, visits=3, last=17)])
        """
        table = (prompt_of(r if isinstance(r, Mapping) else Prompt(*r)._asdict()) for r in rows)
        lines = (json.dumps(plain(each._asdict()), allow_nan=False) for each in table)
        replace_file(self.path / "prompts.jsonl", lines)

    def rows(self, rows: Iterable[Row | tuple[int, str | None, str] | Mapping[str, Any]]) -> None:
        """Write `rows.jsonl` about the whole training pool, in place of an earlier one.

        Example:
            >>> import tempfile
            >>> RunLog(tempfile.mkdtemp()).rows([(0, "wiki", "One."), {"id": 1, "text": "Two."}])
        """
        pool = (row_of(r) if isinstance(r, Mapping) else Row(*r) for r in rows)
        records = (r._asdict() | {"id": operator.index(r.id)} for r in pool)
        lines = (json.dumps(r, ensure_ascii=False) for r in records)
        replace_file(self.path / "rows.jsonl", lines)

    def more_rows(self, rows: Iterable[Row]) -> None:
        """Append rows to `rows.jsonl`, as they are seen.

        Example:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp()) as log:
            ...     log.more_rows([Row(7, None, "Seven.")])
        """
        for row in rows:
            self._append("rows.jsonl", row._asdict() | {"id": operator.index(row.id)})

    def close(self) -> None:
        """Close the files; a later line opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        if name not in self._files:
            self._files[name] = open_lines(self.path / name, "a")
        self._files[name].write(line + "\n")
