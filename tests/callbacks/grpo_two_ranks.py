"""Run by torchrun on two processes, and in one by the test: GRPO steps, noted as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from onlinesel.parallel.distributed import rank, world_size
from onlinesel.rl import (
    DRPO,
    HAPO,
    AdaptiveTemperature,
    MaxVariance,
    PassRateBand,
    Refill,
    SharedDifficulty,
    Thompson,
    TokenAverage,
    ZeroVariance,
)
from tests.callbacks.grpo_hosts import (
    GMPOTrainer,
    OwnLoss,
    attach,
    code_ok,
    first_of_tasks,
    losses,
    make_grpo_trainer,
    math_ok,
    outcome,
    rows,
    spy,
    weights,
    word_parity,
)
from tests.launching import begin, leave

NAN = float("nan")
MANY = (2, 0, 1, 4, 3, 0, 2, 2, 0, 4, 1, 3)
GATE = {"gate": ZeroVariance()}
ODD = {"num_generations": 3, "group_rows": 12}
REFILL = {**GATE, "refill": Refill()}


def nan_on_rank_1(completions: list[str], **kwargs: Any) -> list[float | None]:
    if rank() == 1:
        return [None] * len(completions)
    return outcome(completions, **kwargs)


def fails_on_rank_1(completions: list[str], **kwargs: Any) -> list[float | None]:
    if rank() == 1:
        raise KeyError("broken on one rank")
    return outcome(completions, **kwargs)


def scenarios() -> dict[str, dict[str, Any]]:
    """Rows are of the whole batch; each process takes its share of them."""
    return {
        "all-kept": {"rights": (2, 1, 3, 2), **GATE},
        "some-kept": {"rights": (2, 0, 4, 1, 0, 3), **GATE},
        "one-kept": {"rights": (0, 2, 4, 0), **GATE, "group_rows": 16},
        "none-kept": {"rights": (0, 4, 0, 4), **GATE},
        "refilled": {"rights": MANY, **REFILL},
        "straddling": {"rights": MANY, **REFILL, "group_rows": 12},
        "stream": {"rights": MANY, **REFILL, "stream": True, "max_steps": 3},
        "shuffled": {"rights": MANY, **REFILL, "shuffle_dataset": True, "max_steps": 3},
        "tasks": {
            "rights": MANY,
            **REFILL,
            "rewards": [math_ok, code_ok],
            "outcome": first_of_tasks,
        },
        "slices": {"rights": MANY, **REFILL, "group_rows": 16, "steps_per_generation": 2},
        "carried": {
            "rights": MANY,
            **GATE,
            "refill": Refill(leftover="carry", oversample=3.0),
            "max_steps": 3,
        },
        "top-up": {"rights": MANY, **GATE, "refill": Refill(max_rounds=0, on_short="top_up")},
        "replace": {"rights": MANY, **GATE, "refill": Refill(max_rounds=0, on_short="replace")},
        "thompson": {"rights": MANY, **REFILL, "prompts": Thompson(), "max_steps": 4},
        "shared": {"rights": MANY, **REFILL, "prompts": SharedDifficulty(), "max_steps": 4},
        "band-batch-scale": {
            "rights": MANY,
            **REFILL,
            "gate": PassRateBand(0.25, 0.5),
            "scale_rewards": "batch",
        },
        "max-variance": {"rights": MANY, **REFILL, "rollouts": MaxVariance(2)},
        "hapo": {"rights": MANY, **REFILL, "tokens": HAPO(), "advantages": TokenAverage()},
        "drpo": {"rights": MANY, **REFILL, "advantages": DRPO(), "max_steps": 2},
        "drpo-grpo": {"rights": MANY, **GATE, "advantages": DRPO(), "loss_type": "grpo"},
        # Twelve rows in eight micro-batches a process, three rows a group on two processes, and an
        # optimizer step whose second generation batch has nothing to train.
        "gmpo": {
            "rights": (2, 0, 4, 1, 0, 3, 0, 4),
            **GATE,
            "kind": GMPOTrainer,
            "group_rows": 32,
            "steps_per_generation": 8,
        },
        "odd": {"rights": (2, 0, 3, 0), **GATE, **ODD, "loss_type": "grpo"},
        "odd-dapo": {"rights": (2, 0, 3, 0), **GATE, **ODD, "steps_per_generation": 2},
        "empty-in-a-step": {
            "rights": (2, 0, 4, 1, 0, 4, 0, 0),
            **GATE,
            "kind": OwnLoss,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
        },
    }


def run(folder: Path, name: str, options: dict[str, Any]) -> None:
    parts = (
        "gate", "refill", "prompts", "rollouts", "advantages", "tokens", "temperature", "outcome",
    )  # fmt: skip
    chosen = {key: options.pop(key) for key in parts if key in options}
    total = options.pop("group_rows", 16) // options.get("steps_per_generation", 1)
    options.setdefault("max_steps", 1)
    trainer = make_grpo_trainer(
        folder,
        options.pop("rights"),
        per_device_train_batch_size=total // world_size(),
        **{"gradient_accumulation_steps": options.get("steps_per_generation", 1), **options},
    )
    callback = attach(trainer, **chosen)
    made, before = spy(trainer), weights(trainer)
    decided: list[list[int]] = []
    generated = callback.meter.generated

    def note(filled: Any, step: int) -> None:
        decided.append([group.prompt for group in filled.groups])
        generated(filled, step)

    callback.meter.generated = note  # type: ignore[method-assign]
    trainer.train()
    torch.save(before - weights(trainer), folder / f"{name}-{rank()}.pt")
    found = {
        "groups": decided,
        "rows": [rows(batch) for batch in made],
        "sizes": [len(batch["prompt_ids"]) for batch in made],
        "items": [int(batch["num_items_in_batch"]) for batch in made],
        "losses": losses(trainer),
    }
    (folder / f"{name}-{rank()}.json").write_text(json.dumps(found))


def failing(folder: Path) -> None:
    """Every rank must hear of an error on one, and none may wait for another."""
    trainer = make_grpo_trainer(
        folder, (2, 2), per_device_train_batch_size=4, rewards=fails_on_rank_1
    )
    attach(trainer, gate=ZeroVariance())
    try:
        trainer.train()
    except RuntimeError as error:
        (folder / f"failing-{rank()}.txt").write_text(str(error))


def refused(folder: Path) -> None:
    """Three rows a group are not equally many on two processes."""
    trainer = make_grpo_trainer(
        folder, (2, 1, 0, 3), kind=OwnLoss, num_generations=3, per_device_train_batch_size=6
    )
    attach(trainer, gate=ZeroVariance())
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"refused-{rank()}.txt").write_text(str(error))


def all_nan(folder: Path) -> None:
    options = {"rights": (2, 1, 3, 2), "rewards": nan_on_rank_1, "group_rows": 16}
    run(folder, "rank-nan", {**options, "gate": ZeroVariance()})


def tempered(folder: Path) -> None:
    options = {"rights": (2, 1, 3, 2), "known": False, "max_steps": 2, "rewards": word_parity}
    run(folder, "tempered", {**options, "temperature": AdaptiveTemperature(), "tokens": HAPO()})


if __name__ == "__main__":
    begin()
    PartialState(cpu=True)  # world_size() is asked before the first trainer starts the processes
    out = Path(sys.argv[1])
    for scenario, values in scenarios().items():
        run(out, scenario, values)
    all_nan(out)
    failing(out)
    refused(out)
    tempered(out)
    leave()
