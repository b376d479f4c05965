"""What is not installed: every public module imports, or says which extra it needs."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_imports import modules

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
REMEDY = re.compile(r'pip install "onlinesel\[([a-z,]+)\]"\.$')
TRANSFORMERS = frozenset({
    "accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "transformers",
})  # fmt: skip
OTHERS = frozenset({
    "datasets", "deepspeed", "jinja2", "lightning", "matplotlib", "pandas", "peft", "pyarrow",
    "pytorch_lightning", "sklearn", "triton", "trl",
})  # fmt: skip
# A callback is imported from its package; what that is made of is its own affair.
INSIDE = re.compile(r"\._|^onlinesel\.callbacks\.\w+\.")
PUBLIC = [name for name, _ in modules() if not INSIDE.search(name)]


@functools.cache
def imported_without(missing: frozenset[str]) -> dict[str, str | None]:
    """Import each public module where some packages are missing; returns the error of each."""
    code = f"""
import importlib, json, sys
import torch
class Present:  # the finders of packages, but for some names
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(missing)!r}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
for name in list(sys.modules):
    if name.split(".")[0] in {set(missing)!r}:
        del sys.modules[name]
sys.meta_path[:] = [Present(finder) for finder in sys.meta_path]
found = {{}}
for name in {PUBLIC!r}:
    try:
        importlib.import_module(name)
        found[name] = None
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("missing", [TRANSFORMERS | OTHERS, OTHERS])
def test_a_module_imports_or_names_its_extra(missing: frozenset[str]) -> None:
    for name, error in imported_without(missing).items():
        if error is None:
            continue
        remedy = REMEDY.search(error)
        assert error.startswith("ImportError: ") and remedy, f"{name}: {error}"
        assert set(remedy[1].split(",")) <= set(EXTRAS), f"{name}: {error}"


def test_what_needs_nothing_but_torch() -> None:
    found = imported_without(TRANSFORMERS | OTHERS)
    needing = {name for name, error in found.items() if error is not None}
    assert needing == {
        "onlinesel.callbacks.dpo", "onlinesel.callbacks.grpo", "onlinesel.callbacks.hf",
        "onlinesel.callbacks.lightning", "onlinesel.recipes.bench_step",
        "onlinesel.recipes.capabilities", "onlinesel.recipes.demo",
        "onlinesel.recipes.demo_grpo", "onlinesel.recipes.grpo", "onlinesel.recipes.sft",
        "onlinesel.report.curves", "onlinesel.report.drawing", "onlinesel.report.figures",
        "onlinesel.report.findings", "onlinesel.report.kept", "onlinesel.report.listing",
        "onlinesel.report.page", "onlinesel.report.rollout_figures",
        "onlinesel.report.rollout_findings", "onlinesel.report.rollouts",
    }  # fmt: skip


def test_the_trainer_callback_needs_transformers_alone() -> None:
    """Rented machines often have transformers, and neither TRL nor datasets nor peft."""
    found = imported_without(OTHERS)
    assert found["onlinesel.callbacks.hf"] is None
    assert found["onlinesel.callbacks.loop"] is None
