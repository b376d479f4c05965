"""What is known about every row ever seen: a ``table`` by id, kept as sorted ``runs``."""

from onlinesel.ledger.table import Ledger

__all__ = [
    "Ledger",
]
