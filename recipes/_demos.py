"""What the two demos share: settings that mean something, the page about the runs, the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from onlinesel.report import Run, read_run
from onlinesel.report.curves import headline_png
from onlinesel.report.page import table_markdown, write_report
from onlinesel.report.paid import judged

__all__ = ["add_common", "check_amounts", "run_command", "write_up"]


def check_amounts(owner: str, settings: object, names: Iterable[str]) -> None:
    """Refuse amounts that are not above 0; None stands for the default.

    Args:
        owner: The command.
        settings: Has them as attributes.
        names: Of the amounts.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(
                f"{owner}: {name} must be above 0, got {value}. Leave it out for the default."
            )


def write_up(
    output: Path,
    folders: Sequence[str],
    title: str,
    notes: Callable[[Sequence[Run]], str],
    **picture: Any,
) -> Path:
    """Write page, picture and table about some runs, and print the table, what paid first.

    Args:
        output: Folder of the three.
        folders: The run directories.
        title: Of the page.
        notes: Says what stands below the table.
        **picture: Of :func:`onlinesel.report.curves.headline_png`.

    Returns:
        The page.
    """
    runs = [read_run(folder) for folder in folders]
    page = write_report(folders, output / "report.html", title=title)
    drawn = headline_png(runs, output / "headline.png", **picture)
    paid = "\n".join(f"- {verdict}" for verdict in judged(runs))
    table = f"{paid}\n\n{table_markdown(runs)}\n\n{notes(runs)}"
    (output / "table.md").write_text(table + "\n", "utf-8")
    print(f"\n{title}\n\n{table}\n\nPicture: {drawn}\nReport:  {page}\n", flush=True)
    return page


def add_common(
    parser: argparse.ArgumentParser, output: str, seconds: float, arms: Sequence[str]
) -> None:
    """Add the flags that both demos have.

    Args:
        parser: Gets them.
        output: Default of the folder.
        seconds: Default of the budget.
        arms: What may be run.
    """
    add: Any = parser.add_argument
    seeds = int(os.environ.get("SEEDS", "1"))
    add("--seeds", type=int, default=seeds, help="runs of each arm (%(default)s)")
    add("--output", "--out", type=Path, default=Path(output), help="folder (%(default)s)")
    add("--seconds", type=float, default=seconds, help="CPU seconds a run (%(default)s)")
    add("--arms", nargs="+", choices=tuple(arms), default=tuple(arms), metavar="ARM",
        help=f"among {', '.join(arms)}")  # fmt: skip


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Callable[..., Any]
) -> int:
    """Run a demo from the command line and return the exit status.

    Args:
        parser: Of its flags.
        argv: Arguments without the program's name, or None for those of the process.
        run: Takes them by name.
    """
    options = vars(parser.parse_args(argv))
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    try:
        run(**options | lists)
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{parser.prog}: stopped; the next demo begins its runs again.\n")
        return 130
    return 0
