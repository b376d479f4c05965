"""The command line: `onlinesel sft|grpo|report|prompts|bench|demo|demo-grpo`.

This level only hands on: every command parses its own arguments, and its module is imported when
it is asked for, so that none needs the packages of another.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = {
    "sft": ("onlinesel.recipes.sft", "fine-tune a model, choosing its rows (TRL's flags and ours)"),
    "grpo": (
        "onlinesel.recipes.grpo",
        "GRPO on problems the model can learn from (TRL's flags and ours)",
    ),
    "report": ("onlinesel.report.page", "write an HTML page about recorded runs"),
    "prompts": ("onlinesel.report.prompts", "list a run's easiest, hardest and unsure prompts"),
    "bench": ("onlinesel.bench", "time the kernels, and what deciding costs on many ranks"),
    "demo": ("onlinesel.recipes.demo", "compare methods on a small model, on a CPU, in minutes"),
    "demo-grpo": (
        "onlinesel.recipes.demo_grpo",
        "compare GRPO's ways of choosing problems, on a CPU, in minutes",
    ),
}

# "Owner: argument must be <rule>, got <value>. <remedy>" was written for the user. Any other
# ValueError is a fault, whose traceback is wanted.
_DESIGNED = re.compile(r"\S[^:]*: .+ must .+, got ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        argv: Arguments without the program's name, or None for those of the process.

    Returns:
        The command's own status; 2 for a command that cannot run as it was asked to.

    Example:
        >>> main(["--help"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # What follows the command is the command's, --help included.
    command = parser.parse_args(arguments[:1]).command
    if command is None:
        parser.print_help()
        return 2
    try:
        return int(importlib.import_module(_COMMANDS[command][0]).main(arguments[1:]))
    except ImportError as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return _refuse(command, f"{error}{cause}")
    except ValueError as error:
        if not _DESIGNED.match(str(error)):
            raise
        return _refuse(command, str(error))


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:11}{text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="onlinesel",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Choose and weigh the rows of every batch while a language model trains.",
        epilog=f"commands:\n{listed}\n\n`onlinesel COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument(
        "command", nargs="?", choices=tuple(_COMMANDS), metavar="COMMAND", help="see below"
    )
    return parser


def _version() -> str:
    from onlinesel import __version__

    return __version__


def _refuse(command: str, message: str) -> int:
    sys.stderr.write(f"onlinesel {command}: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
