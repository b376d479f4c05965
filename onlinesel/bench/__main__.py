"""``python -m onlinesel.bench``."""

from __future__ import annotations

import sys

from onlinesel.bench import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
