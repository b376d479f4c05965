"""What is asked of transformers' trainers, whichever of them it is."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["is_stream", "is_zero3", "seed_of"]


def seed_of(trainer: Any) -> int:
    """Return the trainer's seed, 0 where it is no trainer, which is refused later."""
    return int(getattr(getattr(trainer, "args", None), "seed", 0))


def is_stream(dataset: Any) -> bool:
    """Return whether rows have no number; a stream may know its length all the same."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def is_zero3(trainer: Any) -> bool:
    """Return whether DeepSpeed will take the trainer's parameters apart."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return getattr(plugin, "zero_stage", None) == 3
