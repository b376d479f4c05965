"""Stop runs on one number of processes and resume them on another; notes what was loaded.

Used in one process by the test, and run by torchrun for two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from onlinesel.mixing import FixedMixture
from onlinesel.parallel.distributed import rank
from onlinesel.strategies import RS2, InfoBatch, SelectiveBackprop, TopLoss
from tests.callbacks.hosts import attach, make_rows, make_trainer
from tests.launching import begin, leave

STOP = {1: 8, 2: 4}
"""Step of the checkpoint, on one process and on two: 64 rows are behind."""
END = {1: 14, 2: 13}
"""Last step on one process after two, and on two after one: 80 rows more."""


def cases() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Strategy, options of the callback, changes of the trainer (and the number of rows)."""
    two: dict[str, Any] = {"candidates": 2}
    four: dict[str, Any] = {"per_device_train_batch_size": 4}
    mixture = FixedMixture((0.75, 0.25))
    return {
        "global": (TopLoss(), two, {}),
        "rank": (SelectiveBackprop(), {**two, "scope": "rank"}, {}),
        "ledger": (InfoBatch(), {"scope": "rank"}, four),
        "plan": (RS2(fraction=0.5), {}, four),
        "sequential": (TopLoss(), two, {"train_sampling_strategy": "sequential"}),
        "ragged": (TopLoss(), two, {"rows": 49}),
        "drop-last": (TopLoss(), two, {"rows": 50, "dataloader_drop_last": True}),
        "mixture": (TopLoss(), {**two, "groups": "domain", "mixture": mixture}, {}),
    }


def rows(count: int = 48) -> list[dict[str, Any]]:
    return [{**row, "domain": i % 3 // 2} for i, row in enumerate(make_rows(count))]


def train(
    folder: Path, name: str, processes: int, *, resume: Path | None = None, steps: int | None = None
) -> Any:
    """Train from the start to the checkpoint, or from a checkpoint to the end."""
    strategy, options, changes = cases()[name]
    changes = {"rows": rows(changes.pop("rows", 48)), **changes}
    last = STOP[processes] if resume is None else END[processes]
    trainer = make_trainer(
        folder,
        max_steps=steps or last,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.01,
        **changes,
    )
    callback = attach(trainer, strategy, **options)
    noted: list[list[int]] = []
    decided = callback._meter.decided

    def note(plan: Any) -> None:
        ids = [signals.row_ids() for signals, _ in plan.decisions]
        noted.append(torch.cat(ids).tolist())
        decided(plan)

    callback._meter.decided = note  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    folder.mkdir(exist_ok=True)
    (folder / f"ids-{rank()}.json").write_text(json.dumps(noted))
    torch.save(callback.selector.state_dict(), folder / f"state-{rank()}.pt")
    return trainer


if __name__ == "__main__":
    begin()
    out = Path(sys.argv[1])
    for case in cases():
        train(out / f"{case}-from-2", case, 2)
        train(out / f"{case}-1-to-2", case, 2, resume=out / f"{case}-from-1/checkpoint-{STOP[1]}")
    leave()
