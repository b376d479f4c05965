"""AdaptiveTemperature: sample a little hotter where the policy is uncertain.

Idea: explore at the tokens at which answers part, and stay coherent at the others.

Paper: HAPO, Liu et al., "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every
Token's Nature" (arXiv:2509.16591), part 1.

Formula: with ``H`` the entropy of the next token under the unchanged logits and the statistics of
the previous generation batch (see :mod:`onlinesel.rl.hapo`), ``z = (log max(H, 1e-6) - pivot) /
(sigma + 1e-6)``. ``"clamped"``: ``T = base (1 + tau h)``, ``h`` in [-1, 1] being ``z`` over the
extreme on its side of 0; the authors' code, ``tau = 0.05``. ``"unbounded"``: ``T = base (1 + tau
z)``; the paper's text, ``tau = 0.1``. In the first generation ``T = base``.

Where this differs from the paper: ``T`` is at least ``lowest * base``, since ``z`` has no lower
end and a nearly certain token would get a temperature of 0 or below. The authors' code takes ``h``
without its sign, so that certain tokens are sampled hotter (``signed=False``).

Cost: an entropy of the next-token distribution at every step of the sampler, and a sampler that
takes a temperature for each row at each step.

When it loses: completions are drawn from another distribution than the one whose log-probabilities
the trainer takes as old: an off-policy shift that only an importance correction with the sampler's
own log-probabilities removes. Not for evaluation.

If nothing qualifies: without statistics, or for an entropy that is not finite, ``T = base``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.hapo import entropy_statistics, rescale, standardize

__all__ = ["AdaptiveTemperature", "adaptive_temperature"]

_RULES = ("clamped", "unbounded")
_FLOOR = 1e-6


def adaptive_temperature(
    entropy: Tensor,
    statistics: Mapping[str, Tensor] | None,
    base: float,
    *,
    tau: float = 0.05,
    rule: str = "clamped",
    lowest: float = 0.1,
    signed: bool = True,
) -> Tensor:
    """Return the temperature at which each row samples its next token.

    Args:
        entropy: ``(N,)`` of the next token, in nats, before any temperature or truncation.
        statistics: What :func:`~onlinesel.rl.hapo.entropy_statistics` said about the previous
            generation batch; None before there is one.
        base: Temperature of the run.
        tau: Strength.
        rule: ``"clamped"`` or ``"unbounded"``.
        lowest: Smallest temperature, in units of ``base``.
        signed: False takes the size of the normalised entropy.

    Returns:
        ``(N,)`` positive.

    Example:
        >>> import torch
        >>> said = entropy_statistics(torch.tensor([0.1, 1.0, 10.0]), rho=0.5)
        >>> hot = adaptive_temperature(torch.tensor([0.01, 1.0, 10.0]), said, 1.0)
        >>> [round(value, 3) for value in hot.tolist()]
        [0.95, 1.0, 1.05]
    """
    if statistics is None:
        return torch.full_like(entropy, base)
    change = standardize(entropy, statistics, floor=_FLOOR, margin=_FLOOR)
    if rule == "clamped":
        change = rescale(change, statistics)
    if not signed:
        change = change.abs()
    factor = (1 + tau * change).clamp(min=lowest)
    return base * torch.where(torch.isfinite(entropy), factor, 1.0)


@dataclass(frozen=True)
class AdaptiveTemperature:
    """Let the temperature follow the entropy; see the module for the method card.

    Args:
        tau: Strength; 0 samples at the base temperature.
        rule: ``"clamped"`` or ``"unbounded"``.
        lowest: Smallest temperature, in units of the base temperature, in (0, 1].
        rho: Share of the tokens that count as confident, in [0, 1].
        signed: False samples certain tokens hotter too, as the authors' code does.

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel.rl.temperature import AdaptiveTemperature
        >>> AdaptiveTemperature().temperatures(torch.tensor([0.1, 2.0]), None, 0.75).tolist()
        [0.75, 0.75]
    """

    tau: float = 0.05
    rule: str = "clamped"
    lowest: float = 0.1
    rho: float = 0.8
    signed: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def paper(cls) -> AdaptiveTemperature:
        """Return the rule as the paper's text has it: strength 0.1, no limits."""
        return cls(tau=0.1, rule="unbounded")

    @classmethod
    def released(cls) -> AdaptiveTemperature:
        """Return the rule as the authors' code has it: entropy without its sign."""
        return cls(signed=False)

    def statistics(self, entropy: Tensor) -> dict[str, Tensor]:
        """Return what :meth:`temperatures` needs to know of one generation batch for the next.

        Args:
            entropy: ``(M,)`` in nats, of all tokens that carry loss, over all ranks.
        """
        return entropy_statistics(entropy, self.rho)

    def temperatures(
        self, entropy: Tensor, statistics: Mapping[str, Tensor] | None, base: float
    ) -> Tensor:
        """Return the temperature of each row, ``(N,)``, as :func:`adaptive_temperature`."""
        return adaptive_temperature(
            entropy,
            statistics,
            base,
            tau=self.tau,
            rule=self.rule,
            lowest=self.lowest,
            signed=self.signed,
        )


def _check(method: AdaptiveTemperature) -> None:
    """Refuse hyper-parameters that mean nothing."""
    if not 0 <= method.tau < math.inf:
        raise ValueError(
            f"AdaptiveTemperature: tau must be at least 0 and finite, got {method.tau}. Use 0.05."
        )
    if method.rule not in _RULES:
        raise ValueError(
            f"AdaptiveTemperature: rule must be one of {', '.join(_RULES)}, got "
            f"{method.rule!r}. Leave it out for {AdaptiveTemperature.rule!r}; "
            "help(AdaptiveTemperature) tells them apart."
        )
    if not 0 < method.lowest <= 1:
        raise ValueError(
            f"AdaptiveTemperature: lowest must be in (0, 1], got {method.lowest}. "
            "It is a share of the base temperature; use 0.1."
        )
    if not 0 <= method.rho <= 1:
        raise ValueError(f"AdaptiveTemperature: rho must be in [0, 1], got {method.rho}. Use 0.8.")
