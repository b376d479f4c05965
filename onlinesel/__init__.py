"""onlinesel: choose and weigh the rows of every batch, online, in the trainer you already use."""

from __future__ import annotations

from onlinesel.combine import Chain, When
from onlinesel.ledger import Ledger
from onlinesel.selector import Selector
from onlinesel.types import Scorer, Selection, Signals, State, Strategy
from onlinesel.weights import weighted_mean

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Ledger",
    "Scorer",
    "Selection",
    "Selector",
    "Signals",
    "State",
    "Strategy",
    "When",
    "weighted_mean",
]
