"""Public modules under their names of version 0.1; each warns and is taken away with version 0.3.

``onlinesel/__init__.py`` looks for submodules here last, so that the old names take no room at the
door.
"""

from __future__ import annotations

import importlib
import sys
import warnings

__all__ = ["alias"]


def alias(old: str, new: str) -> None:
    """Let an old module name stand for the new module itself, and warn whoever imports it."""
    warnings.warn(
        f"{old} moved to {new}, and the old name goes with version 0.3. Import {new}.",
        DeprecationWarning,
        stacklevel=3,
    )
    sys.modules[old] = importlib.import_module(new)
