"""From a model and a batch to the signals that a strategy needs.

``causal`` scores rows of causal language models, ``classification`` rows with one label, and
``loss_probe`` finds out what a loss makes of labels.
"""

from onlinesel.scoring.causal import CausalLMScorer, evaluating, unwrap
from onlinesel.scoring.classification import ClassificationScorer

__all__ = [
    "CausalLMScorer",
    "ClassificationScorer",
    "evaluating",
    "unwrap",
]
