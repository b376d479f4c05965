"""Selection state on disk: tensors as safetensors, the rest as JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

__all__ = ["load_selection", "load_selections", "save_selection"]

_FORMAT = 1


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def save_selection(
    folder: str | Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    rank: int | None,
    name: str = "selection",
) -> None:
    """Write one state.

    Args:
        folder: The checkpoint; made if missing.
        tensors: Flat state.
        facts: What JSON can hold; checked again on load.
        rank: Process the state belongs to, None if all share it.
        name: Of the files; callbacks that may act on one trainer have names of their own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = name if rank is None else f"{name}-rank{rank}"
    # Copies, because safetensors refuses tensors that are views of each other.
    content = save({name: value.contiguous().clone() for name, value in tensors.items()})
    _write(folder / f"{stem}.safetensors", content)
    # The JSON comes last and names the digest: it never vouches for tensors that are not there.
    document = {"format": _FORMAT, "sha256": hashlib.sha256(content).hexdigest(), **facts}
    _write(folder / f"{stem}.json", json.dumps(document, indent=1).encode())


def load_selection(
    folder: str | Path,
    *,
    rank: int | None,
    name: str = "selection",
    owner: str = "OnlineSelection",
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read one state; None if the checkpoint holds none of that name.

    Args:
        folder: The checkpoint.
        rank: Process the state belongs to, None if all share it.
        name: Of the files.
        owner: Name used in errors.

    Raises:
        ValueError: The files are incomplete, damaged or of an unknown format, or belong to
            another number of processes.
    """
    folder = Path(folder)
    stem = name if rank is None else f"{name}-rank{rank}"
    files = (p.name for p in folder.glob(f"{name}*") if p.suffix in (".json", ".safetensors"))
    found = sorted(file for file in files if re.fullmatch(rf"{name}(-rank\d+)?\.\w+", file))
    if not found:
        return None
    try:
        content = (folder / f"{stem}.safetensors").read_bytes()
        facts = json.loads((folder / f"{stem}.json").read_bytes())
        whole = facts["sha256"] == hashlib.sha256(content).hexdigest()
    except (FileNotFoundError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{owner}: checkpoint must hold {stem}.json and {stem}.safetensors, got "
            f"{found} in {folder} ({type(error).__name__}). Resume from another checkpoint, with "
            "the scope and the number of processes that wrote it."
        ) from error
    if not whole or facts.get("format") != _FORMAT:
        raise ValueError(
            f"{owner}: selection state must be whole and of format {_FORMAT}, got format "
            f"{facts.get('format')} and {len(content)} bytes that do not match their digest in "
            f"{folder}. Resume from another checkpoint."
        )
    return load(content), facts


def load_selections(
    folder: str | Path, *, rank: int | None, world_size: int, owner: str = "OnlineSelection"
) -> list[tuple[dict[str, Tensor], dict[str, Any]]] | None:
    """Read what a run on this number of processes needs of the states that some number wrote.

    Args:
        folder: The checkpoint.
        rank: This process; None if all of them share one state.
        world_size: Number of processes now.
        owner: Name used in errors.

    Returns:
        One state where all processes share it, or where this process finds its own and as many
        processes wrote as there are now; else the states of all that wrote, in the order of their
        ranks. None if the checkpoint holds none.

    Raises:
        ValueError: As :func:`load_selection`; files of some processes are missing.
    """
    here, me = Path(folder), rank or 0
    alone = sorted(here.glob("selection-rank*.json"))
    if (here / "selection.json").exists() or not alone:
        found = load_selection(here, rank=None, owner=owner)
        return None if found is None else [found]
    first = me if (here / f"selection-rank{me}.json").exists() else 0
    own = load_selection(here, rank=first, owner=owner)
    assert own is not None
    wrote = own[1]["world_size"]
    if first == me and wrote == world_size:
        return [own]
    states = [
        own if r == first else load_selection(here, rank=r, owner=owner) for r in range(wrote)
    ]
    return [state for state in states if state is not None]
