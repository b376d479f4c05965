"""onlinesel: choose and weigh the rows of every batch, online, in the trainer you already use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onlinesel.combine import Chain, When
from onlinesel.ledger import Ledger
from onlinesel.quotas import PerGroup
from onlinesel.scoring.classification import ClassificationScorer
from onlinesel.selector import Selector
from onlinesel.types import Scorer, Selection, Signals, State, Strategy
from onlinesel.weights import draw_rows, token_losses, top_rows, uniform_draws, weighted_mean

# Public modules that moved are found here under their old names, with a warning.
__path__.append(f"{__path__[0]}/_moved")

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "ClassificationScorer",
    "Ledger",
    "PerGroup",
    "Scorer",
    "Selection",
    "Selector",
    "Signals",
    "State",
    "Strategy",
    "When",
    "draw_rows",
    "steps",
    "token_losses",
    "top_rows",
    "uniform_draws",
    "weighted_mean",
]


if TYPE_CHECKING:
    from onlinesel.callbacks.loop import steps
else:

    def __getattr__(name: str) -> Any:
        """Find the one host that has no framework to be imported from, when it is asked for."""
        if name == "steps":
            return importlib.import_module("onlinesel.callbacks.loop").steps
        raise AttributeError(f"module 'onlinesel' has no attribute {name!r}")
