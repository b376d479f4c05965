"""Per-token scores of next-token predictions in one pass over the vocabulary.

The logits of a tile of tokens and vocabulary entries live only until its statistics are taken.
For each token four numbers summarise the entries that are **not** the label: the largest logit
``m``, ``s = sum exp(z - m)``, ``q = sum exp(2 (z - m))`` and ``u = sum exp(z - m) (m - z)``. They
merge over vocabulary parts, and with the logit ``y`` of the label every score follows as a sum of
non-negative terms: nothing cancels when the label becomes certain, which is where
``logsumexp(z) - y`` in float32 loses all its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onlinesel.kernels.head import LMHead, check_hidden, full_precision

__all__ = ["TokenScores", "shift_labels", "token_scores"]

_OUTPUTS = ("nll", "entropy", "el2n", "sum_sq", "margin", "top1")

# Logits this far below the largest one count as exp(-1e4) = 0 in either float type, while their
# product with that zero stays 0 instead of becoming 0 * inf = nan.
_FAR = 1.0e4


class TokenScores(NamedTuple):
    """Scores of tokens, each of the shape of the labels and zero where the label is ignored.

    Fields that were not asked for are None. ``p`` is the predicted distribution, ``y`` the label.

    Attributes:
        mask: Bool, whether the label counts.
        nll: ``-log p_y``, in nats.
        entropy: ``-sum_v p_v log p_v``, in nats.
        el2n: ``||p - onehot(y)||``, the error L2 norm, in [0, sqrt(2)].
        sum_sq: ``sum_v p_v^2``, in [1/V, 1].
        margin: Logit of the label minus the largest other logit.
        top1: Bool, whether no other logit is larger than the label's (a tie counts as top).
    """

    mask: Tensor
    nll: Tensor | None = None
    entropy: Tensor | None = None
    el2n: Tensor | None = None
    sum_sq: Tensor | None = None
    margin: Tensor | None = None
    top1: Tensor | None = None


class _Stats(NamedTuple):
    """Summary of the logits of n tokens: label logit, and m, s, q, u of the other entries."""

    y: Tensor
    m: Tensor
    s: Tensor
    q: Tensor | None
    u: Tensor | None


def shift_labels(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Align labels with the hidden states that predict them.

    Args:
        labels: ``(..., T)`` integer, ``labels[..., t]`` being the token at position t.
        ignore_index: Value given to the last position, which predicts nothing known.

    Returns:
        ``(..., T)``: position t holds the label of position t + 1.

    Example:
        >>> import torch
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    if labels.dim() < 1:
        raise ValueError(
            "shift_labels: labels must have a time dimension, got a scalar. Pass (..., T)."
        )
    out = torch.full_like(labels, ignore_index)
    out[..., :-1] = labels[..., 1:]
    return out


def token_scores(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    *,
    outputs: Sequence[str] = _OUTPUTS,
    ignore_index: int = -100,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> TokenScores:
    """Score every label under the head, without building the logits.

    Ignored tokens are left out before the product. Sums are float32, or float64 when an input is.
    A nan or inf makes the scores of its own token nan or inf and no others.

    Source of EL2N: Paul et al., Deep Learning on a Data Diet (arXiv 2107.07075).

    Args:
        hidden: ``(..., d)`` states that enter the head.
        head: The LM head.
        labels: ``(...)`` integer, already aligned with ``hidden`` (see :func:`shift_labels`).
        outputs: The fields to compute, any of nll, entropy, el2n, sum_sq, margin, top1.
        ignore_index: Label value of the tokens to leave out.
        vocab_chunk: Vocabulary entries in a tile, or None to choose.
        token_chunk: Tokens in a tile, or None to choose.

    Returns:
        The scores in the accumulation dtype, on the device of ``hidden``, without autograd.

    Raises:
        ValueError: A shape, a label, a name in ``outputs`` or a chunk is not as stated.

    Example:
        >>> import torch
        >>> head = LMHead(torch.tensor([[2.0], [0.0]]))
        >>> scores = token_scores(torch.ones(2, 1), head, torch.tensor([0, -100]))
        >>> scores.nll
        tensor([0.1269, 0.0000])
        >>> scores.margin, scores.top1
        (tensor([2., 0.]), tensor([ True, False]))
    """
    _check(hidden, head, labels, outputs, vocab_chunk, token_chunk)
    with full_precision(hidden.device):
        mask = labels != ignore_index
        kept = mask.reshape(-1).nonzero().squeeze(1)
        states = hidden.reshape(-1, head.hidden_size)
        targets = labels.reshape(-1).long()
        if kept.numel() < targets.numel():
            states, targets = states[kept], targets[kept]
        _check_labels(targets, head.vocab_size)
        stats = _stream(states, head, targets, outputs, vocab_chunk, token_chunk)
        scores = _finish(stats, outputs)
        return TokenScores(mask, **{k: _scatter(v, kept, mask) for k, v in scores.items()})


def _stream(
    states: Tensor,
    head: LMHead,
    targets: Tensor,
    outputs: Sequence[str],
    vocab_chunk: int | None,
    token_chunk: int | None,
) -> _Stats:
    """Summarise the logits of (n, d) states, tile by tile."""
    dtype = head.accumulation_dtype(states)
    vocab, count = head.vocab_size, states.shape[0]
    width = vocab_chunk or (vocab if vocab <= 8192 else 4096)
    # A tile that stays in cache costs less than its product: 4 MiB on a CPU, 32 MiB on a GPU.
    tile = 2**20 if states.device.type == "cpu" else 2**23
    step = token_chunk or max(64, tile // width)
    squares, spread = bool({"el2n", "sum_sq"} & set(outputs)), "entropy" in outputs
    total = [_empty(states[i : i + step], dtype, squares, spread) for i in range(0, count, step)]
    for start in range(0, vocab, width):
        # The weight is cast once for all tokens: the loop over tokens is the inner one.
        part = head.part(start, start + width, dtype)
        for index, merged in enumerate(total):
            rows = slice(index * step, (index + 1) * step)
            total[index] = _merge(
                merged, _tile_stats(part, states[rows], targets[rows] - start, squares, spread)
            )
    if not total:
        return _empty(states, dtype, squares, spread)
    return _Stats(
        torch.cat([part.y for part in total]),
        torch.cat([part.m for part in total]),
        torch.cat([part.s for part in total]),
        torch.cat([part.q for part in total if part.q is not None]) if squares else None,
        torch.cat([part.u for part in total if part.u is not None]) if spread else None,
    )


def _empty(states: Tensor, dtype: torch.dtype, squares: bool, spread: bool) -> _Stats:
    """Summary of no vocabulary entry. The finite m keeps differences of two of them defined."""
    zeros = states.new_zeros(states.shape[0], dtype=dtype)
    low = torch.full_like(zeros, torch.finfo(dtype).min)
    return _Stats(zeros, low, zeros, zeros if squares else None, zeros if spread else None)


def _tile_stats(
    part: LMHead, states: Tensor, targets: Tensor, squares: bool, spread: bool
) -> _Stats:
    """Summarise one tile; y is 0 for the tokens whose label is not in this vocabulary part."""
    z = part.logits(states)
    inside = (targets >= 0) & (targets < part.vocab_size)
    column = targets.clamp(0, part.vocab_size - 1).unsqueeze(1)
    found = z.gather(1, column).squeeze(1)
    # The label leaves the tile; a token without its label here writes back what it read.
    z.scatter_(1, column, torch.where(inside, -torch.inf, found).unsqueeze(1))
    m = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    z.sub_(m.unsqueeze(1))
    q = u = None
    if spread:
        z.clamp_(min=-_FAR)
        e = z.exp()
    else:
        e = z.exp_()
    s = e.sum(1)
    if squares:
        q = torch.linalg.vector_norm(e, dim=1).square()
    if spread:
        u = -z.mul_(e).sum(1)
    return _Stats(torch.where(inside, found, 0.0), m, s, q, u)


def _merge(one: _Stats, two: _Stats) -> _Stats:
    """Summary of the union of two vocabulary parts, which share no entry."""
    m = torch.maximum(one.m, two.m)
    gap1, gap2 = (m - one.m).clamp(max=_FAR), (m - two.m).clamp(max=_FAR)
    r1, r2 = torch.exp(-gap1), torch.exp(-gap2)
    q = u = None
    if one.q is not None and two.q is not None:
        q = r1.square() * one.q + r2.square() * two.q
    if one.u is not None and two.u is not None:
        u = r1 * (one.u + gap1 * one.s) + r2 * (two.u + gap2 * two.s)
    return _Stats(one.y + two.y, m, r1 * one.s + r2 * two.s, q, u)


def _finish(stats: _Stats, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Turn summaries into scores, by sums of non-negative terms only."""
    y, m, s, q, u = stats
    top = torch.maximum(m, y)
    gap = (top - m).clamp(max=_FAR)
    others = torch.exp(-gap)
    norm = s * others + torch.exp(y - top)
    ratio = others / norm
    p = torch.exp(y - top) / norm
    nll = torch.where(y >= m, torch.log1p(s * others), (m - y) + torch.log(norm))
    scores = {"nll": nll, "margin": y - m, "top1": y >= m}
    if u is not None:
        # The clamp is reached only where p is exactly 0, and spares 0 * inf there.
        scores["entropy"] = p * nll.clamp(max=_FAR) + ratio * ((norm.log() + gap) * s + u)
    if q is not None:
        # Factored so that the squares of tiny probabilities do not underflow.
        scores["el2n"] = ratio * torch.sqrt(s.square() + q)
        scores["sum_sq"] = q * ratio.square() + p.square()
    return {name: scores[name] for name in outputs}


def _scatter(values: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the kept tokens back at their places, zeros elsewhere."""
    if kept.numel() == mask.numel():
        return values.reshape(mask.shape)
    out = values.new_zeros(mask.numel())
    out[kept] = values
    return out.reshape(mask.shape)


def _check(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    outputs: Sequence[str],
    vocab_chunk: int | None,
    token_chunk: int | None,
) -> None:
    check_hidden("token_scores", head, hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"token_scores: labels must be of shape {tuple(hidden.shape[:-1])}, got "
            f"{tuple(labels.shape)}. Align them with hidden first, see shift_labels."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"token_scores: labels must be integers, got {labels.dtype}. Pass token ids."
        )
    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown or isinstance(outputs, str):
        raise ValueError(
            f"token_scores: outputs must be a sequence of names among {', '.join(_OUTPUTS)}, got "
            f"{outputs!r}. Remove the others."
        )
    for name, chunk in (("vocab_chunk", vocab_chunk), ("token_chunk", token_chunk)):
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"token_scores: {name} must be at least 1, got {chunk}. Pass None to choose."
            )


def _check_labels(targets: Tensor, vocab: int) -> None:
    """Refuse labels outside the vocabulary, which would score another token silently."""
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocab:
        raise ValueError(
            f"token_scores: labels must be in [0, {vocab}) or ignore_index, got a label "
            f"{low if low < 0 else high}. Check the tokenizer, or mark the token ignored."
        )
