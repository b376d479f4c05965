"""Run by torchrun on two processes, and in one by the test: a GRPO step with ``fused_logprobs``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from onlinesel.kernels._shards import gathered, whole
from onlinesel.parallel.distributed import rank, world_size
from onlinesel.rl import HAPO
from tests.callbacks.engines import deepspeed_config
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer
from tests.callbacks.hosts import make_model, make_tokenizer
from tests.launching import begin, leave

# FSDP2 before DeepSpeed, which leaves a process that transformers loads no sharded model in.
CASES = {
    "ddp": ("accumulate", "hapo"),
    "fsdp2": ("plain", "tied"),
    "fsdp2-apart": ("accumulate", "one-rank-idle", "hapo"),
    "zero1": ("plain",),
    "zero2": ("plain",),
    "zero3": ("accumulate", "one-rank-idle", "tied"),
}
"""Scenarios of each engine."""
APART = {"lm_head": "free_full_weight"}  # a unit of its own, which is never unsharded


def scenarios() -> dict[str, dict[str, Any]]:
    """Rows are of the whole batch; each process takes its share of them."""
    return {
        "plain": {"rights": (2, 1, 3, 2)},
        "accumulate": {"rights": (2, 1, 3, 2), "gradient_accumulation_steps": 2, "rows": 8},
        # All rows of the first process have advantage 0: its head has nothing to do.
        "one-rank-idle": {"rights": (4, 1), "rows": 8},
        "tied": {"rights": (2, 1, 3, 2), "tied": True},
        "hapo": {"rights": (2, 1, 3, 2), "tokens": HAPO(), "wide": True},
    }


def sharded(folder: Path, model: Any, plan: dict[str, str] | None) -> Any:
    """Load a model as transformers cuts it up with FSDP2."""
    path = folder / "whole"
    if rank() == 0:
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    dist.barrier()
    config = DistributedConfig(fsdp_size=2, fsdp_plan=plan)
    return type(model).from_pretrained(path, distributed_config=config)


def run(folder: Path, engine: str, name: str, fused: bool = True) -> None:
    """Train a step; what the parameters moved by goes to a file."""
    options = scenarios()[name]
    spread = {"initializer_range": 0.3} if options.pop("wide", False) else {}
    model = make_model(tie_word_embeddings=options.pop("tied", False), **spread)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if engine.startswith("fsdp2"):
        model = sharded(folder, model, APART if engine == "fsdp2-apart" else None)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    changes = {"deepspeed": deepspeed_config(int(engine[-1]))} if "zero" in engine else {}
    tokens = options.pop("tokens", None)
    trainer = make_grpo_trainer(
        folder,
        options.pop("rights"),
        model=model,
        per_device_train_batch_size=options.pop("rows", 16) // world_size(),
        max_steps=1,
        **options,
        **changes,
    )
    attach(trainer, tokens=tokens, fused_logprobs=fused)
    trainer.train()
    with gathered(trainer.model):
        moved = {k: before[k] - whole(v) for k, v in trainer.model.state_dict().items()}
        torch.save(moved, folder / f"{engine}-{name}-{rank()}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    begin()
    PartialState(cpu=True)
    out = Path(sys.argv[1])
    for kind, names in CASES.items():
        for scenario in names:
            run(out, kind, scenario)
            if rank() == 0:
                print("done", kind, scenario, flush=True)
    leave()
