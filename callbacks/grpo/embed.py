"""Embed every prompt of a data set with the policy, in batches of about as many tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from onlinesel.parallel.distributed import rank, world_size
from onlinesel.scoring import evaluating, unwrap

__all__ = ["backbone_of", "embed_prompts", "token_batches", "tokenize_prompts"]

_TOKENS = 16384  # of a batch, padding included
_PROMPTS = 256  # that are tokenized at a time


def token_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cut rows into batches of similar length, the longest first.

    Args:
        lengths: Tokens of each row.
        most: Tokens of a batch, padding included; a row that is longer is a batch of its own.

    Returns:
        Row numbers of each batch.

    Example:
        >>> from onlinesel.callbacks.grpo.embed import token_batches
        >>> token_batches([1, 5, 2, 4, 9], most=8)
        [[4], [1], [3, 2], [0]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def backbone_of(trainer: Any) -> Any:
    """Return the policy without its head, adapters included."""
    core: Any = unwrap(trainer.model)
    core = core.get_base_model() if hasattr(core, "get_base_model") else core
    return core.base_model


def tokenize_prompts(trainer: Any) -> list[list[int]]:
    """Return the tokens of every prompt, as the trainer would give them to the policy.

    A prompt that is longer than the model has positions keeps its last ones, and a warning says so:
    the policy itself could not be asked it.
    """
    dataset, count = trainer.train_dataset, len(trainer.train_dataset)
    ids: list[list[int]] = []
    for start in range(0, count, _PROMPTS):
        prompts = dataset[start : start + _PROMPTS]["prompt"]
        ids += trainer._tokenize_prompts(list(prompts))[0]
    config = backbone_of(trainer).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return ids
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    if long and rank() == 0:
        warnings.warn(
            f"RolloutSelection: {len(long)} of {count} prompts have more tokens than the model has "
            f"positions ({limit}), the first is row {long[0]} with {len(ids[long[0]])}. They are "
            "embedded by their last ones; rolled out, they may stop the run. Filter them out of "
            "the data set.",
            stacklevel=2,
        )
    return [row[-limit:] for row in ids]


def embed_prompts(trainer: Any, ids: list[list[int]]) -> Tensor:
    """Embed prompts with the policy: last hidden state at the last token, and its mean.

    The ranks take turns by batch, in the same number of rounds; all get the whole. The batches are
    the same for any number of ranks.

    Args:
        trainer: A GRPO trainer.
        ids: Tokens of each prompt, equal on all ranks.

    Returns:
        ``(N, 2 d)`` float32, on the CPU.
    """
    backbone, ranks = backbone_of(trainer), world_size()
    batches = token_batches([max(len(row), 1) for row in ids], _TOKENS)
    result = torch.empty(0)
    quiet = trainer.args.disable_tqdm or rank() > 0
    bar = tqdm(total=len(ids), desc="Embedding prompts", disable=quiet, leave=False)
    with bar, evaluating(backbone), trainer.accelerator.autocast():
        for start in range(0, len(batches), ranks):
            turn = batches[start : start + ranks]
            mine = turn[min(rank(), len(turn) - 1)]  # in the last round, some only keep step
            own = _embed(backbone, [ids[i] for i in mine], trainer._tokenizer.pad_token_id)
            size = max(len(rows) for rows in turn)
            own = pad(own, (0, 0, 0, size - len(mine)))
            whole = trainer.accelerator.gather(own).cpu().reshape(ranks, size, -1)
            if not result.numel():
                result = torch.empty(len(ids), whole.shape[2])
            for rows, found in zip(turn, whole, strict=False):
                result[rows] = found[: len(rows)]
                bar.update(len(rows))
    return result


def _embed(backbone: Any, ids: list[list[int]], pad_id: int) -> Tensor:
    width = max(1, *(len(row) for row in ids))
    device = next(backbone.parameters()).device
    # Filled on the CPU: one transfer a batch, not one a row.
    tokens = torch.full((len(ids), width), pad_id)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    hidden = backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, real = hidden.float(), mask[..., None].float()
    mean = (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return torch.cat([hidden[:, -1], mean], dim=1)
