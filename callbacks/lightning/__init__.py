"""Online selection in Lightning's Trainer, for LightningModules of any kind.

``attach`` is the callback, ``fit`` what it wraps for a fit and how one goes on, ``data`` what the
trainer iterates instead of the user's loader, and ``run`` what is known of a run: its model, its
engine, what it divides by. Candidates and plans come
from what plain loops use as well, ``onlinesel.callbacks._shared.source``.
"""

from onlinesel.callbacks.lightning.attach import LightningSelection, OnlineSelection

__all__ = [
    "LightningSelection",
    "OnlineSelection",
]
