"""Keep what a sampler made of the prompts' embeddings, under the fingerprint of what went in."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onlinesel import __version__

__all__ = ["FeatureCache", "fingerprint"]


def fingerprint(model: nn.Module, ids: Iterable[list[int]], *more: object) -> str:
    """Return the digest of weights, settings of a model, and tokens.

    Args:
        model: Every parameter and buffer of its state counts, by name, type, shape and bits.
        ids: Tokens of each prompt.
        more: Anything else that the result depends on, by its ``repr``.
    """
    digest = hashlib.blake2b(digest_size=16)
    config: Any = getattr(model, "config", None)
    settings = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
    digest.update(repr((__version__, type(model).__qualname__, settings, *more)).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().contiguous().cpu().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    for row in ids:
        digest.update(torch.tensor([len(row), *row]).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Tensors in a file of their own in the assets of ``huggingface_hub`` (``HF_ASSETS_CACHE``).

    A folder that cannot be written, or a file that cannot be read, costs a warning and the time
    that it would have saved, never the run.

    Args:
        key: What :func:`fingerprint` returned.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def _path(self) -> Path:
        folder = cached_assets_path("onlinesel", "prompts", "features")
        return Path(folder) / f"{self._key}.safetensors"

    def read(self) -> dict[str, Tensor] | None:
        """Return the tensors that were kept; None if there are none."""
        try:
            path = self._path()
            return dict(load_file(path)) if path.exists() else None
        except (OSError, SafetensorError) as error:
            self._warn("read", error)
            return None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; a file is whole or not there."""
        try:
            path = self._path()
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(handle)
            try:
                save_file({n: v.contiguous() for n, v in tensors.items()}, name)
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self._warn("written", error)

    @staticmethod
    def _warn(what: str, error: Any) -> None:
        warnings.warn(
            f"RolloutSelection: kept embeddings of prompts could not be {what} ({error}); every "
            "run embeds them anew. Set HF_ASSETS_CACHE to a folder that can be written.",
            stacklevel=2,
        )
