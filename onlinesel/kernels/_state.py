"""The mergeable summary of a token's logits, and the scores that follow from it.

For each token four numbers summarise the entries that are **not** the label: the largest logit
``m``, ``s = sum exp(z - m)``, ``q = sum exp(2 (z - m))`` and ``u = sum exp(z - m) (m - z)``. They
merge over vocabulary parts (tiles, splits of a kernel, ranks), and with the logit ``y`` of the
label every score follows as a sum of non-negative terms: nothing cancels when the label becomes
certain, which is where ``logsumexp(z) - y`` in float32 loses all its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FAR",
    "LogitState",
    "certainty",
    "empty_state",
    "log_normaliser",
    "merge_parts",
    "merge_states",
    "state_scores",
]

# Logits this far below the largest one count as exp(-1e4) = 0 in either float type, while their
# product with that zero stays 0 instead of becoming 0 * inf = nan.
FAR = 1.0e4


class LogitState(NamedTuple):
    """Summary of the logits of n tokens over some part of the vocabulary.

    Attributes:
        y: ``(n,)`` logit of the label, 0 where the label is not in this part.
        m: ``(n,)`` largest logit of the other entries, finite even if there are none.
        s: ``(n,)`` sum of ``exp(z - m)`` over them.
        q: ``(n,)`` sum of ``exp(2 (z - m))``, or None if it was not asked for.
        u: ``(n,)`` sum of ``exp(z - m) (m - z)``, or None if it was not asked for.
    """

    y: Tensor
    m: Tensor
    s: Tensor
    q: Tensor | None
    u: Tensor | None


def empty_state(states: Tensor, dtype: torch.dtype, squares: bool, spread: bool) -> LogitState:
    """Summary of no vocabulary entry. The finite m keeps differences of two of them defined."""
    zeros = states.new_zeros(states.shape[0], dtype=dtype)
    low = torch.full_like(zeros, torch.finfo(dtype).min)
    return LogitState(zeros, low, zeros, zeros if squares else None, zeros if spread else None)


def merge_states(one: LogitState, two: LogitState) -> LogitState:
    """Summary of the union of two vocabulary parts, which share no entry."""
    m = torch.maximum(one.m, two.m)
    gap1, gap2 = (m - one.m).clamp(max=FAR), (m - two.m).clamp(max=FAR)
    r1, r2 = torch.exp(-gap1), torch.exp(-gap2)
    q = u = None
    if one.q is not None and two.q is not None:
        q = r1.square() * one.q + r2.square() * two.q
    if one.u is not None and two.u is not None:
        u = r1 * (one.u + gap1 * one.s) + r2 * (two.u + gap2 * two.s)
    return LogitState(one.y + two.y, m, r1 * one.s + r2 * two.s, q, u)


def merge_parts(parts: LogitState) -> LogitState:
    """Merge the parts that are stacked along the first dimension, in their order.

    Each sum has one fixed order and no atomic operation, so the result is the same in every run.

    Args:
        parts: A state whose tensors are ``(parts, n)`` instead of ``(n,)``.
    """
    m = parts.m.amax(0)
    gap = (m - parts.m).clamp(max=FAR)
    r = torch.exp(-gap)
    q = None if parts.q is None else (r.square() * parts.q).sum(0)
    u = None if parts.u is None else (r * (parts.u + gap * parts.s)).sum(0)
    return LogitState(parts.y.sum(0), m, (r * parts.s).sum(0), q, u)


def log_normaliser(state: LogitState) -> Tensor:
    """Return ``logsumexp`` of all logits, the label's included."""
    top = torch.maximum(state.m, state.y)
    gap = (top - state.m).clamp(max=FAR)
    return top + torch.log(state.s * torch.exp(-gap) + torch.exp(state.y - top))


def certainty(state: LogitState) -> tuple[Tensor, Tensor]:
    """Return ``p_y`` and ``1 - p_y``, neither computed from the other."""
    top = torch.maximum(state.m, state.y)
    others = state.s * torch.exp(-(top - state.m).clamp(max=FAR))
    label = torch.exp(state.y - top)
    return label / (label + others), others / (label + others)


def state_scores(state: LogitState, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Turn the summary of the whole vocabulary into scores, by sums of non-negative terms only.

    Args:
        state: The summary; with q for el2n and sum_sq, with u for entropy.
        outputs: Names of :class:`TokenScores` fields.
    """
    y, m, s, q, u = state
    top = torch.maximum(m, y)
    gap = (top - m).clamp(max=FAR)
    others = torch.exp(-gap)
    norm = s * others + torch.exp(y - top)
    ratio = others / norm
    p = torch.exp(y - top) / norm
    nll = torch.where(y >= m, torch.log1p(s * others), (m - y) + torch.log(norm))
    scores = {"nll": nll, "margin": y - m, "top1": y >= m}
    if u is not None:
        # The clamp is reached only where p is exactly 0, and spares 0 * inf there.
        scores["entropy"] = p * nll.clamp(max=FAR) + ratio * ((norm.log() + gap) * s + u)
    if q is not None:
        # Factored so that the squares of tiny probabilities do not underflow.
        scores["el2n"] = ratio * torch.sqrt(s.square() + q)
        scores["sum_sq"] = q * ratio.square() + p.square()
    return {name: scores[name] for name in outputs}
