"""The command line: what it hands on, what it refuses, and that it asks for no package unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onlinesel
from onlinesel import cli


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for the module of `onlinesel bench`."""
    module = ModuleType("onlinesel.bench")
    monkeypatch.setitem(sys.modules, "onlinesel.bench", module)
    return module


def test_a_command_gets_everything_that_follows_it_and_gives_the_status(fake: ModuleType) -> None:
    seen: list[list[str]] = []
    fake.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    assert cli.main(["bench", "--help", "--version", "x", "-o", "y"]) == 7
    assert cli.main(["bench"]) == 7
    assert seen == [["--help", "--version", "x", "-o", "y"], []]


def test_the_arguments_of_the_process_are_the_default(
    fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["onlinesel", "bench", "scores"])
    fake.main = lambda argv: len(argv)  # type: ignore[attr-defined]
    assert cli.main() == 1


def test_a_missing_package_is_a_line_that_says_what_to_install(
    fake: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        try:
            import surely_not_installed  # noqa: F401
        except ImportError as error:
            raise ImportError('it needs x: pip install "onlinesel[x]".') from error
        return 0

    fake.main = main  # type: ignore[attr-defined]
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == (
        'onlinesel bench: it needs x: pip install "onlinesel[x]". '
        "(No module named 'surely_not_installed')\n"
    )


def test_an_error_written_for_the_user_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "scores", "--tokens", "0"]) == 2
    assert capsys.readouterr().err == (
        "onlinesel bench: bench_scores: tokens must be at least 1, got 0. "
        "Pass a positive integer.\n"
    )


def test_any_other_value_error_keeps_its_traceback(fake: ModuleType) -> None:
    fake.main = lambda argv: int("x")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["bench"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    commands = ("sft", "grpo", "report", "prompts", "bench", "demo", "demo-grpo")
    assert [name for name in commands if f"\n  {name} " not in text] == []


def test_no_command_is_help_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: onlinesel" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["sfft", "--nosuch"])
def test_an_unknown_command_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([wrong, "--help"])
    assert exit_.value.code == 2
    assert wrong in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"onlinesel {onlinesel.__version__}\n"


def test_the_page_is_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["report", str(tmp_path)])
    assert exit_.value.code == 2
    assert "find_runs: path must be a run or hold runs" in capsys.readouterr().err


def test_prompts_are_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prompts", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"onlinesel prompts: read_run: path must hold a run.json, got {tmp_path}. "
        "RunLog.start writes it; call it before the first step.\n"
    )


def test_help_loads_no_framework() -> None:
    code = (
        "import sys\nfrom onlinesel import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'transformers', 'trl', 'matplotlib', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
