"""Images in the prompts of a GRPO trainer: where they are, and what a forward needs of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from onlinesel.callbacks._shared.trainers import is_stream

__all__ = ["images_of", "media_of"]

_TEXT = (
    "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    "compute_entropy", "compute_aux_loss",
)  # fmt: skip


def images_of(dataset: Any) -> str | None:
    """Say where the images of a data set are; None if it is text only.

    A stream is not asked for a row; its images are found in the first batch that holds some.
    """
    columns = getattr(dataset, "column_names", None) or ()
    for name in ("image", "images"):
        if name in columns:
            return f"a column {name!r}"
    if is_stream(dataset):
        return None
    table = getattr(getattr(dataset, "data", None), "table", None)
    found = table is not None and "prompt" in columns and _any(table.column("prompt"))
    first = dataset[0] if not found and len(dataset) else {}  # a transform may add what is not told
    if found or (isinstance(first, Mapping) and _in_messages(first.get("prompt"))):
        return "images in the messages of 'prompt'"
    return None


def _in_messages(prompt: Any) -> bool:
    if not isinstance(prompt, (list, tuple)):
        return False
    contents = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _any(column: Any) -> bool:
    """Return whether a column of Arrow has a part of type "image", without decoding one."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if isinstance(column, pa.ChunkedArray):
        return any(_any(chunk) for chunk in column.chunks)
    if isinstance(column, pa.ExtensionArray):
        return _any(column.storage)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _any(column.flatten())
    if not pa.types.is_struct(column.type):
        return False
    names = [column.type.field(i).name for i in range(column.type.num_fields)]
    if "type" in names and "image" in column.field("type").unique().to_pylist():
        return True
    return any(_any(column.field(name)) for name in names)


def media_of(batch: Mapping[str, Any], log_probs: Callable[..., Any]) -> dict[str, Any]:
    """Return what a forward must be given beside the tokens.

    Args:
        batch: A generation batch as the trainer made it.
        log_probs: The trainer's own ``_get_per_token_logps_and_entropies``.

    Returns:
        The entries of the batch that it takes, as pixels and numbers of images; empty for text.
    """
    known = [name for name in inspect.signature(log_probs).parameters if name not in _TEXT]
    return {name: batch[name] for name in known if batch.get(name) is not None}
