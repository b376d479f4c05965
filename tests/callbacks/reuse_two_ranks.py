"""Run by torchrun on two processes: steps that reuse the scoring forward, under each engine."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import onlinesel
from onlinesel.strategies import UDS, LossReweight, TopLoss
from tests.callbacks import engines, loop_two_ranks
from tests.callbacks.hosts import checkpointed, make_model, make_sft_trainer
from tests.callbacks.loop_hosts import make_loader, sgd, train
from tests.callbacks.two_ranks import KeepIds, run
from tests.launching import begin, leave


@dataclass(frozen=True)
class KeepScored(KeepIds):
    """Keep the rows of a list after they have been scored."""

    needs: ClassVar[tuple[str, ...]] = ("loss",)


PAIR = (44, 22)
"""Two rows that the same rank loads in the first step."""


def scenarios() -> dict[str, dict[str, Any]]:
    """Options of the callback, and of the trainer and model it is put on."""
    subset = {"strategy": TopLoss(), "candidates": 3}
    return {
        "subset": subset,
        "subset-accumulate": {**subset, "trainer": {"gradient_accumulation_steps": 3}},
        "subset-rank": {**subset, "scope": "rank"},
        "subset-limit": {**subset, "reuse_limit": 1e-9},
        "weights": {"strategy": LossReweight(min_rows=2)},
        "lora": {**subset, "lora": True},
        "sft": {**subset, "host": make_sft_trainer},
        "uds": {"strategy": UDS(), "candidates": 3, "scope": "rank"},
        # One rank loads both rows that train; then nothing trains.
        "one-rank-empty": {"strategy": KeepScored(PAIR), "candidates": 2},
        "nothing-kept": {"strategy": KeepScored(()), "candidates": 2},
    }


def runs(engine: str, name: str) -> bool:
    """Whether a scenario is run: what has nothing to do with an engine, under DDP and FSDP2."""
    if engine == "fsdp2":
        return name != "lora"  # PEFT is put on before transformers shards
    return engine == "ddp" or name not in ("weights", "sft", "uds")


def counted(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """Run a scenario; how many rows each MLP forwarded goes to a file."""
    rows: list[int] = []

    def watch(shard: Any) -> Any:
        def build(model: Any) -> Any:
            model = model if shard is None else shard(model)
            for module in model.modules():
                if type(module).__name__ == "LlamaMLP":
                    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
            return model

        return build

    options["shard"] = watch(options.get("shard"))
    trainer = run(folder, name, options)
    (folder / f"{name}-forwards-{dist.get_rank()}.json").write_text(json.dumps(rows))
    return trainer


def loop(folder: Path, engine: str, lora: bool) -> None:
    """One step of two micro-batches in a plain loop."""
    model = make_model(lora=lora).train()
    checkpointed(model)
    layers = (model.base_model.model if lora else model).model.layers
    model = loop_two_ranks.wrap(engine, model, layers=layers)
    options, name = {"candidates": 3, "accumulate": 2, "reuse_forward": True}, f"loop-{lora}"
    steps = onlinesel.steps(make_loader(), model, TopLoss(), **options)
    torch.save(loop_two_ranks.whole(model), folder / f"{engine}-{name}-before.pt")
    (done,) = train(steps, model, sgd(model), stop=1)
    loop_two_ranks.save(folder, f"{engine}-{name}", done, model)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    begin()
    folder = engines.folder = Path(sys.argv[1])
    for engine in sys.argv[2:]:
        for name, options in scenarios().items():
            if not runs(engine, name):
                continue
            if engine == "fsdp2":
                options["shard"] = engines.shard
            changes = {"gradient_checkpointing": True, **engines.changes_for(engine)}
            options["trainer"] = {**options.get("trainer", {}), **changes}
            trainer = counted(folder, f"{engine}-{name}", {**options, "reuse_forward": True})
            engines.assert_engine(trainer, engine)
            if dist.get_rank() == 0:
                print("done", engine, name, flush=True)
    for engine in ("ddp", "fsdp2"):
        for lora in (False, True):
            loop(folder, engine, lora)
    leave()
