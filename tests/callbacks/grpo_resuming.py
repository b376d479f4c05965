"""Stop a GRPO run, resume it, and compare with the run that was never stopped.

Used in one process by the test, and run by torchrun for two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from onlinesel import When
from onlinesel.parallel.distributed import rank, world_size
from onlinesel.rl import (
    GRESO,
    HAPO,
    AdaptiveTemperature,
    InformativeProbability,
    PassRateBand,
    Refill,
    SharedDifficulty,
    Thompson,
    UniformPrompts,
    ZeroVariance,
)
from tests.callbacks.grpo_hosts import (
    attach,
    losses,
    make_grpo_trainer,
    rows,
    spy,
    weights,
    word_parity,
)
from tests.launching import begin, leave

STEPS, STOP = 6, 3
RIGHTS = (2, 0, 1, 4, 3, 0, 2, 2, 0, 4, 1, 3, 0, 0, 2, 4)
FULL = {"gate": ZeroVariance(), "refill": Refill(leftover="carry", oversample=2.0)}


def cases() -> dict[str, dict[str, Any]]:
    """Every sampler, and everything else that remembers something."""
    sampled = {"known": False, "rewards": word_parity}
    return {
        "gate-refill": {**FULL},
        "refill-shuffled": {**FULL, "shuffle_dataset": True},
        "refill-stream": {**FULL, "stream": True, "shuffle_dataset": True},
        "replace": {"gate": ZeroVariance(), "refill": Refill(max_rounds=0, on_short="replace")},
        "annealed": {"gate": When(PassRateBand(0.25, 0.75, anneal=5), start=2)},
        "uniform": {**FULL, "prompts": UniformPrompts()},
        "greso": {**FULL, "prompts": GRESO()},
        "thompson": {**FULL, "prompts": Thompson()},
        "informative": {**FULL, "prompts": InformativeProbability()},
        "shared": {**FULL, "prompts": SharedDifficulty()},
        "hapo": {"tokens": HAPO(), **sampled},
        "temperature": {"temperature": AdaptiveTemperature(tau=0.5), "tokens": HAPO(), **sampled},
        "fused": {
            "temperature": AdaptiveTemperature(tau=0.5), "tokens": HAPO(), **sampled,
            "fused_logprobs": True,
        },
        # The checkpoint of step 3 lies in the middle of a generation batch of two steps.
        "within-a-batch": {
            "tokens": HAPO(), **FULL, **sampled, "steps_per_generation": 2, "size": 8,
        },
        "within-a-skip": {
            "gate": ZeroVariance(), "refill": Refill(max_rounds=0, on_short="skip"),
            "num_iterations": 2, "rights": (2, 1, 2, 3, 0, 0, 0, 4, 2, 1, 3, 2), "size": 16,
        },
        # Of 32 rows 20 and 12 train, which eight micro-batches share.
        "within-uneven": {
            "gate": ZeroVariance(), "steps_per_generation": 8, "gradient_accumulation_steps": 2,
            "size": 4,
        },
        "within-iterations": {"prompts": Thompson(), **FULL, **sampled, "num_iterations": 2},
    }  # fmt: skip


def train(folder: Path, name: str, resume: bool) -> tuple[Any, list[dict[str, Any]]]:
    options = cases()[name]
    parts = ("gate", "refill", "prompts", "tokens", "temperature", "fused_logprobs")
    chosen = {key: options.pop(key) for key in parts if key in options}
    trainer = make_grpo_trainer(
        folder / name,
        options.pop("rights", RIGHTS),
        per_device_train_batch_size=options.pop("size", 16) // world_size(),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STOP,
        optim="adamw_torch",
        learning_rate=0.01,
        **options,
    )
    attach(trainer, **chosen)
    made = spy(trainer)
    checkpoint = str(folder / name / f"checkpoint-{STOP}") if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, made


def assert_same(folder: Path, name: str) -> None:
    """The resumed run trains the same rows, and ends at the same model, bit for bit."""
    first, whole = train(folder, name, resume=False)
    second, resumed = train(folder, name, resume=True)
    assert resumed, name
    for a, b in zip(whole[-len(resumed) :], resumed, strict=True):
        assert rows(a) == rows(b), name
    assert losses(first)[STOP:] == losses(second)[STOP:], name
    assert torch.equal(weights(first), weights(second)), name


if __name__ == "__main__":
    begin()
    PartialState(cpu=True)
    for case in cases():
        assert_same(Path(sys.argv[1]), case)
        if rank() == 0:
            print("same", case, flush=True)
    leave()
