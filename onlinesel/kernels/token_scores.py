"""Per-token scores of next-token predictions in one pass over the vocabulary.

The logits of a tile of tokens and vocabulary entries live only until their summary is taken; the
summary and how scores follow from it are in ``_state``. Three backends take it, with the same
numbers up to rounding:

``"torch"``
    torch operations on every device, in float64 for float64 inputs: the oracle.
``"tile"``
    On CUDA, with triton. The vendor's product writes float32 logits into a tile of 64 MiB, one
    kernel reads them once.
``"triton"``
    On CUDA, with triton. Product and summary in one kernel; beside the result it needs 20 bytes
    per token and 8,192 vocabulary entries. Its ``vocab_chunk`` and ``token_chunk`` are fixed.
    It reads the weight in memory, so it refuses a head that is quantised or has adapters.

``"auto"`` takes torch on a CPU, for float64, and where triton is not installed. On CUDA it takes
what was measured to be fastest for the device, dtype and hidden size, and the tile backend where
nothing was; ``docs/gpu.md`` has what was measured. The kernels' numbers are checked in Triton's
interpreter. An explicit backend is obeyed or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onlinesel.kernels._backend import backend_for, logit_state
from onlinesel.kernels._product import full_precision
from onlinesel.kernels._state import LogitState, merge_parts, state_scores
from onlinesel.kernels._tokens import Tokens, put_back, take_tokens
from onlinesel.kernels.head import LMHead

__all__ = ["TokenScores", "VocabShard", "shift_labels", "token_scores"]

_OUTPUTS = ("nll", "entropy", "el2n", "sum_sq", "margin", "top1")


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


class VocabShard(NamedTuple):
    """The part of a vocabulary that this rank's head holds, under vocabulary parallelism.

    Attributes:
        first: Vocabulary entry of the head's first row.
        total: Entries of the whole vocabulary.
        group: The ranks that hold the others; each passes the same hidden states and labels.
    """

    first: int
    total: int
    group: Any = None


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
    temperature: Tensor | float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    padded: bool = False,
    shard: VocabShard | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> TokenScores:
    """Score every label under the head, without building the logits.

    Sums are float32, or float64 when an input is. A nan or inf makes the scores of its own token
    nan or inf and no others.

    Source of EL2N: Paul et al., Deep Learning on a Data Diet (arXiv 2107.07075).

    Args:
        hidden: ``(..., d)`` states that enter the head.
        head: The LM head.
        labels: ``(...)`` integer, already aligned with ``hidden`` (see :func:`shift_labels`). Where
            they are on the host, nothing waits for the device.
        outputs: The fields to compute, any of nll, entropy, el2n, sum_sq, margin, top1.
        temperature: Divides the logits: a number, or one per label, positive. None for 1.
        ignore_index: Label value of the tokens to leave out.
        backend: ``"auto"``, ``"torch"``, ``"tile"`` or ``"triton"``; see the module.
        padded: Compute ignored tokens too, so that no shape depends on a value and nothing waits
            for the device (CUDA graphs). Wrong labels and temperatures then give nan.
        shard: The part of the vocabulary that ``head`` holds, or None for all of it.
        vocab_chunk: Vocabulary entries in a tile, or None to choose.
        token_chunk: Tokens in a tile, or None to choose.

    Returns:
        The scores in the accumulation dtype, on the device of ``hidden``, without autograd.

    Raises:
        ValueError: An argument is not as stated, or the backend cannot run here.
        ImportError: The backend needs triton, which is not installed.

    Example:
        >>> import torch
        >>> head = LMHead(torch.tensor([[2.0], [0.0]]))
        >>> scores = token_scores(torch.ones(2, 1), head, torch.tensor([0, -100]))
        >>> scores.nll
        tensor([0.1269, 0.0000])
    """
    _check(outputs, vocab_chunk, token_chunk)
    vocab = check_shard("token_scores", head, shard)
    with full_precision(hidden.device):
        tokens = take_tokens(
            "token_scores", hidden, head, labels, temperature, ignore_index, padded, vocab
        )
        state = _summarise(tokens, head, outputs, backend, shard, vocab_chunk, token_chunk)
        scores = state_scores(state, outputs)
        return TokenScores(tokens.mask, **{k: put_back(v, tokens) for k, v in scores.items()})


def _summarise(
    tokens: Tokens,
    head: LMHead,
    outputs: Sequence[str],
    backend: str,
    shard: VocabShard | None,
    vocab_chunk: int | None,
    token_chunk: int | None,
) -> LogitState:
    """Return the state of the tokens over the whole vocabulary."""
    states, targets = tokens.states, tokens.targets
    chosen = backend_for("token_scores", backend, states, head)
    squares, spread = bool({"el2n", "sum_sq"} & set(outputs)), "entropy" in outputs
    if shard is not None:
        targets = targets - shard.first
    state = logit_state(
        states, head, targets, tokens.inverse, squares, spread, chosen, vocab_chunk, token_chunk
    )
    if shard is not None:
        state = merge_over_ranks(state, shard.group)
    if tokens.invalid is not None:
        state = state._replace(y=torch.where(tokens.invalid, torch.nan, state.y))
    return state


def merge_over_ranks(state: LogitState, group: Any) -> LogitState:
    """Merge the summaries of the ranks' vocabulary parts: one collective of 5 numbers a token.

    The parts are merged in the order of the ranks, so every rank has the same bits.
    """
    zeros = torch.zeros_like(state.m)
    mine = torch.stack([zeros if field is None else field for field in state])
    ranks = dist.get_world_size(group)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine, group=group)
    y, m, s, q, u = torch.stack(every).unbind(1)
    return merge_parts(
        LogitState(y, m, s, None if state.q is None else q, None if state.u is None else u)
    )


def check_shard(owner: str, head: LMHead, shard: VocabShard | None) -> int:
    """Return the size of the whole vocabulary."""
    if shard is None:
        return head.vocab_size
    last = shard.first + head.vocab_size
    if shard.first < 0 or last > shard.total:
        raise ValueError(
            f"{owner}: shard must hold entries inside its total, got rows {shard.first} to {last} "
            f"of {shard.total}. Give the entry of the head's first row and the whole size."
        )
    return shard.total


def _check(outputs: Sequence[str], vocab_chunk: int | None, token_chunk: int | None) -> None:
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
