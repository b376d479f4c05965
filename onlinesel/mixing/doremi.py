"""DoReMi: more of the domains whose loss is furthest above a reference model's.

Idea: a domain is worth more draws while the model is worse on it than a reference model of its
kind. The reference tells what can be learnt at all, so that noise is not drawn for its high loss.

Paper: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining"
(arXiv:2305.10429).

Formula: with the excess of domain i in a step, ``lambda_i = mean over its rows of max(loss -
reference_loss, 0)``, each step does ``a' = a * exp(eta lambda) / sum_j a_j exp(eta lambda_j)`` and
``a <- (1 - smoothing) a' + smoothing / K``. A domain without a row in the step keeps its last
excess, as in the released code, and 0 before its first. With one reference number a domain
(``reference``) the excess is ``max(mean loss - number, 0)``: a spread of rows around the number is
no excess.

Where this differs from the paper: the paper trains a small proxy model in which ``a`` weighs the
loss of evenly drawn domains, averages ``a`` over the steps, and draws with that average for a large
model. Here ``a`` is the proportion in which the domains of this very run are drawn from now on;
that online use is ours, and no result of the paper speaks for it. The paper's use is
:meth:`DoReMi.average` of a proxy run, given to :class:`onlinesel.mixing.FixedMixture`. The
excess is clipped by row and not by token, and is a mean of rows and not of tokens. Evenly drawn
domains are seen at every step, whatever their weight; ours are not, so ``smoothing`` is 0.05 here:
with the paper's 1e-3 (:meth:`DoReMi.paper`) and four domains, one at the floor is drawn once in
4,000 rows, and its excess stays what it was for as long.

Cost: the reference loss of every observed row, once, or K numbers; O(N + K) a step.

When it loses: a poor reference: where it is far better than the model can get, its domains take
everything, at ``eta = 1`` within some steps (an excess of 1 nat multiplies a ratio by 2.7 a step).
Where the model is nowhere worse than the reference, nothing moves. Losses of rows that a strategy
chose for their loss are higher than their domain's.

If nothing is known: the proportions stay at ``initial`` until the first observation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.mixing.types import (
    Mixture,
    check_above_zero,
    domain_means,
    normalized,
    start_proportions,
)
from onlinesel.types import State

__all__ = ["DoReMi", "exponentiated_step"]


def exponentiated_step(weights: Tensor, excess: Tensor, eta: float, smoothing: float) -> Tensor:
    """Return the domain weights after one exponentiated gradient step.

    Args:
        weights: ``(K,)`` float64, positive, sum to 1.
        excess: ``(K,)`` float64.
        eta: Step size.
        smoothing: Share of the uniform distribution in the result.

    Example:
        >>> import torch
        >>> from onlinesel.mixing.doremi import exponentiated_step
        >>> excess = torch.tensor([2.0, 0.0], dtype=torch.float64).log()
        >>> start = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> exponentiated_step(start, excess.clamp(min=0), 1.0, 0.1).tolist()
        [0.65, 0.35]
    """
    moved = torch.softmax(weights.log() + eta * excess, dim=0)
    return (1 - smoothing) * moved + smoothing / weights.shape[0]


@dataclass(frozen=True)
class DoReMi(Mixture):
    """Draw domains by their loss above a reference; see the module for the method card.

    Args:
        reference: One reference loss per domain, in ascending order of the domains' numbers; None
            for a reference loss with every row (``reference_loss`` of ``observe``).
        eta: Step size, above 0.
        smoothing: Share of the uniform distribution, in (0, 1]; no domain falls below
            ``smoothing / K``.
        initial: First proportions: positive numbers, ``"uniform"`` (the paper's) or ``"size"``.

    Raises:
        ValueError: An argument that is none of these; from ``init``, another number of references
            than of domains; from ``observe``, no reference at all.

    Example:
        >>> import torch
        >>> from onlinesel.mixing import DoReMi
        >>> mixture = DoReMi(reference=(1.0, 2.0))
        >>> state = mixture.init(torch.tensor([50, 50]))
        >>> state = mixture.observe(torch.tensor([0, 1]), torch.tensor([1.5, 1.5]), state)
        >>> [round(share, 4) for share in mixture.proportions(state).tolist()]
        [0.6163, 0.3837]
    """

    reference: Sequence[float] | None = None
    eta: float = 1.0
    smoothing: float = 0.05
    initial: Sequence[float] | str = "uniform"

    needs: ClassVar[tuple[str, ...]] = ("loss", "reference_loss")

    def __post_init__(self) -> None:
        if self.reference is not None:
            object.__setattr__(self, "reference", tuple(float(x) for x in self.reference))
            object.__setattr__(self, "needs", ("loss",))
        if not all(math.isfinite(x) for x in self.reference or ()):
            raise ValueError(
                f"DoReMi: reference must be finite losses, got {self.reference}. "
                "Give the mean loss of a reference model on each domain."
            )
        check_above_zero(self, "eta", self.eta, "Use the paper's 1.")
        if not 0 < self.smoothing <= 1:
            raise ValueError(
                f"DoReMi: smoothing must be in (0, 1], got {self.smoothing}. "
                "Use 0.05, or the paper's 1e-3."
            )
        why = "A share of 0 cannot be multiplied up again"
        object.__setattr__(self, "initial", normalized(self, "initial", self.initial, no_zero=why))

    @classmethod
    def paper(cls, reference: Sequence[float] | None = None) -> DoReMi:
        """Return the settings of the paper's proxy run."""
        return cls(reference, eta=1.0, smoothing=1e-3)

    def init(self, sizes: Tensor) -> State:
        """Return the first proportions, without any excess."""
        count = len(sizes)
        if self.reference is not None and len(self.reference) != count:
            raise ValueError(
                f"DoReMi: reference must be one loss per domain ({count}), got "
                f"{len(self.reference)}. Give them in ascending order of the domains' numbers."
            )
        return {
            "weights": start_proportions(self, "initial", self.initial, sizes),
            "excess": torch.zeros(count, dtype=torch.float64),
            "total": torch.zeros(count, dtype=torch.float64),
            "steps": torch.tensor(0),
        }

    def proportions(self, state: State) -> Tensor:
        """Return the weights after the last step."""
        return state["weights"]

    def average(self, state: State) -> Tensor:
        """Return the mean of the weights over all steps, the paper's result: ``(K,)`` float64."""
        steps = int(state["steps"])
        return state["total"] / steps if steps else state["weights"]

    def observe(
        self,
        domain: Tensor,
        loss: Tensor,
        state: State,
        *,
        reference_loss: Tensor | None = None,
    ) -> State:
        """Multiply the weights by the exponential of the excess."""
        means, seen = self._excess(domain, loss, len(state["weights"]), reference_loss)
        if not bool(seen.any()):
            return state
        excess = torch.where(seen, means, state["excess"])
        weights = exponentiated_step(state["weights"], excess, self.eta, self.smoothing)
        return {
            "weights": weights,
            "excess": excess,
            "total": state["total"] + weights,
            "steps": state["steps"] + 1,
        }

    def _excess(
        self, domain: Tensor, loss: Tensor, count: int, reference_loss: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            means, seen = domain_means(domain, loss, count)
            return (means - torch.tensor(self.reference, dtype=torch.float64)).clamp(min=0), seen
        if reference_loss is None:
            raise ValueError(
                "DoReMi: reference_loss must come with every row where reference is None, got "
                "None. Pass one number per domain as reference, or observe reference losses."
            )
        above = loss.double() - reference_loss.double()
        # A clip would turn an infinite excess, or a loss of minus infinity, into a finite one.
        above = torch.where(torch.isfinite(above), above.clamp(min=0), float("nan"))
        return domain_means(domain, above, count)
