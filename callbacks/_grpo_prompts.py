"""What a prompt sampler may know of the problems before the first rollout."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from onlinesel.distributed import rank, world_size
from onlinesel.rl.prompts import PromptPool, PromptSampler
from onlinesel.scoring import evaluating, unwrap

__all__ = ["embed_prompts", "make_pool", "prompt_features"]


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
    pool = PromptPool(
        sampler,
        len(trainer.train_dataset),
        trials=trainer.num_generations,
        seed=seed,
        features=None if state else prompt_features(trainer, sampler.features),
        state=state or None,
    )
    if world_size() > 1:
        # Eigenvectors need not be the same bits on processors of another make.
        pool.load_state_dict(broadcast_object_list([pool.state_dict()])[0])
    return pool


def prompt_features(trainer: Any, source: str | None) -> Tensor | None:
    """Return the features that a sampler asks for: ``(N, k)`` float32 on the CPU, or None.

    Args:
        trainer: A GRPO trainer with a map-style data set.
        source: ``"policy"``, a column of vectors, or None.

    Raises:
        ValueError: The column is not there, or its rows are not vectors of one length.
    """
    if source is None:
        return None
    if source == "policy":
        return embed_prompts(trainer)
    dataset = trainer.train_dataset
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


def embed_prompts(trainer: Any) -> Tensor:
    """Embed every prompt with the policy: last hidden state at the last token, and its mean.

    The ranks share the work: each embeds a slice of equal length, all get the whole.
    """
    dataset, count = trainer.train_dataset, len(trainer.train_dataset)
    share = -(-count // world_size())
    mine = [min(rank() * share + i, count - 1) for i in range(share)]
    core: Any = unwrap(trainer.model)
    core = core.get_base_model() if hasattr(core, "get_base_model") else core
    size, parts = max(trainer.args.per_device_train_batch_size, 8), []
    with evaluating(core), trainer.accelerator.autocast():
        for start in range(0, share, size):
            prompts = [dataset[i]["prompt"] for i in mine[start : start + size]]
            ids, _, _ = trainer._tokenize_prompts(prompts)
            own = _embed(core.base_model, ids, trainer._tokenizer.pad_token_id)
            whole = trainer.accelerator.gather(own).cpu()
            parts.append(whole.reshape(world_size(), -1, own.shape[1]))
    return torch.cat(parts, dim=1).reshape(-1, parts[0].shape[2])[:count]


def _embed(backbone: Any, ids: list[list[int]], pad_id: int) -> Tensor:
    width = max(len(row) for row in ids)
    device = next(backbone.parameters()).device
    tokens = torch.full((len(ids), width), pad_id, device=device)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = torch.tensor(row, device=device)
        mask[i, width - len(row) :] = 1
    hidden = backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, real = hidden.float(), mask[..., None].float()
    mean = (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return torch.cat([hidden[:, -1], mean], dim=1)
