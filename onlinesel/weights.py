"""Pure functions from scores to weights, and from weights to a loss."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "draw_rows",
    "effective_size",
    "order_by",
    "top_rows",
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
    best = order_by(scores, ids, largest=largest)[:keep]
    weights = torch.zeros(scores.shape[0], device=scores.device)
    weights[best] = 1.0
    return torch.where(torch.isfinite(scores), weights, 0.0)


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


def weighted_mean(
    token_loss: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    normalize: str = "tokens",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Return the weighted mean loss ``sum_i w_i sum_t loss_it / D`` of one batch.

    Args:
        token_loss: ``(N, T)`` loss of every token.
        mask: ``(N, T)`` True where the token is labelled.
        weights: ``(N,)`` row weights >= 0; rows of weight 0 contribute exactly nothing, even if
            their loss is not finite.
        normalize: ``"tokens"``: ``D = sum_i w_i n_i``. ``"samples"``: ``D = sum_i w_i`` over
            per-row means.
        denominator: ``D``, where the batch is only a part of the step (other micro-batches or
            ranks); by default this batch's own.

    Returns:
        Scalar, differentiable; 0 if nothing has weight.

    Raises:
        ValueError: Unknown ``normalize``.

    Example:
        >>> import torch
        >>> from onlinesel.weights import weighted_mean
        >>> loss = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> weighted_mean(loss, mask, torch.tensor([1.0, 1.0])).item()
        3.0
        >>> weighted_mean(loss, mask, torch.tensor([1.0, 1.0]), normalize="samples").item()
        3.5
    """
    if normalize not in ("tokens", "samples"):
        raise ValueError(
            f"weighted_mean: normalize must be 'tokens' or 'samples', got {normalize!r}. "
            "Use 'tokens' for the mean over labelled tokens."
        )
    # In bfloat16 the denominator alone would be off by up to 0.4 %.
    token_loss = token_loss.to(torch.promote_types(token_loss.dtype, torch.float32))
    weights = weights.to(token_loss)
    counts = mask.sum(dim=1)
    if normalize == "samples":
        weights = weights / counts.clamp(min=1)
        total = (weights * counts).sum()
    else:
        total = (weights * counts).sum()
    alive = mask & (weights > 0)[:, None]
    summed = torch.where(alive, token_loss * weights[:, None], 0.0).sum()
    if denominator is None:
        denominator = total
    divisor = torch.as_tensor(denominator).to(summed)
    return summed / divisor.clamp(min=torch.finfo(summed.dtype).tiny)
