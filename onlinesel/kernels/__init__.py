"""Scores computed from hidden states and the LM head, without the logits in memory."""

from __future__ import annotations

from onlinesel.kernels._rows import LowRank, RowSource
from onlinesel.kernels.gram import HeadGram
from onlinesel.kernels.head import LMHead
from onlinesel.kernels.nuclear_norm import logit_nuclear_norm
from onlinesel.kernels.policy import policy_logprobs
from onlinesel.kernels.projector import JLProjector
from onlinesel.kernels.token_scores import (
    TokenScores,
    VocabShard,
    shift_labels,
    token_scores,
)

__all__ = [
    "HeadGram",
    "JLProjector",
    "LMHead",
    "LowRank",
    "RowSource",
    "TokenScores",
    "VocabShard",
    "logit_nuclear_norm",
    "policy_logprobs",
    "shift_labels",
    "token_scores",
]
