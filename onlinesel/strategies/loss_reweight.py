"""LossReweight: all rows train, each as much as its loss says.

Idea: rows of low loss are done with; down-weight them smoothly instead of dropping rows.

Paper: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
Pretraining" (arXiv:2502.06733).

Formula: over the ``M`` usable rows of a decision, ``h_i = (2 l_i - upper - lower) / max(upper -
lower, 1e-6)`` in [-1, 1]; ``linupper``: ``f = min(h + 1, 1)``, ``quadratic``: ``f = 1 - h^2``,
``extremes``: ``f = |h|``, ``linear``: ``f = (h + 1) / 2``; ``w = M softmax(f / temperature)``. With
``D = sum_i w_i`` over per-row means (``normalize="samples"``) the loss is the paper's ``sum_i
softmax_i l_i``. Its warm-up of plain loss is ``When(LossReweight(), start=1000)``.

Where this differs from the paper, whose behaviour is :meth:`LossReweight.paper`: the paper's
``lower`` and ``upper`` are the minimum and the maximum, so that one outlier pushes all other rows
to -1 and takes most of the weight. By default they are inner quantiles, which leave out at least
one row at each end, with ``h`` clamped; no row gets more than ``cap`` times the uniform weight (the
paper's theory assumes 2), what is cut off is spread in proportion; and fewer than ``min_rows``
rows are weighted equally, since the range of a handful of losses means nothing (fewer candidates
than that are not scored at all).

The paper's README and its large-scale code divide as above. Its ``trainer.py`` also multiplies each
row by its share of the tokens, ``sum_i softmax_i (M n_i / sum_j n_j) l_i``, which is the same only
where rows are equally long. The host's ``normalize="tokens"`` weighs so, and divides by
``sum_i w_i n_i``; the release's value is that times ``sum_i w_i n_i / sum_i n_i``, a factor around
1 that moves with the batch and is left out here on purpose.

Cost: one forward without gradient over the rows, a third of a training step: the weights are
relative to all rows of the step, which the training forward of one micro-batch does not know. No
memory. Use ``candidates=1``: nothing is dropped.

When it loses: on noisy labels, which have large losses; with few rows a decision; late, when the
losses differ by noise alone and are stretched to [-1, 1] all the same.

If nothing qualifies: rows whose loss is not finite or that have no labelled token get weight 0
and do not count in the bounds; if that is all of them, every weight is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Normalize, Selection, Signals, State, Strategy

__all__ = ["LossReweight", "cap_weights", "loss_weights"]

_KINDS = ("linupper", "quadratic", "extremes", "linear")
_BOUNDS = ("minmax", "quantile")
_FLOOR = 1e-6


def _bounds(ordered: Tensor, quantiles: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return the losses that map to -1 and 1; the extremes where the quantiles coincide."""
    if quantiles is not None:
        lower = torch.quantile(ordered, quantiles[0], interpolation="higher")
        upper = torch.quantile(ordered, quantiles[1], interpolation="lower")
        if lower < upper:
            return lower, upper
    return ordered[0], ordered[-1]


def cap_weights(weights: Tensor, cap: float) -> Tensor:
    """Cut weights of mean 1 at ``cap``, spreading what is cut off in proportion to the others.

    Args:
        weights: ``(M,)`` ascending, positive, of mean 1.
        cap: At least 1.

    Returns:
        ``(M,)`` of mean 1.

    Example:
        >>> import torch
        >>> cap_weights(torch.tensor([0.5, 0.5, 2.0]), 1.5).tolist()
        [0.75, 0.75, 1.5]
    """
    size = weights.shape[0]
    above = torch.arange(size - 1, -1, -1, dtype=weights.dtype)
    factor = (size - cap * above) / weights.cumsum(0)  # of the others, if all above are cut
    fits = factor * weights <= cap
    # Cut as few rows as possible: the highest row that fits once all above it are at the cap.
    last = int(fits.nonzero().max()) if bool(fits.any()) else 0
    return torch.where(torch.arange(size) <= last, factor[last] * weights, cap).clamp(max=cap)


def loss_weights(
    loss: Tensor,
    *,
    kind: str = "linupper",
    temperature: float = 0.4,
    quantiles: tuple[float, float] | None = None,
    cap: float | None = None,
) -> Tensor:
    """Weigh rows by where their loss stands among the others.

    Args:
        loss: ``(N,)``; rows that are not finite get weight 0 and count for nothing.
        kind: ``"linupper"``, ``"quadratic"``, ``"extremes"`` or ``"linear"``.
        temperature: Large values approach equal weights.
        quantiles: Which losses map to -1 and 1; None takes the smallest and the largest.
        cap: Largest weight, in units of the mean weight.

    Returns:
        ``(N,)`` float64 of mean 1 over the finite rows.

    Example:
        >>> import torch
        >>> weights = loss_weights(torch.tensor([1.0, 2.0, 3.0]))
        >>> [round(weight, 3) for weight in weights.tolist()]
        [0.118, 1.441, 1.441]
    """
    result = torch.zeros_like(loss, dtype=torch.float64)
    rows = torch.isfinite(loss).nonzero().flatten()
    if not rows.numel():
        return result
    # Sorted by value: sums do not depend on the order of the rows, and cap_weights needs it.
    ordered, order = loss[rows].double().sort()
    lower, upper = _bounds(ordered, quantiles)
    h = ((2 * ordered - upper - lower) / (upper - lower).clamp(min=_FLOOR)).clamp(-1, 1)
    if kind == "linupper":
        f = (h + 1).clamp(max=1)
    else:
        f = {"quadratic": 1 - h.square(), "extremes": h.abs(), "linear": (h + 1) / 2}[kind]
    # exp(-80) is still positive in float32: a weight of 0 would mean that the row is dropped.
    weights = ((f - f.max()) / temperature).clamp(min=-80).softmax(0) * rows.numel()
    if cap is not None:
        by_weight = weights.argsort(stable=True)
        weights = weights.index_put((by_weight,), cap_weights(weights[by_weight], cap))
    result[rows[order]] = weights
    return result


@dataclass(frozen=True)
class LossReweight(Strategy):
    """Weigh every row by its loss; see the module for the method card.

    Args:
        kind: ``"linupper"``, ``"quadratic"``, ``"extremes"`` or ``"linear"``.
        temperature: Large values approach equal weights.
        bounds: ``"quantile"``, or ``"minmax"`` as in the paper.
        quantiles: For ``bounds="quantile"``.
        cap: Largest weight, in units of the mean weight; None for no limit, as in the paper.
        min_rows: With fewer usable rows all weights are equal, and with fewer candidates no losses
            are computed at all.

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import LossReweight
        >>> weights = Selector(LossReweight()).select(Signals(loss=torch.arange(9.0))).weights
        >>> bool(weights[0] < weights[8]), weights.mean().item()
        (True, 1.0)
    """

    kind: str = "linupper"
    temperature: float = 0.4
    bounds: str = "quantile"
    quantiles: tuple[float, float] = (0.05, 0.95)
    cap: float | None = 2.0
    min_rows: int = 8

    needs: ClassVar[tuple[str, ...]] = ("loss",)
    normalize: ClassVar[Normalize] = "samples"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        _check(self)

    @classmethod
    def paper(cls, kind: str = "linupper", temperature: float = 0.4) -> LossReweight:
        """Return the method as published: extremes as bounds, no cap, any number of rows."""
        return cls(kind, temperature, bounds="minmax", cap=None, min_rows=1)

    def needs_for(self, step: int, rows: int) -> tuple[str, ...]:
        """Return the loss, or nothing where there are too few rows to weigh."""
        return self.needs if rows >= self.min_rows else ()

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Weigh all candidates; ``keep`` plays no part."""
        if signals.loss is None and not self.needs_for(step, signals.size):
            trains = torch.ones(signals.size) if signals.tokens is None else signals.tokens > 0
            return Selection(trains.float()), state
        loss = signals.require(self, "loss")
        if signals.tokens is not None:
            loss = torch.where(signals.tokens > 0, loss, float("nan"))
        usable = torch.isfinite(loss)
        if int(usable.sum()) < self.min_rows:
            return Selection(usable.float(), loss), state
        quantiles = self.quantiles if self.bounds == "quantile" else None
        weights = loss_weights(
            loss, kind=self.kind, temperature=self.temperature, quantiles=quantiles, cap=self.cap
        )
        return Selection(weights, loss), state


def _check(method: LossReweight) -> None:
    """Refuse hyper-parameters that mean nothing."""
    for name, allowed in (("kind", _KINDS), ("bounds", _BOUNDS)):
        value = getattr(method, name)
        if value not in allowed:
            raise ValueError(
                f"LossReweight: {name} must be one of {', '.join(allowed)}, got {value!r}. "
                f"Leave it out for {getattr(LossReweight, name)!r}; help(LossReweight) tells "
                "them apart."
            )
    if not (math.isfinite(method.temperature) and method.temperature > 0):
        raise ValueError(
            f"LossReweight: temperature must be positive and finite, got {method.temperature}. "
            "Use 0.4, or Uniform() for equal weights."
        )
    if len(method.quantiles) != 2 or not 0 <= method.quantiles[0] < method.quantiles[1] <= 1:
        raise ValueError(
            f"LossReweight: quantiles must be two ascending shares, got {method.quantiles}. "
            "Use (0.05, 0.95)."
        )
    if method.cap is not None and not method.cap >= 1:
        raise ValueError(
            f"LossReweight: cap must be at least 1 or None, got {method.cap}. "
            "The mean weight is 1; use 2.0."
        )
    if method.min_rows < 1:
        raise ValueError(
            f"LossReweight: min_rows must be at least 1, got {method.min_rows}. Use 8."
        )
