"""The machine and the software of a run."""

from __future__ import annotations

import os
import platform
from importlib import metadata

__all__ = ["hardware", "versions"]

_PACKAGES = ("onlinesel", "torch", "transformers", "trl", "lightning", "accelerate")


def hardware() -> str:
    """Return system, architecture and cores."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Return the versions of Python and of what trains."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
