"""What a prompt sampler may know of the problems before the first rollout."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from onlinesel.callbacks.grpo.cache import FeatureCache, fingerprint
from onlinesel.callbacks.grpo.embed import backbone_of, embed_prompts, tokenize_prompts
from onlinesel.parallel.distributed import rank, world_size
from onlinesel.rl.prompts import PromptPool, PromptSampler

__all__ = ["column_features", "make_pool"]


def make_pool(
    trainer: Any, sampler: PromptSampler | None, seed: int, state: dict[str, Tensor]
) -> PromptPool | None:
    """Return a sampler over the trainer's problems, the same on all ranks; None without one.

    Args:
        trainer: A GRPO trainer with a map-style data set.
        sampler: The method.
        seed: Of the pool's own generator.
        state: What the pool of a checkpoint held; empty for a new one.
    """
    if sampler is None:
        return None
    initial = features = None
    if not state and sampler.features == "policy":
        initial = _embedded(trainer, sampler)
    elif not state and sampler.features is not None:
        features = column_features(trainer.train_dataset, sampler.features)
    pool = PromptPool(
        sampler,
        len(trainer.train_dataset),
        trials=trainer.num_generations,
        seed=seed,
        features=features,
        initial=initial,
        state=state or None,
    )
    if world_size() > 1:
        # Eigenvectors need not be the same bits on processors of another make.
        pool.load_state_dict(broadcast_object_list([pool.state_dict()])[0])
    return pool


def _embedded(trainer: Any, sampler: PromptSampler) -> dict[str, Tensor]:
    """Return a sampler's first state over the prompts as the policy embeds them.

    What a sampler of ours makes of them is kept from run to run: those of a sweep, or one that is
    started anew, begin with the same policy and the same prompts.
    """
    ids = tokenize_prompts(trainer)
    cache, found = None, None
    if type(sampler).__module__.startswith("onlinesel.") and rank() == 0:
        accelerator = trainer.accelerator
        settings = (repr(sampler), accelerator.mixed_precision, accelerator.device.type)
        cache = FeatureCache(fingerprint(backbone_of(trainer), ids, *settings))
        found = cache.read()
    if world_size() > 1:
        found = broadcast_object_list([found])[0]
    if found is not None:
        return found
    made = sampler.init(len(ids), embed_prompts(trainer, ids))
    if cache is not None:
        cache.write(made)
    return made


def column_features(dataset: Any, source: str) -> Tensor:
    """Return the vectors in a column of a data set: ``(N, k)`` float32.

    Raises:
        ValueError: The column is not there, or its rows are not vectors of one length.
    """
    if source not in dataset.column_names:
        raise ValueError(
            f"RolloutSelection: features must be 'policy' or a column of the data set, got "
            f"{source!r}. The columns are {', '.join(dataset.column_names)}."
        )
    try:
        return torch.tensor(dataset[source][:], dtype=torch.float32).reshape(len(dataset), -1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"RolloutSelection: features must be vectors of one length, got {source!r} "
            f"({error}). Give every row a list of as many numbers."
        ) from error
