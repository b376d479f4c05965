"""The rules of the source: what importing costs, who may import whom, randomness, sizes.

Every rule is a function from one module's source to a list of violations, so that each is also
shown to fail on a made-up source.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "onlinesel": "onlinesel",
    "callbacks": "onlinesel.callbacks",
    "recipes": "onlinesel.recipes",
}
MAX_FILE, MAX_FUNCTION = 400, 60

Rule = Callable[[str, str], list[str]]  # dotted name, source -> violations

# What onlinesel loads beyond what torch itself loads must contain none of these.
HEAVY = {
    "accelerate", "datasets", "deepspeed", "jinja2", "lightning", "matplotlib", "numpy", "pandas",
    "peft", "pytorch_lightning", "tokenizers", "transformers", "triton", "trl",
}  # fmt: skip

# Importer -> what of onlinesel it may import. A name stands for itself and everything below it; the
# longest importer that fits decides, then the last rule that fits; "-" forbids. What adapters share
# lies in `callbacks/_shared/`; apart from that only grpo builds on another, hf.
CORE = ("onlinesel", "-onlinesel.callbacks", "-onlinesel.recipes", "-onlinesel.cli")
HOST = (*CORE, "onlinesel.callbacks._shared")
BLIND = (*CORE, "-onlinesel.strategies", "-onlinesel.rl", "-onlinesel.report")  # knows no method
METHOD = ("onlinesel.types", "onlinesel.weights", "onlinesel.ledger", "onlinesel.kernels")
ROWS = ("onlinesel.types", "onlinesel._base", "onlinesel.data", "onlinesel.parallel")
MAY_IMPORT = {
    "onlinesel": BLIND,
    "onlinesel._base": ("onlinesel._base",),
    "onlinesel._moved": ("onlinesel._moved",),
    "onlinesel.types": (),
    "onlinesel.weights": ("onlinesel.types", "onlinesel._base"),
    "onlinesel.data": (*ROWS, "onlinesel.data"),
    "onlinesel.parallel": ROWS,
    "onlinesel.scoring": (*ROWS, "onlinesel.kernels", "onlinesel.scoring"),
    "onlinesel.kernels": ("onlinesel.kernels", "onlinesel._base"),
    "onlinesel.strategies": (*METHOD, "onlinesel.rl", "onlinesel.strategies"),
    "onlinesel.rl": (*METHOD, "onlinesel.rl"),
    "onlinesel._contract": ("onlinesel.types",),
    "onlinesel.quotas": ("onlinesel.types", "onlinesel._contract"),
    "onlinesel.mixing": ("onlinesel.types", "onlinesel.mixing"),
    "onlinesel.report": (*BLIND, "onlinesel.report"),
    "onlinesel.bench": (*CORE, "-onlinesel.report", "onlinesel.bench"),
    "onlinesel.cli": ("onlinesel", "-onlinesel.callbacks"),
    "onlinesel.callbacks": HOST,
    "onlinesel.callbacks.dpo": (*HOST, "onlinesel.callbacks.dpo"),
    "onlinesel.callbacks.grpo": (*HOST, "onlinesel.callbacks.grpo", "onlinesel.callbacks.hf"),
    "onlinesel.callbacks.hf": (*HOST, "onlinesel.callbacks.hf"),
    "onlinesel.callbacks.lightning": (*HOST, "onlinesel.callbacks.lightning"),
    "onlinesel.callbacks.loop": (*HOST, "onlinesel.callbacks.loop"),
    "onlinesel.recipes": ("onlinesel",),
}
FOR_CHECKERS = {"onlinesel": "onlinesel.callbacks.loop.steps"}  # and never at run time
THIRD_PARTY = {  # None: anything
    "onlinesel": {"torch"},
    "onlinesel.kernels": {"torch", "triton"},
    "onlinesel.report": {"torch", "numpy", "matplotlib", "jinja2", "markupsafe"},
    "onlinesel.bench": {"torch", "matplotlib"},
    "onlinesel.callbacks": None,
    "onlinesel.recipes": None,
}
RANDOM = {
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_",
    "multinomial", "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "random_", "randperm", "uniform_",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every module of the package."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix if prefix.endswith("_") else prefix + ".")


def longest(table: dict[str, object], name: str) -> str:
    return max((key for key in table if covers(key, name)), key=len)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything imported; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def wrong_imports(name: str, source: str) -> list[str]:
    rules = MAY_IMPORT[longest(MAY_IMPORT, name)]
    outside = THIRD_PARTY[longest(THIRD_PARTY, name)]

    def fine(target: str) -> bool:
        top = target.split(".")[0]
        if target == FOR_CHECKERS.get(name):
            return True
        if top == "onlinesel":
            fitting = [rule for rule in rules if covers(rule.removeprefix("-"), target)]
            return bool(fitting) and not fitting[-1].startswith("-")
        return top in sys.stdlib_module_names or outside is None or top in outside

    found = [(line, target) for line, target in imported(source) if not fine(target)]
    return [f"{name}:{line} imports {target}" for line, target in found]


def second_copies(name: str, source: str) -> list[str]:
    """Find imports that would load a second module object from the repository root."""
    tops = ("callbacks", "recipes")
    return [
        f"{name}:{line} imports {target}: write onlinesel.{target}"
        for line, target in imported(source)
        if target.split(".")[0] in tops
    ]


def hidden_randomness(name: str, source: str) -> list[str]:
    found = [
        f"{name}:{line} imports {target}: take a torch.Generator"
        for line, target in imported(source)
        if target.split(".")[0] == "random" or covers("numpy.random", target)
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
            found.append(f"{name}:{node.lineno} uses {ast.unparse(node)}: take a torch.Generator")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in RANDOM and "generator" not in {word.arg for word in node.keywords}:
                found.append(f"{name}:{node.lineno} calls {called} without generator=")
    return found


def missing_all(name: str, source: str) -> list[str]:
    body = ast.parse(source).body
    only_docstring = len(body) == 1 and isinstance(body[0], ast.Expr)
    private = any(part.startswith("_") for part in name.split("."))
    names = [ast.unparse(t) for n in body if isinstance(n, ast.Assign) for t in n.targets]
    return [] if only_docstring or private or "__all__" in names else [f"{name} has no __all__"]


def too_long(name: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    found = [f"{name} has {lines} lines"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION:
                found.append(f"{name}:{node.lineno} {node.name} has {size} lines")
    return found


def gather(rule: Rule) -> list[str]:
    return [line for name, path in modules() for line in rule(name, path.read_text("utf-8"))]


@pytest.mark.parametrize("rule", [wrong_imports, missing_all, too_long])
def test_the_package_keeps(rule: Rule) -> None:
    assert gather(rule) == []


def test_the_core_takes_its_randomness_from_outside() -> None:
    # The one that puts the program's generators back draws nothing.
    free = ("onlinesel.callbacks", "onlinesel.recipes", "onlinesel.data.randomness:")
    assert [line for line in gather(hidden_randomness) if not line.startswith(free)] == []


def test_nobody_imports_the_folders_by_their_bare_names() -> None:
    folders = [ROOT / name for name in (*FOLDERS, "examples", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert [x for path in paths for x in second_copies(path.name, path.read_text("utf-8"))] == []


VIOLATIONS = [
    (wrong_imports, "onlinesel.types", "from onlinesel.weights import rescale"),
    (wrong_imports, "onlinesel.weights", "import onlinesel.selector"),
    (wrong_imports, "onlinesel.strategies.uds", "from onlinesel import Selector"),
    (wrong_imports, "onlinesel.selector", "from onlinesel.strategies import UDS"),
    (wrong_imports, "onlinesel.selector", "from onlinesel import strategies"),
    (wrong_imports, "onlinesel.selector", "def f():\n    import onlinesel.rl.gates"),
    (wrong_imports, "onlinesel.quotas", "from onlinesel.strategies import TopLoss"),
    (wrong_imports, "onlinesel.mixing.odm", "from onlinesel.selector import Selector"),
    (wrong_imports, "onlinesel.kernels.gram", "from onlinesel.types import Signals"),
    (wrong_imports, "onlinesel.data.batch", "from onlinesel.callbacks.hf import OnlineSelection"),
    (wrong_imports, "onlinesel.report.page", "from onlinesel import recipes"),
    (wrong_imports, "onlinesel.cli", "import onlinesel.callbacks.hf"),
    (wrong_imports, "onlinesel.callbacks.lightning", "from onlinesel.callbacks.hf import x"),
    (wrong_imports, "onlinesel.callbacks.hf", "from onlinesel.callbacks.grpo import x"),
    (wrong_imports, "onlinesel.callbacks._shared.meter", "from onlinesel.callbacks.hf import x"),
    (wrong_imports, "onlinesel.callbacks.hf.data", "from onlinesel.callbacks.grpo.rows import x"),
    (wrong_imports, "onlinesel.data.loader", "from onlinesel.selector import Selector"),
    (wrong_imports, "onlinesel.scoring", "from transformers import Trainer"),
    (wrong_imports, "onlinesel.scoring", "import triton"),
    (wrong_imports, "onlinesel", "from onlinesel.callbacks.hf import OnlineSelection"),
    (wrong_imports, "onlinesel.parallel.agreement", "from onlinesel.step import SCOPES"),
    (wrong_imports, "onlinesel.bench.scale", "from onlinesel.callbacks.hf import x"),
    (wrong_imports, "onlinesel.cli", "import matplotlib.pyplot as plt"),
    (wrong_imports, "onlinesel.strategies", "from .uds import UDS"),
    (second_copies, "onlinesel.x", "from callbacks.hf import x"),
    (second_copies, "onlinesel.x", "import recipes.demo"),
    (hidden_randomness, "onlinesel.x", "import torch\ntorch.randperm(4)"),
    (hidden_randomness, "onlinesel.x", "scores.multinomial(2)"),
    (hidden_randomness, "onlinesel.x", "from torch import rand\nrand(3)"),
    (hidden_randomness, "onlinesel.x", "from random import choice"),
    (hidden_randomness, "onlinesel.x", "import numpy as np\nnp.random.seed(0)"),
    (missing_all, "onlinesel.x", "def f(): ..."),
    (too_long, "onlinesel.x", "\n" * (MAX_FILE + 1)),
    (too_long, "onlinesel.x", "def f():\n" + "    pass\n" * MAX_FUNCTION),
]
INNOCENT = [
    (wrong_imports, "onlinesel.strategies.uds", "from onlinesel.weights import rescale"),
    (wrong_imports, "onlinesel.callbacks.grpo", "import trl\nfrom onlinesel.callbacks.hf import x"),
    (wrong_imports, "onlinesel.callbacks.hf", "from onlinesel.callbacks._shared import meter"),
    (wrong_imports, "onlinesel.callbacks.hf.attach", "from onlinesel.callbacks.hf import data"),
    (wrong_imports, "onlinesel.cli", "from onlinesel.recipes import demo"),
    (wrong_imports, "onlinesel.bench.scale", "from onlinesel import strategies"),
    (wrong_imports, "onlinesel.kernels._fused", "import math\nimport triton.language as tl"),
    (wrong_imports, "onlinesel.recipes.demo", "from onlinesel.callbacks.hf import x"),
    (second_copies, "onlinesel.x", "from onlinesel.callbacks import hf"),
    (hidden_randomness, "onlinesel.x", "import torch\ntorch.randperm(4, generator=g)"),
    (missing_all, "onlinesel._x", "def f(): ..."),
    (missing_all, "onlinesel.callbacks", '"""Docstring."""'),
    (too_long, "onlinesel.x", "def f():\n" + "    pass\n" * (MAX_FUNCTION - 1)),
]


@pytest.mark.parametrize("host", ["dpo", "grpo", "hf", "lightning", "loop"])
def test_a_host_names_its_files(host: str) -> None:
    """What each does to a batch stands in one place, in order."""
    folder = ROOT / "callbacks" / host
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files - set(re.findall(r"``(\w+)``", told)) == set()


def test_the_walk_in_contributing_leads_somewhere() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`((?:onlinesel|callbacks|tests)/[\w/*.<>]+)`", text)
    assert len(named) > 20
    for name in named:
        pattern = name.replace("<host>", "hf").replace("<method>", "uds").rstrip("/")
        assert list(ROOT.glob(pattern)), name


@pytest.mark.parametrize(("rule", "name", "source"), VIOLATIONS)
def test_each_rule_can_fail(rule: Rule, name: str, source: str) -> None:
    assert len(rule(name, source)) == 1


@pytest.mark.parametrize(("rule", "name", "source"), INNOCENT)
def test_each_rule_lets_the_right_thing_pass(rule: Rule, name: str, source: str) -> None:
    assert rule(name, source) == []


def loaded_beyond_torch(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter loads for it, less those of torch."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        f"{statement}\nprint(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_loads_torch_and_nothing_heavy() -> None:
    packages = ("strategies", "rl", "mixing", "kernels", "callbacks", "recipes")
    alone = loaded_beyond_torch("import onlinesel")
    together = loaded_beyond_torch("import " + ", ".join(f"onlinesel.{name}" for name in packages))
    assert "onlinesel" in alone & together
    assert (alone | together) & HEAVY == set()


def test_importing_the_core_loads_no_callback() -> None:
    code = "import sys, onlinesel; print('onlinesel.callbacks' in sys.modules, end=' ');"
    code += "onlinesel.steps; print('onlinesel.callbacks.loop' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_the_import_check_can_fail() -> None:
    assert "jinja2" in loaded_beyond_torch("import jinja2") & HEAVY
