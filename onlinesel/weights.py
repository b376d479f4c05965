"""Pure functions from scores to weights, and from weights to a loss."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from onlinesel._base.host import upload
from onlinesel.types import Normalize

__all__ = [
    "Weighing",
    "draw_rows",
    "effective_size",
    "hand_over",
    "order_by",
    "token_losses",
    "top_rows",
    "total_weight",
    "uniform_draws",
    "weighted_mean",
]


def order_by(scores: Tensor, ids: Tensor, *, largest: bool = True) -> Tensor:
    """Rank rows by score, ties towards the lower id, non-finite scores last.

    The order depends on the values and ids alone, not on the position of the rows, so every rank
    and every sharding of the batch finds the same one.

    Args:
        scores: ``(N,)`` floats.
        ids: ``(N,)`` int64.
        largest: Best first means largest first.

    Returns:
        ``(N,)`` int64 permutation, best row first.

    Example:
        >>> import torch
        >>> from onlinesel.weights import order_by
        >>> order_by(torch.tensor([1.0, 3.0, 3.0]), torch.tensor([7, 9, 2])).tolist()
        [2, 1, 0]
    """
    worst = float("-inf") if largest else float("inf")
    usable = torch.where(torch.isfinite(scores), scores, worst)
    by_id = ids.argsort(stable=True)
    return by_id[usable[by_id].argsort(descending=largest, stable=True)]


def top_rows(scores: Tensor, keep: int, ids: Tensor, *, largest: bool = True) -> Tensor:
    """Give weight 1 to the ``keep`` best finite rows and 0 to the rest.

    Args:
        scores: ``(N,)`` floats. Non-finite rows are never kept, even if fewer than ``keep`` remain.
        keep: Number of rows.
        ids: ``(N,)`` int64; ties go to the lower id.
        largest: Keep the largest (True) or the smallest scores.

    Returns:
        ``(N,)`` float32 of zeros and ones.

    Example:
        >>> import torch
        >>> from onlinesel.weights import top_rows
        >>> top_rows(torch.tensor([1.0, float("nan"), 3.0]), 2, torch.arange(3)).tolist()
        [1.0, 0.0, 1.0]
    """
    rows, finite = scores.shape[0], torch.isfinite(scores)
    keep = min(keep, rows)
    if keep < 1:
        return torch.zeros(rows, device=scores.device)
    # The last score that is kept is enough: only rows that tie with it need an order.
    usable = torch.where(finite, scores if largest else -scores, float("-inf"))
    last = usable.kthvalue(rows - keep + 1).values
    best, tied = usable > last, (usable == last).nonzero().flatten()
    weights = best.float()
    weights[tied[ids[tied].argsort(stable=True)[: keep - int(best.sum())]]] = 1.0
    return torch.where(finite, weights, 0.0)


def uniform_draws(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one uniform number a row, assigned in the order of the ids.

    Handing numbers out by id rather than by position keeps random methods equivariant: the same
    candidates in another order, or dealt to ranks differently, are decided the same way.

    Args:
        ids: ``(N,)`` int64.
        generator: CPU generator.

    Returns:
        ``(N,)`` float64 in [0, 1).
    """
    drawn = torch.rand(ids.shape[0], generator=generator, dtype=torch.float64)
    result = torch.empty_like(drawn)
    result[ids.cpu().argsort(stable=True)] = drawn
    return result.to(ids.device)


def draw_rows(probabilities: Tensor, draws: int, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows **with** replacement by systematic resampling and count them.

    One uniform offset places ``draws`` equally spaced pointers on the cumulative probabilities:
    row ``i`` is hit ``draws * p_i`` times in expectation, exactly as in independent draws, with
    less variance. Dividing the counts by ``draws * p_i`` therefore gives an unbiased estimator,
    which a draw without replacement weighted by ``1 / (N p_i)`` does not.

    Args:
        probabilities: ``(N,)`` >= 0, not all zero; normalised here.
        draws: Number of draws.
        ids: ``(N,)`` int64; rows are laid out in the order of their ids.
        generator: CPU generator.

    Returns:
        ``(N,)`` int64 counts that sum to ``draws``.

    Example:
        >>> import torch
        >>> from onlinesel.weights import draw_rows
        >>> g = torch.Generator().manual_seed(0)
        >>> draw_rows(torch.tensor([0.5, 0.5, 0.0]), 4, torch.arange(3), g).tolist()
        [2, 2, 0]
    """
    order = ids.argsort(stable=True)
    cumulative = probabilities[order].double().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative.device)
    pointers = (torch.arange(draws, device=cumulative.device) + offset) / draws * cumulative[-1]
    hits = torch.searchsorted(cumulative, pointers, right=True)
    # Rounding may push the last pointer past the end, or onto a row of probability 0.
    hits = hits.clamp(max=int((probabilities[order] > 0).nonzero().max()))
    counts = torch.zeros_like(ids)
    counts[order] = torch.bincount(hits, minlength=ids.shape[0])
    return counts


def effective_size(weights: Tensor) -> Tensor:
    """Return Kish's effective sample size ``(sum w)^2 / sum w^2``; 0 if all weights are 0.

    Example:
        >>> import torch
        >>> from onlinesel.weights import effective_size
        >>> effective_size(torch.tensor([1.0, 1.0, 0.0])).item()
        2.0
    """
    squares = weights.square().sum()
    return torch.where(squares > 0, weights.sum().square() / squares.clamp(min=1e-38), squares)


@dataclass(frozen=True)
class Weighing:
    """How the rows of one micro-batch count in the loss of their optimizer step.

    Attributes:
        weights: ``(N,)`` row weights >= 0.
        counts: ``(N,)`` labelled tokens of each row; None where a row is one item of its own, as in
            classification.
        denominator: ``D`` of the whole step, over all micro-batches and ranks.
        normalize: ``"tokens"``, ``"samples"`` or ``"rows"``.
        factor: What the engine divides a gradient by afterwards (ranks that are averaged, losses
            that it divides by the accumulation), so that the division cancels.
        observe: Is told the ``(N,)`` mean losses of the rows, for methods that learn from them.
        width: Tokens of a row that may have a loss, None if nobody knows.
        undefined: Show the loss as nan, whatever it is. Its gradient stays as it is.
    """

    weights: Tensor
    counts: Tensor | None
    denominator: Tensor
    normalize: Normalize
    factor: float = 1.0
    observe: Callable[[Tensor], None] | None = None
    width: int | None = None
    undefined: bool = False

    def __call__(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return this micro-batch's part of the step's loss; see :func:`weighted_mean`."""
        self._check(losses, mask)
        # In bfloat16 the denominator alone would be off by up to 0.4 %.
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        if self.observe is not None:
            self.observe(self._row_means(losses.detach(), mask))
        weights = upload(self.weights, losses.device).to(losses)
        if self.counts is not None:
            counts = upload(self.counts, losses.device).to(losses)
            if losses.dim() == 2 and self.normalize != "tokens":
                weights = weights / counts.clamp(min=1)
            elif losses.dim() == 1:
                per_row = counts if self.normalize == "tokens" else counts.clamp(max=1)
                weights = weights * per_row
        alive = weights > 0
        if losses.dim() == 2:
            alive, weights = alive[:, None], weights[:, None]
            alive = alive if mask is None else alive & mask
        summed = torch.where(alive, losses * weights, 0.0).sum()
        divisor = upload(self.denominator, losses.device).to(summed)
        divisor = divisor.clamp(min=torch.finfo(summed.dtype).tiny)
        loss = summed / divisor * self.factor
        return loss + torch.nan if self.undefined else loss

    def _check(self, losses: Tensor, mask: Tensor | None) -> None:
        rows, shape = self.weights.shape[0], tuple(losses.shape)
        if shape[:1] != (rows,) or len(shape) > 2:
            raise ValueError(
                f"weighted_mean: losses must be one per row ({rows},) or per token ({rows}, T), "
                f"got shape {shape}. Compute the loss with reduction='none'."
            )
        if len(shape) == 2 and self.counts is None:
            raise ValueError(
                f"weighted_mean: losses must be one per row ({rows},) where rows have no labelled "
                f"tokens, got shape {shape}. Reduce each row first: .mean(dim=1)."
            )
        if len(shape) == 2 and self.width not in (None, shape[1]):
            raise ValueError(
                f"weighted_mean: losses must be those of the {self.width} tokens that a causal "
                f"language model predicts, got shape {shape}. Use onlinesel.token_losses(logits, "
                "labels), or one mean loss a row where labels are not shifted."
            )
        if len(shape) == 2 and mask is not None and self.counts is not None:
            alive = (self.weights > 0).cpu()
            if not torch.equal(mask.sum(dim=1).cpu()[alive], self.counts.cpu()[alive]):
                raise ValueError(
                    f"weighted_mean: mask must mark the labelled tokens, {self.counts.tolist()} "
                    f"of the rows, got {mask.sum(dim=1).tolist()}. Pass labels[:, 1:] != -100."
                )

    def _row_means(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        if losses.dim() == 1:
            return losses
        assert self.counts is not None
        kept = losses if mask is None else torch.where(mask, losses, 0.0)
        return kept.sum(dim=1) / upload(self.counts, losses.device).to(losses)


_at_hand: ContextVar[Weighing | None] = ContextVar("onlinesel_weighing", default=None)


def hand_over(weighing: Weighing | None) -> None:
    """Make a micro-batch's weights those that :func:`weighted_mean` finds; None takes them away.

    Hosts whose users write the loss themselves call it around each training step.
    """
    _at_hand.set(weighing)


def weighted_mean(
    losses: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "tokens",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Return the weighted mean loss ``sum_i w_i sum_t loss_it / D`` of one batch.

    Without ``weights``, a training step that onlinesel has planned (Lightning) uses the weights
    and the denominator of its micro-batch; anywhere else, in validation say, every row counts 1.

    Args:
        losses: ``(N, T)`` loss of every token, or ``(N,)`` mean loss of every row.
        mask: ``(N, T)`` True where the token is labelled. Needed with token losses, except in a
            planned step, where the losses of other tokens must then be 0.
        weights: ``(N,)`` row weights >= 0; rows of weight 0 contribute exactly nothing, even if
            their loss is not finite.
        normalize: ``"tokens"``: ``D = sum_i w_i n_i``. ``"samples"``: ``D = sum_i w_i`` over
            per-row means; ``"rows"``: the number of rows of weight above 0, over per-row means.
            Rows without tokens count as one token. A planned step has its own.
        denominator: ``D``, where the batch is only a part of the step (other micro-batches or
            ranks); by default this batch's own.

    Returns:
        Scalar, differentiable; 0 if nothing has weight.

    Raises:
        ValueError: Unknown ``normalize``, token losses without a mask, or losses of another shape.

    Example:
        >>> import torch
        >>> loss = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> weighted_mean(loss, mask, torch.tensor([1.0, 0.0])).item()
        2.0
        >>> weighted_mean(torch.tensor([1.0, 5.0])).item()
        3.0
    """
    weighing = _at_hand.get()
    if weights is None and weighing is not None:
        return weighing(losses, mask)
    if normalize not in ("tokens", "samples", "rows"):
        raise ValueError(
            f"weighted_mean: normalize must be 'tokens', 'samples' or 'rows', got {normalize!r}. "
            "Use 'tokens' for the mean over labelled tokens."
        )
    if losses.dim() == 2 and mask is None:
        raise ValueError(
            "weighted_mean: mask must be given with token losses, got None. Pass the (N, T) mask "
            "of labelled tokens, or one loss a row."
        )
    if weights is None:
        weights = torch.ones(losses.shape[0], device=losses.device)
    counts = None if mask is None else mask.sum(dim=1)
    if denominator is None:
        denominator = total_weight(weights.to(losses.device), counts, normalize)
    divisor = torch.as_tensor(denominator)
    return Weighing(weights, counts, divisor, normalize)(losses, mask)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every token of a causal language model, 0 where there is no label.

    Args:
        logits: ``(N, T, V)``; position ``t`` predicts token ``t + 1``.
        labels: ``(N, T)`` int64, -100 where no loss is taken.

    Returns:
        ``(N, T - 1)`` float32, in nats, differentiable.

    Example:
        >>> import torch
        >>> token_losses(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]])).tolist()
        [[0.6931471824645996, 0.0]]
    """
    targets = labels[:, 1:].to(logits.device)
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape)


def total_weight(weights: Tensor, counts: Tensor | None, normalize: Normalize) -> Tensor:
    """Return ``D`` of some rows: ``sum_i w_i n_i``; ``sum_i w_i`` or 1 each, if it has a token.

    Args:
        weights: ``(N,)``.
        counts: ``(N,)`` labelled tokens, or None where each row is one item.
        normalize: ``"tokens"``, ``"samples"`` or ``"rows"``.

    Returns:
        Scalar, float64.

    Example:
        >>> import torch
        >>> weights, counts = torch.tensor([1.0, 2.0]), torch.tensor([3, 0])
        >>> [total_weight(weights, counts, n).item() for n in ("tokens", "samples", "rows")]
        [3.0, 1.0, 1.0]
    """
    if normalize == "rows":
        weights = (weights > 0).float()
    if counts is None:
        return weights.double().sum()
    per_row = counts if normalize == "tokens" else counts > 0
    return (weights.double() * per_row).sum()
