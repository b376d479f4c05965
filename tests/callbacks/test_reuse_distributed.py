"""Two processes that reuse the scoring forward apply the gradient of one, under each engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import reuse_two_ranks
from tests.callbacks.hosts import (
    ASKED,
    make_model,
    make_rows,
    reference_gradient,
    relative_error,
)
from tests.launching import torchrun

pytest.importorskip("deepspeed")

ENGINES = ("ddp", "fsdp2", "zero1", "zero2")
CASES = [
    (engine, name)
    for engine in ENGINES
    for name in reuse_two_ranks.scenarios()
    if reuse_two_ranks.runs(engine, name)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reuse")
    printed = torchrun(
        "callbacks.reuse_two_ranks", str(path), *ENGINES, port=29625
    )  # fmt: skip
    assert {f"done {engine} {name}" for engine, name in CASES} <= set(printed.splitlines())
    return path


def read(folder: Path, case: str) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return what trained and which rows each call of an MLP forwarded, on each rank."""
    plans = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    forwards = [json.loads((folder / f"{case}-forwards-{r}.json").read_text()) for r in (0, 1)]
    return plans, forwards


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_apply_the_gradient_of_one(folder: Path, engine: str, name: str) -> None:
    case = f"{engine}-{name}"
    plans, _ = read(folder, case)
    rows = [
        (i, w) for plan in plans
        for i, w in zip(sum(plan["ids"], []), sum(plan["weights"], []), strict=True) if w > 0
    ]  # fmt: skip
    before = torch.load(folder / f"{case}-before.pt")
    after = [torch.load(folder / f"{case}-after-{rank}.pt") for rank in (0, 1)]
    if name == "nothing-kept":
        assert not rows and all(torch.equal(before[k], a[k]) for a in after for k in before)
        return
    model = make_model(lora=name == "lora")
    model.load_state_dict(before)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    gradient, loss = reference_gradient(
        model, make_rows(), [i for i, _ in rows], [w for _, w in rows], plans[0]["normalize"]
    )
    for state in after:
        moved = ({n: before[n] for n in names}, {n: state[n] for n in names}, gradient)
        assert relative_error(*moved) < 1e-6
    assert plans[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_loop_on_two_processes_applies_the_gradient_of_one(
    folder: Path, engine: str, lora: bool
) -> None:
    name = f"{engine}-loop-{lora}"
    steps = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    rows = [i for step in steps for i in sum(step["ids"], [])]
    assert len(set(rows)) == 8
    model, before = make_model(lora=lora), torch.load(folder / f"{name}-before.pt")
    model.load_state_dict(before, strict=False)  # without buffers
    before = {n: before[n] for n, p in model.named_parameters() if p.requires_grad}
    gradient, _ = reference_gradient(model, make_rows(), rows, [1.0] * 8, "tokens")
    for rank in (0, 1):
        after = torch.load(folder / f"{name}-{rank}.pt")
        assert relative_error(before, after, gradient) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_changed_ranks_are_forwarded_again_and_no_others(
    folder: Path, engine: str
) -> None:
    """Six candidates and two rows that train on each rank, two layers."""
    _, forwards = read(folder, f"{engine}-subset-rank")
    assert [sum(rows) for rows in forwards] == [2 * (ASKED + 6 + 2)] * 2
    # Both rows that train were loaded by one rank: the other forwards the one that it is given.
    plans, forwards = read(folder, f"{engine}-one-rank-empty")
    assert [len(plan["ids"][0]) for plan in plans] == [1, 1]
    assert sorted(sum(rows) for rows in forwards) == [2 * (ASKED + 4 + n) for n in (1, 2)]
    # What does not fit is forwarded as without.
    _, forwards = read(folder, f"{engine}-subset-limit")
    assert [sum(rows) for rows in forwards] == [2 * (ASKED + 6 + 2 + 2)] * 2
