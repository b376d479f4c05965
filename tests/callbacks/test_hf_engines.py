"""DDP, FSDP2 and ZeRO-1, -2, -3 choose what one process chooses, and apply the gradient of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import engines
from tests.callbacks.hosts import (
    attach,
    choices,
    make_model,
    make_rows,
    make_trainer,
    parameters,
    reference_gradient,
    relative_error,
)
from tests.launching import torchrun

pytest.importorskip("deepspeed")

EXACT = [name for name in engines.scenarios() if name != "nothing-kept"]
ALONE = [name for name in EXACT if name != "one-rank-nan"]

Rows = dict[int, float]
"""Weight of each row that trains, by id."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all engines and scenarios: starting two processes takes the time."""
    path = tmp_path_factory.mktemp("engines")
    printed = torchrun("callbacks.engines", str(path), port=29622)
    (path / "printed").write_text(printed)
    done = {f"done {e} {name}" for e in engines.ENGINES for name in engines.scenarios()}
    assert done <= set(printed.splitlines())
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """What one process with the same global batch trains."""
    found = {}
    for name in ALONE:
        path, options = tmp_path_factory.mktemp(name), engines.scenarios()[name]
        changes = options.pop("trainer", {})
        host = options.pop("host", make_trainer)
        trainer = host(path, per_device_train_batch_size=4, **changes)
        attach(trainer, options.pop("strategy"), record=path / "record", **options)
        trainer.train()
        choice = choices(path / "record")[0]
        pairs = zip(choice["ids"], choice["weights"], strict=True)
        found[name] = {i: w for i, w in pairs if w > 0}
    return found


def plans(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


def trained(plans: list[dict[str, Any]]) -> Rows:
    ids = [i for plan in plans for part in plan["ids"] for i in part]
    weights = [w for plan in plans for part in plan["weights"] for w in part]
    rows = [(i, w) for i, w in zip(ids, weights, strict=True) if w > 0]
    assert len(dict(rows)) == len(rows), "a row trains twice"
    return dict(rows)


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("name", ALONE)
def test_two_processes_choose_what_one_does(
    folder: Path, alone: dict[str, Rows], engine: str, name: str
) -> None:
    both = plans(folder, f"{engine}-{name}")
    assert trained(both) == pytest.approx(alone[name], rel=1e-5)
    assert both[0]["denominator"] == both[1]["denominator"]
    if name != "one-rank-empty":
        assert [len(part) for plan in both for part in plan["ids"]].count(2) == 2 * len(
            both[0]["ids"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_apply_the_gradient_of_one(
    folder: Path, alone: dict[str, Rows], engine: str, name: str
) -> None:
    case = f"{engine}-{name}"
    both = plans(folder, case)
    rows = alone.get(name) or trained(both)
    model = make_model()
    model.load_state_dict(torch.load(folder / f"{case}-before.pt"))
    before = parameters(model)
    gradient, loss = reference_gradient(
        model, make_rows(), list(rows), list(rows.values()), both[0]["normalize"]
    )
    for rank in (0, 1):
        model.load_state_dict(torch.load(folder / f"{case}-after-{rank}.pt"))
        assert relative_error(before, parameters(model), gradient) < 1e-6
    assert both[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_rows_of_a_failed_rank_are_replaced(folder: Path, engine: str) -> None:
    """All scores of rank 1 are nan: it trains rows that rank 0 had loaded."""
    both = plans(folder, f"{engine}-one-rank-nan")
    assert [plan["weights"] for plan in both] == [[[1.0, 1.0]], [[1.0, 1.0]]]
    assert len(trained(both)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_step_without_rows_moves_nothing_and_hangs_nobody(folder: Path, engine: str) -> None:
    before = torch.load(folder / f"{engine}-nothing-kept-before.pt")
    for rank, plan in enumerate(plans(folder, f"{engine}-nothing-kept")):
        after = torch.load(folder / f"{engine}-nothing-kept-after-{rank}.pt")
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert plan["loss"] == 0.0 and plan["weights"] == [[0.0]]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_run_resumes_from_the_engines_own_checkpoint(folder: Path, engine: str) -> None:
    """In mid-epoch and bit for bit: the launch compares, and stops where something differs."""
    assert f"done {engine} resumed" in (folder / "printed").read_text().splitlines()
