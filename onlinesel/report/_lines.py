"""How lines of a run directory are written: plain JSON, whole files in one move."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from onlinesel.report.reading import read_lines

__all__ = ["check_columns", "drop_after", "items", "number", "open_lines", "plain", "replace_file"]


def check_columns(
    method: str, columns: Mapping[str, list[Any] | None], per: str, remedy: str
) -> None:
    """Refuse columns that are not as long as the first of them."""
    size = len(next(iter(columns.values())) or ())
    for name, values in columns.items():
        if values is not None and len(values) != size:
            raise ValueError(
                f"RunLog.{method}: {name} must have one entry per {per}, got {len(values)} for "
                f"{size} {per}s. {remedy}"
            )


def drop_after(file: Path, step: int) -> None:
    """Drop the lines of `file` whose step is later than `step`, and a truncated last line."""
    kept = (r for r in read_lines(file, dict) if operator.index(r["step"]) <= step)
    replace_file(file, (json.dumps(r, ensure_ascii=False) for r in kept))


def replace_file(target: Path, lines: Iterable[str]) -> None:
    """Write `target` under another name and move it into place: no reader sees half of it."""
    temporary = target.with_name(target.name + ".tmp")
    with open_lines(temporary, "w") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def open_lines(path: Path, mode: str) -> IO[str]:
    # A lone surrogate cannot be UTF-8; as backslash escape it is the JSON escape of that same text.
    return path.open(mode, buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")


def items(values: Any) -> Iterable[Any]:
    # One transfer for a tensor; element by element would wait for the device N times.
    return values.tolist() if hasattr(values, "tolist") else values


def number(value: Any) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """Return `value` as plain JSON types; NaN and infinities, which JSON lacks, become None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return number(float(value))
