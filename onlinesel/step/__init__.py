"""One optimizer step: score its candidates, choose, deal the rows out, find the denominator.

``plan`` does it, with what the host knows of the micro-batches (``micro``) and where rows lie in
them (``places``).
"""

from onlinesel.step.plan import SCOPES, Decision, StepPlan, StepPlanner

__all__ = [
    "Decision",
    "SCOPES",
    "StepPlan",
    "StepPlanner",
]
