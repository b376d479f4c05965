"""The parts for reinforcement learning under contract: one row each.

Adding a method means its own file, one import here, and its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel.rl.drpo import DRPO
from onlinesel.rl.gates import PassRateBand, ZeroVariance
from onlinesel.rl.hapo import HAPO
from onlinesel.rl.max_variance import MaxVariance
from onlinesel.rl.one_sided import OneSided
from onlinesel.rl.prompts import PromptPool
from onlinesel.rl.shared_difficulty import SharedDifficulty
from onlinesel.rl.thompson import InformativeProbability, Thompson
from onlinesel.rl.token_average import TokenAverage
from onlinesel.rl.top_entropy import TopEntropy
from onlinesel.rl.uniform_prompts import GRESO, UniformPrompts

PROMPTS = 30
TRIALS = 8


@dataclass(frozen=True)
class Case:
    """What the contract may expect of a part.

    Attributes:
        kind: ``"gate"`` gives whole groups weight or none, ``"rollouts"`` chooses within groups,
            ``"prompts"`` proposes problems, ``"advantages"`` turns rewards into advantages,
            ``"tokens"`` weighs the tokens of completions.
        build: Constructs it.
        believes: A sampler that predicts pass rates.
    """

    kind: str
    build: Callable[[], Any]
    believes: bool = False


CASES: dict[str, Case] = {
    "DRPO": Case("advantages", DRPO),
    "GRESO": Case("prompts", GRESO),
    "HAPO": Case("tokens", HAPO),
    "HAPO-paper": Case("tokens", HAPO.paper),
    "HAPO-released": Case("tokens", HAPO.released),
    "InformativeProbability": Case("prompts", InformativeProbability, believes=True),
    "InformativeProbability-all": Case(
        "prompts", lambda: InformativeProbability(candidates=None, floor=0.0), believes=True
    ),
    "MaxVariance": Case("rollouts", lambda: MaxVariance(2)),
    "OneSided": Case("advantages", OneSided),
    "PassRateBand": Case("gate", PassRateBand),
    "PassRateBand-annealed": Case("gate", lambda: PassRateBand(0.3, 0.6, anneal=100)),
    "PassRateBand-easy": Case("gate", lambda: PassRateBand(0.25, 1.0)),
    "PassRateBand-exclusive": Case("gate", lambda: PassRateBand(0.25, 0.75, inclusive=False)),
    "PassRateBand-hard": Case("gate", lambda: PassRateBand(0.0, 0.5)),
    "SharedDifficulty": Case("prompts", lambda: SharedDifficulty(components=2), believes=True),
    "SharedDifficulty-all": Case(
        "prompts",
        lambda: SharedDifficulty(candidates=None, floor=0.0, half_life=None, forgetting=1.0),
        believes=True,
    ),
    "Thompson": Case("prompts", Thompson, believes=True),
    "Thompson-all": Case("prompts", lambda: Thompson(candidates=None, floor=0.0), believes=True),
    "TokenAverage": Case("advantages", TokenAverage),
    "TokenAverage-unscaled": Case("advantages", lambda: TokenAverage(scale=False)),
    "TopEntropy": Case("tokens", TopEntropy),
    "UniformPrompts": Case("prompts", UniformPrompts),
    "ZeroVariance": Case("gate", ZeroVariance),
    "ZeroVariance-tolerant": Case("gate", lambda: ZeroVariance(tolerance=1e-6)),
}


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    """Parametrise over the parts of some kinds."""
    chosen = {name: case for name, case in CASES.items() if case.kind in kinds}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def make_features(prompts: int = PROMPTS) -> Tensor:
    """Return three features of every problem; the first is what its difficulty depends on."""
    return torch.randn(prompts, 3, generator=torch.Generator().manual_seed(1))


def make_pool(case: Case, seed: int = 0, prompts: int = PROMPTS) -> PromptPool:
    """Return a pool of problems that nothing is known of."""
    return PromptPool(
        case.build(), prompts, trials=TRIALS, seed=seed, features=make_features(prompts)
    )
