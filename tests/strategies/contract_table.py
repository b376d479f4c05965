"""The strategies under contract: one row each; adding a method means adding its row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from onlinesel import Signals, Strategy
from onlinesel.strategies import (
    RS2,
    UDS,
    GradNorm,
    InfoBatch,
    LossReweight,
    RHOLoss,
    SelectiveBackprop,
    TopLoss,
    Uniform,
)

CANDIDATES = 12


@dataclass(frozen=True)
class Case:
    """What the contract may expect of a strategy.

    Attributes:
        build: Constructs it.
        chooses: Exactly ``keep`` of the usable rows get weight.
        random: Draws from the generator.
        scored: Reads float signals, so that rows can be unusable.
    """

    build: Callable[[], Strategy]
    chooses: bool = True
    random: bool = False
    scored: bool = True


CASES: dict[str, Case] = {
    "GradNorm": Case(GradNorm),
    "GradNorm-el2n": Case(lambda: GradNorm(signal="el2n")),
    "GradNorm-unbiased": Case(lambda: GradNorm(mode="unbiased"), chooses=False, random=True),
    "InfoBatch": Case(InfoBatch, chooses=False, random=True, scored=False),
    "LossReweight": Case(LossReweight, chooses=False),
    "LossReweight-paper": Case(LossReweight.paper, chooses=False),
    "RHOLoss": Case(RHOLoss),
    "RS2": Case(RS2, chooses=False, scored=False),
    "SelectiveBackprop": Case(lambda: SelectiveBackprop(capacity=20), random=True),
    "SelectiveBackprop-paper": Case(
        lambda: SelectiveBackprop(exact=False), chooses=False, random=True
    ),
    "TopLoss": Case(TopLoss),
    "TopLoss-lowest": Case(lambda: TopLoss(lowest=True)),
    "UDS": Case(lambda: UDS(capacity=7)),
    "UDS-greedy": Case(lambda: UDS(capacity=7, greedy=True)),
    "UDS-norm": Case(lambda: UDS(alpha=0.0)),
    "Uniform": Case(Uniform, random=True, scored=False),
}


def make_signals(seed: int, size: int = CANDIDATES, pool: int = 40) -> Signals:
    """Return every signal of some candidates, whose ids are drawn from a pool so that they recur.

    Losses are multiples of 1/4: several are equal, so that the order of equal rows is tested too.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(pool, generator=generator)[:size] + 2**40

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    return Signals(
        ids=ids,
        loss=(some(size) * 16).round() / 4,
        reference_loss=(some(size) * 8).round() / 4,
        entropy=some(size),
        el2n=some(size),
        grad_norm=(some(size) * 8).round() / 8,
        nuclear_norm=some(size) * 10,
        embedding=some(size, 5),
        reward=some(size).round(),
        group=ids % 3,
        tokens=torch.randint(1, 9, (size,), generator=generator),
    )
