"""The mixtures under contract: one row each; adding a mixture means adding its row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onlinesel.mixing import ODM, DoReMi, FixedMixture, Mixture

DOMAINS = 4


@dataclass(frozen=True)
class Case:
    """What the contract may expect of a mixture.

    Attributes:
        build: Constructs it; where it takes one setting per domain, from the numbers given.
        adapts: Losses move its proportions.
    """

    build: Callable[[Sequence[float]], Mixture]
    adapts: bool = True


CASES: dict[str, Case] = {
    "DoReMi": Case(lambda numbers: DoReMi()),
    "DoReMi-initial": Case(lambda numbers: DoReMi(initial=numbers, eta=0.3, smoothing=0.01)),
    "DoReMi-paper": Case(lambda numbers: DoReMi.paper()),
    "DoReMi-reference": Case(lambda numbers: DoReMi(reference=numbers)),
    "FixedMixture-numbers": Case(lambda numbers: FixedMixture(numbers), adapts=False),
    "FixedMixture-size": Case(lambda numbers: FixedMixture(temperature=3.0), adapts=False),
    "FixedMixture-uniform": Case(lambda numbers: FixedMixture("uniform"), adapts=False),
    "ODM": Case(lambda numbers: ODM()),
    "ODM-warmup": Case(lambda numbers: ODM(decay=0.5, warmup=5, initial=numbers)),
}
