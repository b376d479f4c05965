"""Stop a run in mid-epoch, resume it, and compare with the run that was never stopped.

Used in one process by the test, and run by torchrun for two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from onlinesel import Chain, When
from onlinesel.kernels._shards import gathered, is_sharded
from onlinesel.mixing import ODM, DoReMi
from onlinesel.parallel.distributed import rank
from onlinesel.quotas import PerGroup
from onlinesel.strategies import UDS, InfoBatch, SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.hosts import attach, make_rows, make_trainer
from tests.launching import begin, leave
from tests.strategies.contract_table import CASES

STEPS, STOP = 7, 4
"""An epoch has 6 steps with two candidates on one process, and 3 on two: the stop is inside of the
first and of the second one, and the resumed part crosses its end."""


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every strategy of the contract table, and what only a host can combine."""
    two = {"candidates": 2}
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, case in CASES.items():
        strategy = case.build()
        options = dict(two) if case.chooses else {}
        if "reference_loss" in strategy.needs:
            options["reference"] = "reference_loss"
        found[name] = (strategy, options)
    return found | {
        "combined": (When(Chain(InfoBatch(), UDS()), start=2, otherwise=Uniform()), two),
        "rank": (SelectiveBackprop(), {**two, "scope": "rank"}),
        "batch": (UDS(), {**two, "scope": "batch"}),
        "odm": (TopLoss(), {**two, "groups": "domain", "mixture": ODM(), "scope": "rank"}),
        "doremi": (
            PerGroup(TopLoss()),
            {**two, "groups": "domain", "mixture": DoReMi(), "reference": "reference_loss"},
        ),
    }


def rows_with_reference() -> list[dict[str, Any]]:
    return [
        {**row, "reference_loss": 4.0 + 0.01 * i, "domain": i % 5 // 2}
        for i, row in enumerate(make_rows())
    ]


def train(
    folder: Path, name: str, resume: bool, **changes: Any
) -> tuple[Any, list[dict[str, Any]]]:
    strategy, options = cases()[name]
    trainer = make_trainer(
        folder / name,
        rows=rows_with_reference(),
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=STOP,
        optim="adamw_torch",
        learning_rate=0.01,
        **changes,
    )
    callback = attach(trainer, strategy, **options)
    seen: list[dict[str, Any]] = []
    decided = callback._meter.decided

    def note(plan: Any) -> None:
        for signals, selection in plan.decisions:
            seen.append({"ids": signals.row_ids().clone(), "weights": selection.weights.clone()})
        decided(plan)

    callback._meter.decided = note  # type: ignore[method-assign]
    checkpoint = str(folder / name / f"checkpoint-{STOP}") if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, seen


def assert_same(folder: Path, name: str, build: Any = dict) -> None:
    """The resumed run chooses the same rows with the same weights, and ends at the same model.

    Args:
        folder: For the checkpoints.
        name: Of the case.
        build: Makes changes of the trainer, anew for each of the two runs.
    """
    first, whole = train(folder, name, resume=False, **build())
    second, resumed = train(folder, name, resume=True, **build())
    decisions = len(whole) // STEPS
    assert len(resumed) == (STEPS - STOP) * decisions
    for a, b in zip(whole[STOP * decisions :], resumed, strict=True):
        assert torch.equal(a["ids"], b["ids"]), name
        assert torch.equal(a["weights"], b["weights"]), name
    with gathered(first.model), gathered(second.model):
        for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(local(p), local(q)), name


def local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if is_sharded(parameter) else parameter


if __name__ == "__main__":
    begin()
    for case in cases():
        assert_same(Path(sys.argv[1]), case)
        if rank() == 0:
            print("same", case, flush=True)
    leave()
