"""Log-probabilities and entropies of a policy, differentiable, without the logits in memory.

The forward pass takes the summary of ``token_scores``. The backward pass makes each tile of logits
again, for those tokens alone whose upstream gradient is not zero: where a loss drops, clips or
masks most tokens, most of the three products is never done. With ``log p`` and the entropy ``H``
of a token, upstream gradients ``g`` and ``e`` reach its logits as

    dz_v = g (1[v = y] - p_v) - e p_v (log p_v + H),

divided by the temperature, times the slope of the soft cap and the scale of the head. A weight that
ZeRO-3 has taken apart since the forward pass is gathered for the backward pass, by every rank.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onlinesel.kernels._apart import AdapterGradient, HeadForm, put_together, take_apart
from onlinesel.kernels._backend import backend_for, logit_state
from onlinesel.kernels._product import full_precision, keeps_float32, wide_mm
from onlinesel.kernels._shards import held
from onlinesel.kernels._state import (
    FAR,
    LogitState,
    certainty,
    log_normaliser,
    merge_states,
    state_scores,
)
from onlinesel.kernels._stream import tile_shape
from onlinesel.kernels._tokens import put_back, take_tokens
from onlinesel.kernels.head import LMHead

__all__ = ["policy_logprobs"]

_ROUNDED_ENTRIES = 2**15  # of the weight, whose 16-bit copy is in memory at a time


def policy_logprobs(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    temperature: Tensor | float | None = None,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probability of each label and entropy of each prediction, with gradients.

    Gradients reach ``hidden`` and those tensors of the head that require them, the factors of LoRA
    adapters included; a source of rows, such as a quantised weight, has none. The head of
    ``LMHead.from_model`` is detached unless it was read with ``detach=False``. The temperature has
    no gradient, and there is no second derivative. Sums are float32, or float64 when an input is;
    on CUDA the gradient of bfloat16 logits is bfloat16, as in plain bfloat16 training.

    Args:
        hidden: ``(..., d)`` states that enter the head.
        head: The LM head.
        labels: ``(...)`` integer, already aligned with ``hidden`` (see ``shift_labels``).
        temperature: Divides the logits: a number, or one per label, positive. None for 1.
        ignore_index: Label value of tokens that give 0 and have no gradient.
        backend: Of the forward pass, see ``token_scores``.
        vocab_chunk: Vocabulary entries in a tile, or None to choose.
        token_chunk: Tokens in a tile, or None to choose.
        compute_dtype: ``torch.bfloat16`` or ``torch.float16``, to which states and head are rounded
            for the products alone, as by autocast; None multiplies what is given, in autocast too.

    Returns:
        ``log p_y`` and ``-sum_v p_v log p_v`` in nats, each ``(...)`` in the accumulation dtype.

    Raises:
        ValueError: An argument is not as stated, or the backend cannot run here.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0], [0.0]], requires_grad=True)
        >>> head = LMHead(torch.tensor([[2.0], [0.0]]))
        >>> logprobs, entropy = policy_logprobs(hidden, head, torch.tensor([0, 1]))
        >>> logprobs.detach()
        tensor([-0.1269, -0.6931])
        >>> logprobs.sum().backward()
        >>> hidden.grad
        tensor([[ 0.2384],
                [-1.0000]])
    """
    tokens = take_tokens(
        "policy_logprobs", hidden, head, labels, temperature, ignore_index, False, head.vocab_size
    )
    states = tokens.states
    dtype = _product_dtype(torch.promote_types(states.dtype, head.weight.dtype), compute_dtype)
    chosen = backend_for("policy_logprobs", backend, states, head, dtype)
    form, tensors = take_apart(head)
    plan = _Plan(form, chosen, vocab_chunk, token_chunk, compute_dtype)
    logprobs, entropy = _Policy.apply(states, tokens.targets, tokens.inverse, plan, *tensors)
    return put_back(logprobs, tokens), put_back(entropy, tokens)


def _product_dtype(given: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the factors, and refuse what autocast would not do either."""
    if compute_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            "policy_logprobs: compute_dtype must be torch.bfloat16, torch.float16 or None, got "
            f"{compute_dtype}. Cast hidden and the head for other dtypes."
        )
    if compute_dtype is not None and given == torch.float64:
        raise ValueError(
            f"policy_logprobs: compute_dtype must be None for float64 inputs, got {compute_dtype}. "
            "Pass float32 inputs, or leave it out."
        )
    return compute_dtype or given


class _Plan(NamedTuple):
    """What is no tensor."""

    form: HeadForm
    backend: str
    vocab_chunk: int | None
    token_chunk: int | None
    compute_dtype: torch.dtype | None


class _Rows(NamedTuple):
    """What the backward pass knows about the tokens that it works on.

    Attributes:
        states: ``(n, d)``.
        targets: ``(n,)``.
        inverse: ``(n,)`` one over the temperature, or None.
        log_norm: ``(n,)`` logsumexp of the tempered logits.
        entropy: ``(n,)``.
        at_label: ``(n,)`` gradient of the tempered logit of the label, from ``1 - p_y`` itself.
        of_logprob: ``(n,)`` upstream gradient.
        of_entropy: ``(n,)`` upstream gradient, or None where nothing uses the entropy.
    """

    states: Tensor
    targets: Tensor
    inverse: Tensor | None
    log_norm: Tensor
    entropy: Tensor
    at_label: Tensor
    of_logprob: Tensor
    of_entropy: Tensor | None


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        inverse: Tensor | None,
        plan: _Plan,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head = put_together(plan.form, tensors)
        ctx.dtype, ctx.plan = states.dtype, plan
        states = states.to(plan.compute_dtype or states.dtype)
        with full_precision(states.device):
            state = _summary(states, head, targets, inverse, plan)
            scores = state_scores(state, ("nll", "entropy"))
            label, others = certainty(state)
            normaliser = log_normaliser(state)
        ctx.save_for_backward(
            states, targets, inverse, normaliser, label, others, *scores.values(), *tensors
        )
        ctx.set_materialize_grads(False)
        return -scores["nll"], scores["entropy"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprob: Tensor | None, of_entropy: Tensor | None) -> Any:
        states, targets, inverse, normaliser, *rest = ctx.saved_tensors
        rest, tensors = rest[:4], rest[4:]
        # Held by every rank, whether a token of its own is left or not.
        with held(*tensors), full_precision(states.device):
            head = put_together(ctx.plan.form, tensors)
            zeros = torch.zeros_like(normaliser)
            given = zeros if of_logprob is None else of_logprob
            used = given != 0  # true for nan
            if of_entropy is not None:
                used = used | (of_entropy != 0)
            kept = used.nonzero().squeeze(1)
            label, others, nll, entropy = (field[kept] for field in rest)
            at_label = given[kept] * others
            if of_entropy is not None:
                of_entropy = of_entropy[kept]
                at_label = at_label - of_entropy * label * (entropy - nll.clamp(max=FAR))
            rows = _Rows(
                states[kept], targets[kept], None if inverse is None else inverse[kept],
                normaliser[kept], entropy, at_label, given[kept], of_entropy,
            )  # fmt: skip
            wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
            narrow, of_tensors = _gradients(rows, head, wanted, ctx.plan)
            of_states = None
            if narrow is not None:
                of_states = states.new_zeros(states.shape, dtype=ctx.dtype)
                of_states.index_copy_(0, kept, narrow.to(ctx.dtype))
        return of_states, None, None, None, *of_tensors


def _summary(
    states: Tensor, head: LMHead, targets: Tensor, inverse: Tensor | None, plan: _Plan
) -> LogitState:
    """Summarise the logits of (n, d) states, some rows of the weight after the other if cast."""

    def summarise(part: LMHead, start: int) -> LogitState:
        return logit_state(
            states, part, targets - start, inverse, False, True, plan.backend, plan.vocab_chunk,
            plan.token_chunk,
        )  # fmt: skip

    if plan.compute_dtype in (None, head.base.dtype):
        return summarise(head, 0)
    total = None
    for start in range(0, head.vocab_size, _ROUNDED_ENTRIES):
        part = head.part(start, start + _ROUNDED_ENTRIES, plan.compute_dtype)
        found = summarise(part, start)
        total = found if total is None else merge_states(total, found)
    assert total is not None
    return total


def _gradients(
    rows: _Rows, head: LMHead, wanted: tuple[bool, ...], plan: _Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the states of these tokens, and of the tensors of the head."""
    dtype, base, bias = rows.log_norm.dtype, head.base, head.bias
    width, step = tile_shape(
        head.device, head.vocab_size, plan.vocab_chunk, plan.token_chunk, count=len(rows.states)
    )
    kind = plan.compute_dtype or base.dtype
    cast = kind != base.dtype
    # Where the device multiplies 16-bit factors into float32, nothing is copied.
    narrow = keeps_float32(rows.states, rows.states.new_empty(0, dtype=kind))
    factors = rows.states if narrow else rows.states.to(dtype)
    of_states = torch.zeros_like(factors, dtype=dtype) if wanted[0] else None
    of_weight = torch.zeros_like(base) if isinstance(base, Tensor) and wanted[1] else None
    of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
    if of_weight is not None and plan.vocab_chunk is None:
        # The sums of a tile's rows and what is added to them: 64 MiB each at most.
        width = min(width, max(64, 2**24 // head.hidden_size))
    adapters = [
        AdapterGradient(low, factors, step, dtype, wanted[3 + 2 * i : 5 + 2 * i])
        for i, low in enumerate(head.low_rank)
    ]
    rounded = narrow and kind == torch.bfloat16  # float16 would lose small gradients
    # What sums the tile itself gets it in float32.
    at_once = rounded and not adapters and of_bias is None
    entries_left = head.vocab_size if any(wanted) and len(factors) else 0
    for start in range(0, entries_left, width):
        part = head.part(start, start + width, kind if cast or narrow else dtype)
        part = part if narrow else part.part(0, width, dtype)
        entries, weight = slice(start, start + part.vocab_size), part.base_rows()
        sums = torch.zeros_like(weight, dtype=dtype) if of_weight is not None else None
        bias_sums = torch.zeros(part.vocab_size, dtype=dtype, device=weight.device)
        for first in range(0, len(factors), step):
            here = slice(first, first + step)
            tile = _slice(rows, here), factors[here], part, start
            dz = _tile_gradient(*tile, plan.backend, kind if at_once else dtype)
            if of_bias is not None:
                bias_sums += dz.sum(0)
            for adapter in adapters:
                adapter.add(dz, here, entries)
            if rounded:
                dz = dz.to(kind)
            if of_states is not None:
                of_states[here] += _multiply(dz, weight)
            if sums is not None:
                sums += _multiply(dz.T, factors[here])
            del dz  # before the next tile is made beside it
        if of_weight is not None and sums is not None:
            of_weight[entries] = sums.to(of_weight.dtype)
        if of_bias is not None:
            of_bias[entries] = bias_sums.to(of_bias.dtype)
        del part, weight, sums  # before the next rows are made beside them
    thin: list[Tensor | None] = []
    for adapter in adapters:
        if of_states is not None:
            adapter.add_to_states(of_states)
        thin.extend(adapter.of_factors())
    return of_states, [of_weight, of_bias, *thin]


def _tile_gradient(
    rows: _Rows, factors: Tensor, part: LMHead, start: int, backend: str, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the products ``H W^T`` of one tile, (n, entries)."""
    if backend != "torch":
        kernel = importlib.import_module("onlinesel.kernels._gradient")
        found: Tensor = kernel.tile_gradient(
            _products(factors, part, rows.log_norm.dtype), part, start, rows[1:], dtype
        )
        return found
    capped = _logits(factors, part, rows.log_norm.dtype)
    slope = None
    if part.softcap is not None:
        slope = (capped / part.softcap).square_().neg_().add_(1.0)
    if rows.inverse is not None:
        capped.mul_(rows.inverse.unsqueeze(1))
    log_p = capped.sub_(rows.log_norm.unsqueeze(1)).clamp_(min=-FAR)
    dz = log_p.exp()
    if rows.of_entropy is None:
        dz.mul_(-rows.of_logprob.unsqueeze(1))
    else:
        push = log_p.add_(rows.entropy.unsqueeze(1)).mul_(rows.of_entropy.unsqueeze(1))
        dz.mul_(push.add_(rows.of_logprob.unsqueeze(1)).neg_())
    # The label's own entry would cancel where it is certain, so it comes from 1 - p.
    local = rows.targets - start
    inside = (local >= 0) & (local < part.vocab_size)
    column = local.clamp(0, part.vocab_size - 1).unsqueeze(1)
    value = torch.where(inside, rows.at_label, dz.gather(1, column).squeeze(1))
    dz.scatter_(1, column, value.unsqueeze(1))
    if rows.inverse is not None:
        dz.mul_(rows.inverse.unsqueeze(1))
    if slope is not None:
        dz.mul_(slope)
    return dz.mul_(part.scale).to(dtype)


def _logits(factors: Tensor, part: LMHead, dtype: torch.dtype) -> Tensor:
    """Return the logits of a tile before the temperature, in the accumulation dtype."""
    if not keeps_float32(factors, part.base):
        return part.logits(factors)
    z = _products(factors, part, dtype)
    if part.bias is not None:
        z.add_(part.bias.to(dtype))
    z.mul_(part.scale)
    return z if part.softcap is None else z.div_(part.softcap).tanh_().mul_(part.softcap)


def _products(factors: Tensor, part: LMHead, dtype: torch.dtype) -> Tensor:
    """Return the products of a tile, those of the adapters included: logits without the rest."""
    z = wide_mm(factors, part.base_rows().T)
    for low in part.low_rank:
        z.addmm_(low.reduced(factors.to(dtype)), low.b.to(dtype).T)
    return z


def _multiply(one: Tensor, two: Tensor) -> Tensor:
    """Multiply in the accumulation dtype, which is float64 where an input is."""
    return one @ two if one.dtype == torch.float64 else wide_mm(one, two)


def _slice(rows: _Rows, here: slice) -> _Rows:
    return _Rows(*(None if field is None else field[here] for field in rows))  # type: ignore[arg-type]
