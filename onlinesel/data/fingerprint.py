"""What a resumed run is recognised by: the rows of its data, and the code of its functions."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping, Set
from types import BuiltinFunctionType, CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from onlinesel.data.randomness import undisturbed

__all__ = ["code_digest", "rows_digest", "same_rows"]

_SAMPLE = 32
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def rows_digest(dataset: Any, *, workers: int = 0) -> dict[str, Any]:
    """Return how many rows a map-style dataset has, and a digest of some of them in their order.

    Up to 32 rows are read, evenly spaced, the first and the last among them: rows in another order
    show, one changed row may not. The program's generators stay as they are.

    Args:
        dataset: Map-style.
        workers: Processes that load its rows. With any, only datasets are read here that hold no
            files of their own open: a file that is opened before a worker is forked is shared.

    Returns:
        ``rows``, and ``content``, which is None where rows were not read, or where reading one
        twice gives two things.

    Example:
        >>> from onlinesel.data.fingerprint import rows_digest
        >>> a, b = rows_digest([1, 2, 3]), rows_digest([2, 1, 3])
        >>> a["rows"] == b["rows"] == 3, a["content"] == b["content"]
        (True, False)
    """
    size, safe = len(dataset), isinstance(dataset, list | tuple | TensorDataset)
    safe = safe or type(dataset).__module__.partition(".")[0] == "datasets"
    content = None
    if size and (safe or not workers):
        places = sorted({i * (size - 1) // (_SAMPLE - 1) for i in range(_SAMPLE)})
        with undisturbed():
            found = [_digest([dataset[place] for place in places]) for _ in range(2)]
        content = found[0] if found[0] == found[1] else None
    return {"rows": size, "content": content}


def same_rows(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Return whether nothing tells two digests of :func:`rows_digest` apart."""
    if before is None or now is None:
        return True
    known = before["content"] is not None and now["content"] is not None
    return before["rows"] == now["rows"] and (not known or before["content"] == now["content"])


def code_digest(function: Any) -> str:
    """Return a digest of what a function does: its code and the plain values that it holds.

    Comments and the place of the code do not count. The same code has another digest under another
    version of Python.

    Example:
        >>> from onlinesel.data.fingerprint import code_digest
        >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 2)
        False
    """
    return _digest([sys.version_info[:2], _parts(function)])


def _parts(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return [_parts(value.func), _parts(value.args), _parts(value.keywords)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, [_parts(each) for each in value.co_consts]]
    if isinstance(value, Mapping):
        return {str(name): _parts(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_parts(each) for each in value]
    if isinstance(value, BuiltinFunctionType):  # it has no code to look at, but a name
        return [value.__module__, value.__qualname__]
    value = getattr(value, "__func__", value)
    code = getattr(value, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [each for each in cells if isinstance(each, _PLAIN)]
        return [_parts(code), _parts(value.__defaults__), _parts(value.__kwdefaults__), held]
    if isinstance(value, torch.nn.Module):
        name = getattr(getattr(value, "config", None), "_name_or_path", "")
        return [type(value).__qualname__, name]
    if callable(value) and hasattr(type(value).__call__, "__code__"):  # called as a function
        call = type(value).__call__
        plain = {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN)}
        return [type(value).__qualname__, _parts(call), plain]
    return value


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest; of what is no plain data, its type alone."""
    digest.update(f"{type(value).__qualname__}:".encode())
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            _feed(digest, str(name))
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for each in value:
            _feed(digest, each)
    elif isinstance(value, Set):
        _feed(digest, sorted(map(repr, value)))
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, _PLAIN):
        content = repr(value).encode("utf-8", errors="backslashreplace")
        digest.update(f"{len(content)}:".encode() + content)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
