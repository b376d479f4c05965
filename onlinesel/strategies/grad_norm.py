"""GradNorm: train on the rows whose gradient is largest, without computing any gradient.

Idea: a row's pull on the model is bounded by the error of its predictions, which a forward shows.
``mode="top"`` keeps the largest; ``mode="unbiased"`` draws rows in proportion and divides by the
odds, which leaves the expected gradient alone and lowers its variance.

Paper: Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance
Sampling" (arXiv:1803.00942) for ``"grad_norm"`` and for the draw; Paul et al., "Deep Learning on a
Data Diet" (arXiv:2107.07075) for ``"el2n"``.

Formula: with ``e_t = ||softmax(z_t) - onehot(y_t)||_2`` over the ``n`` labelled tokens of a row,
``g = sqrt(sum_t e_t^2) / n`` (``"grad_norm"``) or ``g = sum_t e_t / n`` (``"el2n"``). Top:
``w_i = 1`` for the ``keep`` largest. Unbiased: ``p_i = (1 - floor) g_i / sum g + floor / N`` over
the ``N`` usable rows; with ``c_i`` the counts of ``keep`` draws with replacement,
``w_i = c_i / (keep p_i)``, so that ``E[w_i] = 1`` for every row.

To be exact, ``sum_i w_i x_i / N`` is unbiased for the mean of any ``x`` over the candidates. The
loss contract divides by ``D = sum_i w_i`` instead (over rows, ``normalize="samples"``), which makes
the step a ratio estimator: consistent, with a bias of order ``1 / keep``. A row drawn twice trains
once with twice the weight, so fewer than ``keep`` distinct rows may train.

Cost: one forward without gradient over the candidates. No memory.

When it loses: top: noise and outliers have the largest gradients. ``"grad_norm"`` falls with the
length as ``1 / sqrt(n)`` and so prefers short rows; ``"el2n"`` does not. Unbiased: when the bound
does not follow the true norm, the variance grows; ``floor`` bounds every weight by ``N / (floor
keep)`` a draw.

If nothing qualifies: rows whose signal is not finite are never kept, and in unbiased mode not
counted in ``N``; if that is all of them, every weight is 0. All signals 0: the draw is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import draw_rows, top_rows

__all__ = ["GradNorm", "importance_probability", "importance_weights"]

_SIGNALS = ("el2n", "grad_norm")
_MODES = ("top", "unbiased")


def importance_probability(norms: Tensor, ids: Tensor, floor: float) -> Tensor:
    """Return the odds of each row in proportion to its norm, mixed with uniform ones.

    Args:
        norms: ``(N,)``; negative ones count as 0, and non-finite ones get no odds at all.
        ids: ``(N,)`` int64; the sum is taken in their order, so that every sharding agrees on it.
        floor: Share of the uniform part, in [0, 1].

    Returns:
        ``(N,)`` float64 that sum to 1, or all 0 if no norm is finite.

    Example:
        >>> import torch
        >>> importance_probability(torch.tensor([3.0, 1.0]), torch.arange(2), 0.5).tolist()
        [0.625, 0.375]
    """
    usable = torch.isfinite(norms)
    size = torch.where(usable, norms.double().clamp(min=0), 0.0)
    even = usable.double() / usable.sum().clamp(min=1)
    total = size[ids.argsort(stable=True)].sum()
    if total <= 0:
        return even
    return (1 - floor) * size / total + floor * even


def importance_weights(
    probabilities: Tensor, draws: int, ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw rows with replacement and weigh them by the inverse of their odds.

    Args:
        probabilities: ``(N,)`` odds that sum to 1, or all 0.
        draws: Number of draws.
        ids: ``(N,)`` int64.
        generator: CPU generator.

    Returns:
        ``(N,)`` float64 weights whose expectation is 1 wherever the odds are positive.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> importance_weights(torch.tensor([0.5, 0.5, 0.0]), 2, torch.arange(3), g).tolist()
        [1.0, 1.0, 0.0]
    """
    if not bool((probabilities > 0).any()):
        return torch.zeros_like(probabilities)
    counts = draw_rows(probabilities, draws, ids, generator)
    return torch.where(counts > 0, counts / (draws * probabilities), 0.0)


@dataclass(frozen=True)
class GradNorm(Strategy):
    """Keep or draw rows by a bound of their gradient norm; see the module for the method card.

    Args:
        signal: ``"grad_norm"`` or ``"el2n"``.
        mode: ``"top"`` keeps the largest; ``"unbiased"`` draws and corrects, and normalises the
            loss over rows instead of tokens.
        floor: Uniform share of the odds in unbiased mode, in [0, 1].

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import GradNorm
        >>> signals = Signals(el2n=torch.tensor([0.1, 1.2, 0.7]))
        >>> Selector(GradNorm(signal="el2n")).select(signals, keep=2).rows.tolist()
        [1, 2]
    """

    signal: str = "grad_norm"
    mode: str = "top"
    floor: float = 0.1

    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)

    def __post_init__(self) -> None:
        for name, allowed in (("signal", _SIGNALS), ("mode", _MODES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"GradNorm: {name} must be one of {', '.join(allowed)}, got {value!r}. "
                    f"Leave it out for {getattr(GradNorm, name)!r}; help(GradNorm) tells them "
                    "apart."
                )
        if not 0 <= self.floor <= 1:
            raise ValueError(
                f"GradNorm: floor must be in [0, 1], got {self.floor}. "
                "Use 0.1, or 0 for odds in proportion to the norm alone."
            )
        object.__setattr__(self, "needs", (self.signal,))
        object.__setattr__(self, "normalize", "tokens" if self.mode == "top" else "samples")
        object.__setattr__(self, "drops_only", self.mode == "top")

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Keep the ``keep`` largest norms, or draw ``keep`` times."""
        norms, ids = signals.require(self, self.signal), signals.row_ids()
        if self.mode == "top":
            return Selection(top_rows(norms, keep, ids), norms), state
        chance = importance_probability(norms, ids, self.floor)
        return Selection(importance_weights(chance, keep, ids, generator), norms), state
