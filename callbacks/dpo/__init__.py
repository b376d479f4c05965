"""Token weights in TRL's DPOTrainer.

``attach`` is the callback; ``weigh`` is the stand-in for the trainer's model, whose
log-probabilities are weighed, and the collator that brings values of tokens.
"""

from onlinesel.callbacks.dpo.attach import PreferenceSelection

__all__ = [
    "PreferenceSelection",
]
