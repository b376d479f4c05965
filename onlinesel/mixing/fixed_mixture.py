"""FixedMixture: domains in set proportions, whatever the losses say.

Idea: proportions chosen beforehand, by hand or from the sizes of the domains. A temperature lies
between the two natural choices, all rows alike and all domains alike.

Paper: none for set weights. The temperature over sizes: Arivazhagan et al., "Massively Multilingual
Neural Machine Translation in the Wild" (arXiv:1907.05019).

Formula: ``p_i = w_i^(1 / temperature) / sum_j w_j^(1 / temperature)`` with ``w`` the weights, the
numbers of rows (``"size"``) or ones (``"uniform"``). A temperature of 1 leaves the proportions as
they are; the larger it is, the closer they come to equal ones.

Cost: nothing a step.

When it loses: whenever the right proportions are not known beforehand, or change while the model
learns. Small domains with large shares come back often: at ``"uniform"`` a domain of 1 % of the
rows among four is repeated 25 times in an epoch.

If nothing is known: ``"size"`` is the data as it is, and ``"uniform"`` the stratified draw, which
published online mixtures often failed to beat (Chen et al., "Aioli", arXiv:2411.05735). Compare any
other mixture with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from onlinesel.mixing.types import Mixture, check_above_zero, normalized, start_proportions
from onlinesel.types import State

__all__ = ["FixedMixture", "tempered"]


def tempered(proportions: Tensor, temperature: float) -> Tensor:
    """Return proportions raised to ``1 / temperature``, normalised again.

    Args:
        proportions: ``(K,)`` >= 0, not all 0; a 0 stays 0.
        temperature: Above 0.

    Example:
        >>> import torch
        >>> from onlinesel.mixing.fixed_mixture import tempered
        >>> shares = tempered(torch.tensor([0.9, 0.1, 0.0]), 2.0)
        >>> [round(share, 4) for share in shares.tolist()]
        [0.75, 0.25, 0.0]
    """
    # Divided by the largest first: a small temperature must not send all of them to 0.
    raised = (proportions.double() / proportions.max()) ** (1 / temperature)
    return raised / raised.sum()


@dataclass(frozen=True)
class FixedMixture(Mixture):
    """Draw domains in set proportions; see the module for the method card.

    Args:
        weights: One number >= 0 per domain, in ascending order of the domains' numbers (0 leaves a
            domain out); ``"size"`` for the numbers of rows; ``"uniform"`` for equal shares.
        temperature: Above 0; larger is closer to equal shares.

    Raises:
        ValueError: An argument that is none of these; and from ``init``, another number of weights
            than of domains.

    Example:
        >>> import torch
        >>> from onlinesel.mixing import FixedMixture
        >>> mixture = FixedMixture("size", temperature=2.0)
        >>> shares = mixture.proportions(mixture.init(torch.tensor([900, 100])))
        >>> [round(share, 4) for share in shares.tolist()]
        [0.75, 0.25]
    """

    weights: Sequence[float] | str = "size"
    temperature: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", normalized(self, "weights", self.weights))
        check_above_zero(
            self, "temperature", self.temperature,
            "Use 1 for the weights as they are, and weights='uniform' for equal shares.",
        )  # fmt: skip

    def init(self, sizes: Tensor) -> State:
        """Return the proportions; they never change."""
        start = start_proportions(self, "weights", self.weights, sizes)
        return {"proportions": tempered(start, self.temperature)}

    def proportions(self, state: State) -> Tensor:
        """Return the set proportions."""
        return state["proportions"]

    def observe(
        self,
        domain: Tensor,
        loss: Tensor,
        state: State,
        *,
        reference_loss: Tensor | None = None,
    ) -> State:
        """Return the state as it is."""
        return state
