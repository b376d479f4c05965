"""Reinforcement learning: which problems to roll out, which groups train, what each token counts.

Every method carries its card: idea, source, formula, cost, when it loses.

- gates, after the rollout: :class:`ZeroVariance`, :class:`PassRateBand`; :class:`Refill` says how a
  batch that they left short is filled, :class:`MaxVariance` which completions of a group train;
- prompt samplers, before it: :class:`UniformPrompts`, :class:`GRESO`, :class:`Thompson`,
  :class:`InformativeProbability`, :class:`SharedDifficulty`;
- advantages: :class:`TokenAverage`, :class:`DRPO`, :class:`OneSided`;
- tokens: :class:`HAPO`, :class:`TopEntropy`, and :class:`AdaptiveTemperature` while sampling;
- tokens of preference pairs (DPO): :class:`TARS`.
"""

from onlinesel.rl.drpo import DRPO
from onlinesel.rl.gates import PassRateBand, ZeroVariance
from onlinesel.rl.hapo import HAPO
from onlinesel.rl.max_variance import MaxVariance
from onlinesel.rl.one_sided import OneSided
from onlinesel.rl.preference import TARS, PreferenceTerms, PreferenceTokens, PreferenceWeights
from onlinesel.rl.prompts import PromptPool, PromptSampler
from onlinesel.rl.refill import Refill
from onlinesel.rl.shared_difficulty import SharedDifficulty
from onlinesel.rl.temperature import AdaptiveTemperature
from onlinesel.rl.thompson import InformativeProbability, Thompson
from onlinesel.rl.token_average import TokenAverage
from onlinesel.rl.top_entropy import TopEntropy
from onlinesel.rl.types import Advantages, Rollouts, TokenSignals, TokenTerms, TokenWeights
from onlinesel.rl.uniform_prompts import GRESO, UniformPrompts

__all__ = [
    "DRPO",
    "GRESO",
    "HAPO",
    "TARS",
    "AdaptiveTemperature",
    "Advantages",
    "InformativeProbability",
    "MaxVariance",
    "OneSided",
    "PassRateBand",
    "PreferenceTerms",
    "PreferenceTokens",
    "PreferenceWeights",
    "PromptPool",
    "PromptSampler",
    "Refill",
    "Rollouts",
    "SharedDifficulty",
    "Thompson",
    "TokenAverage",
    "TokenSignals",
    "TokenTerms",
    "TokenWeights",
    "TopEntropy",
    "UniformPrompts",
    "ZeroVariance",
]
