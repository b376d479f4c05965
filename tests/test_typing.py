"""What a type checker sees of the package in a user's script: through callbacks and `steps` too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """\
from typing import Any

import onlinesel
from onlinesel.callbacks.dpo import PreferenceSelection
from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.callbacks.lightning import OnlineSelection as LightningSelection
from onlinesel.rl import TARS, ZeroVariance
from onlinesel.strategies import TopLoss


def use(model: Any, trainer: Any) -> None:
    for step in onlinesel.steps([], model, TopLoss(), candidates=4, scope="rank", normalize="rows"):
        step.micro_batches[0].batch
    onlinesel.steps([], model, TopLoss(), bogus=3)  # wrong
    onlinesel.steps([], model, TopLoss(), scope="gobal")  # wrong
    onlinesel.steps([], model, TopLoss(), normalize="words")  # wrong
    onlinesel.stepz  # wrong
    OnlineSelection(trainer, TopLoss(), candidates=4, scope="global", normalize=None).detach()
    OnlineSelection(trainer, TopLoss(), candidate=4)  # wrong
    OnlineSelection(trainer, TopLoss(), scope="gobal")  # wrong
    OnlineSelection(trainer, TopLoss).detached()  # wrong
    LightningSelection(TopLoss(), scope="batch", normalize="samples")
    LightningSelection(TopLoss(), normalize="words")  # wrong
    RolloutSelection(trainer, gate=ZeroVariance())
    RolloutSelection(trainer, gates=ZeroVariance())  # wrong
    PreferenceSelection(trainer, TARS())
    PreferenceSelection(trainer, 3)  # wrong
"""
WRONG = [n for n, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")]
# Frameworks cost a minute and are not what is asked about here.
CONFIG = """\
[mypy]
ignore_missing_imports = true
[mypy-accelerate.*,datasets.*,lightning.*,safetensors.*,torch.*,transformers.*,trl.*]
follow_imports = skip
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, "utf-8")
    (tmp_path / "mypy.ini").write_text(CONFIG, "utf-8")
    return path


def test_mypy_finds_what_is_wrong_and_nothing_else(script: Path) -> None:
    """It runs elsewhere and reads the checkout, in which callbacks are links."""
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", script.name]
    where = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=script.parent, env=where, capture_output=True, text=True)
    found = re.findall(r"^script\.py:(\d+): error:", done.stdout, re.MULTILINE)
    assert [int(line) for line in found] == WRONG, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright")
def test_pyright_finds_the_same(script: Path) -> None:
    settings = {"extraPaths": [str(ROOT)], "include": [script.name], "pythonVersion": "3.11"}
    (script.parent / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    told = json.loads(done.stdout)["generalDiagnostics"]
    lines = {d["range"]["start"]["line"] + 1 for d in told if d["severity"] == "error"}
    assert sorted(lines) == WRONG, done.stdout


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_the_links_lead_to_the_folders(name: str) -> None:
    link = ROOT / "onlinesel" / name
    assert link.is_symlink() and link.resolve() == (ROOT / name).resolve()
