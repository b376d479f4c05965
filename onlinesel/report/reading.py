"""Read the run directory that `onlinesel.report.runlog` writes."""

from __future__ import annotations

import json
import math
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from onlinesel.report.records import Choice, Evaluation, Generation, Prompt, Row, Run, Step

__all__ = [
    "FORMAT",
    "find_runs",
    "prompt_of",
    "read_lines",
    "read_meta",
    "read_run",
    "row_of",
    "step_of",
]

FORMAT = 1
"""Version of the run directory that is written, and the only one that is read."""

_META = (
    "name", "strategy", "candidates", "scope", "seed", "budget", "command", "hardware", "versions",
    "date",
)  # fmt: skip
_T = TypeVar("_T")


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    A truncated last line, left by a killed run, is skipped; any other broken line is an error.

    Args:
        path: Directory that holds `run.json`.

    Example:
        >>> import tempfile
        >>> from onlinesel.report import RunLog
        >>> folder = tempfile.mkdtemp()
        >>> RunLog(folder).start(name="RHO-Loss", seed=4)
        >>> read_run(folder).seed
        4
    """
    folder = Path(path)
    meta = read_meta(folder)
    known = {name: meta.pop(name) for name in _META if name in meta}
    return Run(
        path=folder,
        **known,
        extra=meta,
        steps=tuple(read_lines(folder / "steps.jsonl", step_of)),
        choices=tuple(read_lines(folder / "choices.jsonl", _choice)),
        evals=tuple(read_lines(folder / "evals.jsonl", _evaluation)),
        rows={row.id: row for row in read_lines(folder / "rows.jsonl", row_of)},
        generations=tuple(read_lines(folder / "rollouts.jsonl", _generation)),
        prompts={each.id: each for each in read_lines(folder / "prompts.jsonl", prompt_of)},
        logs=tuple(read_lines(folder / "logs.jsonl", _evaluation)),
    )


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the run directories among `paths` and below them, each once, in a stable order.

    Args:
        paths: Run directories, or folders that hold run directories at any depth.

    Example:
        >>> import tempfile
        >>> from onlinesel.report import RunLog
        >>> folder = Path(tempfile.mkdtemp())
        >>> RunLog(folder / "uds-0").start(name="UDS", seed=0)
        >>> [found.name for found in find_runs([folder, folder / "uds-0"])]
        ['uds-0']
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        _check_exists("find_runs", path)
        inside = [path / "run.json"] if (path / "run.json").exists() else path.rglob("run.json")
        runs = sorted(file.parent for file in inside)
        if not runs:
            raise ValueError(
                f"find_runs: path must be a run or hold runs, got {path}, which holds none. Train "
                "with record= this folder (a run writes its run.json when it begins)."
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`, without its format version.

    Example:
        >>> import tempfile
        >>> from onlinesel.report import RunLog
        >>> folder = Path(tempfile.mkdtemp())
        >>> RunLog(folder).start(name="UDS", seed=2)
        >>> read_meta(folder)["seed"]
        2
    """
    file = folder / "run.json"
    _check_exists("read_run", folder)
    if not file.exists():
        raise ValueError(
            f"read_run: path must hold a run.json, got {folder}. "
            "RunLog.start writes it; call it before the first step."
        )
    try:
        meta = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"read_run: run.json must be JSON, got {file} ({error}). Restore it, or remove the run."
        ) from error
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT or not isinstance(meta.get("name"), str):
        raise ValueError(
            f"read_run: run.json must have a name and format {FORMAT}, got format {version!r} in "
            f"{file}. Read it with the onlinesel that wrote it."
        )
    meta.pop("format")
    return meta


def _check_exists(owner: str, folder: Path) -> None:
    if not folder.exists():
        raise ValueError(
            f"{owner}: path must exist, got {folder}, which is not there (from {Path.cwd()}). "
            "Give the folder that record= named."
        )


def read_lines(file: Path, build: Callable[[Mapping[str, Any]], _T]) -> Iterator[_T]:
    """Yield `build` of every line; skip a truncated last line, refuse any other broken one.

    Example:
        >>> list(read_lines(Path("no-such-file.jsonl"), row_of))
        []
    """
    if not file.exists():
        return
    # Bytes, split at \n alone: a killed run can end inside a character, and text may hold U+2028.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield build(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(
                    f"read_run: every line of {file.name} must be a record of format {FORMAT}, got "
                    f"{line[:60]!r} in line {number} of {file} ({type(error).__name__}: {error}). "
                    "Remove that line, or the run."
                ) from error


def step_of(record: Mapping[str, Any]) -> Step:
    """Return the step that a line of `steps.jsonl` describes.

    Example:
        >>> step_of({"step": 1, "seconds": 0.5, "rows": 8, "candidates": 32}).rows
        8
    """
    return Step(**_split(record, Step, ("step", "rows", "candidates")))


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**_split(record, Evaluation, ("step", "rows")))


def _split(record: Mapping[str, Any], kind: type, whole: tuple[str, ...]) -> dict[str, Any]:
    names = [n for n in kind.__dataclass_fields__ if n != "metrics"]  # type: ignore[attr-defined]
    known: dict[str, Any] = {n: _float(record[n]) for n in names if n in record and n not in whole}
    known |= {n: operator.index(record[n]) for n in whole}
    return known | {"metrics": {n: v for n, v in record.items() if n not in names}}


def _choice(record: Mapping[str, Any]) -> Choice:
    ids, scores, tokens = record["ids"], record.get("scores"), record.get("tokens")
    columns = [ids, record["weights"], scores, tokens]
    if any(column is not None and len(column) != len(ids) for column in columns):
        raise ValueError("ids, weights, scores and tokens differ in length")
    return Choice(
        step=operator.index(record["step"]),
        ids=array("q", ids),
        weights=array("d", map(_float, record["weights"])),
        scores=None if scores is None else array("d", map(_float, scores)),
        tokens=None if tokens is None else array("q", tokens),
    )


def _generation(record: Mapping[str, Any]) -> Generation:
    lists = [record[name] for name in ("prompts", "successes", "trials", "kept")]
    if len({len(each) for each in lists}) != 1:
        raise ValueError("prompts, successes, trials and kept differ in length")
    prompts, successes, trials, kept = lists
    counts = ("step", "rollouts", "tokens", "rejected_tokens", "rounds")
    return Generation(
        **{name: operator.index(record[name]) for name in counts},
        seconds=_float(record["seconds"]),
        cpu_seconds=_float(record["cpu_seconds"]),
        prompts=array("q", prompts),
        successes=array("d", map(_float, successes)),
        trials=array("q", trials),
        kept=array("b", kept),
    )


def prompt_of(record: Mapping[str, Any]) -> Prompt:
    """Return the prompt that a line of `prompts.jsonl` describes.

    Example:
        >>> prompt_of({"id": 7, "rate": 0.5, "std": None, "visits": 0, "last": None})
        Prompt(id=7, rate=0.5, std=nan, visits=0, last=None)
    """
    last = record["last"]
    return Prompt(
        operator.index(record["id"]),
        _float(record["rate"]),
        _float(record["std"]),
        operator.index(record["visits"]),
        None if last is None else operator.index(last),
    )


def row_of(record: Mapping[str, Any]) -> Row:
    """Return the row that a line of `rows.jsonl` describes.

    Example:
        >>> row_of({"id": 1, "text": "Two."})
        Row(id=1, source=None, text='Two.')
    """
    source = record.get("source")
    return Row(
        operator.index(record["id"]), None if source is None else str(source), str(record["text"])
    )


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
