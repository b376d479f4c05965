"""The contract of a mixture: in which proportions the domains are drawn, and how losses move them.

A mixture is a frozen dataclass of its hyper-parameters with pure functions over a flat state, as a
strategy is. It knows domains by their place ``0 .. K - 1`` and no rows, ranks or loaders;
:class:`onlinesel.mixing.DomainSampler` is the stateful object around it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from onlinesel.types import State

__all__ = ["Mixture", "check_above_zero", "domain_means", "normalized", "start_proportions"]


class Mixture(ABC):
    """One way to set the proportions of domains.

    Attributes:
        needs: What :meth:`observe` reads about the rows of a step, by the names of
            :class:`onlinesel.Signals`: ``"loss"``, ``"reference_loss"``, or nothing. A host need
            not observe for a mixture that needs nothing.

    Example:
        A user's own mixture is a few lines and needs no registration:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from onlinesel.mixing import DomainSampler, Mixture
        >>> @dataclass(frozen=True)
        ... class HardestOnly(Mixture):
        ...     def init(self, sizes):
        ...         return {"loss": torch.zeros(len(sizes), dtype=torch.float64)}
        ...     def proportions(self, state):
        ...         hardest = state["loss"] == state["loss"].max()
        ...         return hardest.double() / hardest.sum()
        ...     def observe(self, domain, loss, state, *, reference_loss=None):
        ...         return {"loss": state["loss"].index_put((domain,), loss.double())}
        >>> sampler = DomainSampler(torch.tensor([0, 0, 1, 1]), HardestOnly(), seed=0)
        >>> sampler.observe(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]))
        >>> sampler.metrics()
        {'share/0': 0.0, 'share/1': 1.0}
    """

    needs: ClassVar[tuple[str, ...]] = ("loss",)

    @abstractmethod
    def init(self, sizes: Tensor) -> State:
        """Return the state before the first step.

        Args:
            sizes: ``(K,)`` int64, rows of each domain, at least 1; in ascending order of the
                domains' numbers.
        """

    @abstractmethod
    def proportions(self, state: State) -> Tensor:
        """Return the chance of each domain at the next draw: ``(K,)`` float64, sums to 1."""

    @abstractmethod
    def observe(
        self,
        domain: Tensor,
        loss: Tensor,
        state: State,
        *,
        reference_loss: Tensor | None = None,
    ) -> State:
        """Learn from the rows of one optimizer step; returns the new state.

        Rows with a loss that is not finite are ignored; if that is all of them, the state stays.

        Args:
            domain: ``(N,)`` int64, place of each row's domain, ``0 .. K - 1``.
            loss: ``(N,)`` float32, mean loss of each row.
            state: What :meth:`init` or the previous call returned. Not to be changed in place.
            reference_loss: ``(N,)`` float32, the same rows under a reference model.
        """


def domain_means(domain: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the finite values of each domain, and which domains have any.

    The sums are taken in the order of the values, so that they do not depend on the order of the
    rows, nor on how rows were dealt to ranks.

    Args:
        domain: ``(N,)`` int64 in ``0 .. count - 1``.
        values: ``(N,)`` floats.
        count: Number of domains ``K``.

    Returns:
        ``(K,)`` float64 means, 0 for a domain without a finite value, and ``(K,)`` bool.

    Example:
        >>> import torch
        >>> from onlinesel.mixing.types import domain_means
        >>> values = torch.tensor([1.0, 3.0, float("nan")])
        >>> means, seen = domain_means(torch.tensor([0, 0, 1]), values, 2)
        >>> means.tolist(), seen.tolist()
        ([2.0, 0.0], [True, False])
    """
    finite = torch.isfinite(values)
    ordered, order = values[finite].double().sort()
    domain = domain[finite][order]
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, domain, ordered)
    counts = torch.bincount(domain, minlength=count)
    return sums / counts.clamp(min=1), counts > 0


def check_above_zero(owner: object, name: str, value: float, remedy: str) -> None:
    """Refuse a number that is not finite and above 0.

    Args:
        owner: The mixture whose argument it is; its class names the error.
        name: Name of the argument.
        value: What the user gave.
        remedy: What to do instead.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{type(owner).__name__}: {name} must be finite and above 0, got {value}. {remedy}"
        )


def normalized(
    owner: object, name: str, weights: Sequence[float] | str, *, no_zero: str | None = None
) -> tuple[float, ...] | str:
    """Return weights as a tuple of floats, or one of the names ``"size"`` and ``"uniform"``.

    Args:
        owner: The mixture whose argument it is; its class names the error.
        name: Name of the argument.
        weights: What the user gave.
        no_zero: Why no domain may have a share of 0; None where one may.

    Raises:
        ValueError: Another name, or weights that are not finite, negative, all 0, or 0 where none
            may be.
    """
    who = type(owner).__name__
    if isinstance(weights, str):
        if weights not in ("size", "uniform"):
            raise ValueError(
                f"{who}: {name} must be 'size', 'uniform' or one number per domain, got "
                f"{weights!r}. Use 'size' for the proportions of the data."
            )
        return weights
    numbers = tuple(float(weight) for weight in weights)
    if not all(math.isfinite(x) and x >= 0 for x in numbers) or not sum(numbers) > 0:
        raise ValueError(
            f"{who}: {name} must be finite numbers >= 0 with a positive sum, got {numbers}. "
            "Give one weight per domain, in ascending order of the domains' numbers."
        )
    if no_zero is not None and min(numbers) == 0:
        raise ValueError(
            f"{who}: {name} must be positive numbers, got {numbers}. {no_zero}; leave the domain's "
            "rows out instead."
        )
    return numbers


def start_proportions(
    owner: object, name: str, weights: Sequence[float] | str, sizes: Tensor
) -> Tensor:
    """Return weights as proportions of the domains at hand: ``(K,)`` float64, sums to 1.

    Args:
        owner: The mixture whose argument it is.
        name: Name of the argument.
        weights: What :func:`normalized` returned.
        sizes: ``(K,)`` rows of each domain.

    Raises:
        ValueError: Another number of weights than of domains.
    """
    if isinstance(weights, str):
        raw = sizes.double() if weights == "size" else torch.ones(len(sizes), dtype=torch.float64)
    else:
        if len(weights) != len(sizes):
            raise ValueError(
                f"{type(owner).__name__}: {name} must be one number per domain ({len(sizes)}), "
                f"got {len(weights)}. Give them in ascending order of the domains' numbers."
            )
        raw = torch.tensor(weights, dtype=torch.float64)
    return raw / raw.sum()
