"""The easiest, hardest and most uncertain prompts of a run: `onlinesel prompts RUN_DIR`.

Read from `prompts.jsonl`, the pass rates that the run predicts, and from the texts in `rows.jsonl`
if it has any. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from onlinesel.report.reading import prompt_of, read_lines, read_meta, row_of
from onlinesel.report.records import Prompt

__all__ = ["Ranking", "main", "rank", "read_prompts"]

_TEXT = 72

Ranking = Mapping[str, Sequence[Prompt]]
"""Title of each list, "easiest", "hardest" and "most uncertain", and its prompts in order."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onlinesel prompts` and return the exit status.

    Args:
        argv: Arguments after `prompts`.

    Example:
        >>> main(["--help"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    parser = argparse.ArgumentParser(
        prog="onlinesel prompts",
        description="List the easiest, hardest and most uncertain prompts of a run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run that predicts pass rates")
    parser.add_argument("--count", type=int, default=10, help="prompts of each list (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")
    options = parser.parse_args(argv)
    prompts = read_prompts(options.run)
    ranking = rank(prompts, options.count)
    wanted = {prompt.id for listed in ranking.values() for prompt in listed}
    rows = read_lines(options.run / "rows.jsonl", row_of)
    texts = {row.id: row.text for row in rows if row.id in wanted}
    if options.json:
        print(_as_json(prompts, ranking, texts))
    else:
        visited = sum(prompt.visits > 0 for prompt in prompts)
        print(f"{options.run}: {len(prompts)} prompts, {visited} visited")
        for title, listed in ranking.items():
            print("\n".join(["", f"{title.capitalize()}:", *_lines(listed, texts)]))
    return 0


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Return the prompts of the run in `path`.

    Example:
        >>> import tempfile
        >>> from onlinesel.report import RunLog
        >>> folder = tempfile.mkdtemp()
        >>> with RunLog(folder) as log:
        ...     log.start(name="band")
        ...     log.prompt_table([(4, 0.1, 0.05, 3, 17)])
        >>> read_prompts(folder)
        [Prompt(id=4, rate=0.1, std=0.05, visits=3, last=17)]
    """
    read_meta(Path(path))  # refuses what is not a run
    file = Path(path) / "prompts.jsonl"
    prompts = list(read_lines(file, prompt_of))
    if not prompts:
        raise ValueError(
            f"read_prompts: path must hold a prompts.jsonl with prompts, got {path} without. "
            "Only runs that predict pass rates write it, with RunLog.prompt_table."
        )
    return prompts


def rank(prompts: Iterable[Prompt], count: int) -> Ranking:
    """Return the `count` prompts of each list; a prompt without the number is in none.

    Easiest and hardest go by the predicted rate, most uncertain by its standard deviation. Ties go
    to the lower id.

    Example:
        >>> found = rank([Prompt(1, 0.9, 0.1, 5, 3), Prompt(2, 0.2, 0.3, 0, None)], 1)
        >>> {title: [prompt.id for prompt in listed] for title, listed in found.items()}
        {'easiest': [1], 'hardest': [2], 'most uncertain': [2]}
    """
    if count < 1:
        raise ValueError(f"rank: count must be at least 1, got {count}. Pass a positive integer.")
    prompts = list(prompts)
    rated = [prompt for prompt in prompts if math.isfinite(prompt.rate)]
    spread = [prompt for prompt in prompts if math.isfinite(prompt.std)]
    return {
        "easiest": sorted(rated, key=lambda p: (-p.rate, p.id))[:count],
        "hardest": sorted(rated, key=lambda p: (p.rate, p.id))[:count],
        "most uncertain": sorted(spread, key=lambda p: (-p.std, p.id))[:count],
    }


def _lines(prompts: Sequence[Prompt], texts: Mapping[int, str]) -> list[str]:
    if not prompts:
        return ["  none: no prompt has the number that this list goes by"]
    cells = [("id", "pass rate", "visits", "last step", "text" if texts else "")]
    for each in prompts:
        rate = f"{each.rate:.3f} ± {each.std:.3f}".replace("nan", "?")
        last = "-" if each.last is None else str(each.last)
        cells.append((str(each.id), rate, str(each.visits), last, _short(texts.get(each.id, ""))))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return [
        "  ".join(["", *(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in cells
    ]


def _short(text: str) -> str:
    # Training text can hold escape sequences, which must not reach a terminal.
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _TEXT else line[: _TEXT - 1] + "…"


def _as_json(prompts: Sequence[Prompt], ranking: Ranking, texts: Mapping[int, str]) -> str:
    def plain(prompt: Prompt) -> dict[str, object]:
        record = prompt._asdict() | {"text": texts.get(prompt.id)}
        return {name: None if value != value else value for name, value in record.items()}

    lists = {
        title.replace(" ", "_"): [plain(prompt) for prompt in listed]
        for title, listed in ranking.items()
    }
    visited = sum(prompt.visits > 0 for prompt in prompts)
    return json.dumps({"prompts": len(prompts), "visited": visited, **lists}, indent=1)
