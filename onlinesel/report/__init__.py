"""What a run did with its data: a run directory on disk, and the report made from it.

`RunLog` writes a run directory and `read_run` reads it back, with the standard library only.
Figures and the page live in `onlinesel.report.figures` and `onlinesel.report.page`; they need the
extra `onlinesel[report]`, which is why they are not imported here.
"""

from __future__ import annotations

from onlinesel.report.runlog import Run, RunLog, find_runs, read_run

__all__ = ["Run", "RunLog", "find_runs", "read_run"]
