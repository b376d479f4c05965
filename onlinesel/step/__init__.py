"""One optimizer step: score its candidates, choose, deal the rows out, find the denominator.

``planner`` does it, with what the host knows of the micro-batches (``micro``) and where rows lie in
them (``places``); ``plan`` is what comes out, for one rank.
"""

from onlinesel.step.plan import Decision, StepPlan
from onlinesel.step.planner import SCOPES, StepPlanner

__all__ = [
    "Decision",
    "SCOPES",
    "StepPlan",
    "StepPlanner",
]
