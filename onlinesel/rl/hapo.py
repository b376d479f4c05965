"""HAPO: uncertain tokens may move further, confident tokens that stay put count less.

Idea: the few tokens at which the policy is uncertain decide where an answer goes; the many at which
it is confident are syntax and follow-up. Give the former room to rise and the latter room to fall
(adaptive clipping), strengthen uncertain tokens that already move, and weaken confident ones that
do not (redistribution).

Paper: HAPO, Liu et al., "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every
Token's Nature" (arXiv:2509.16591), parts 3 and 4. Part 1 is
:class:`~onlinesel.rl.temperature.AdaptiveTemperature`, part 2
:class:`~onlinesel.rl.token_average.TokenAverage`.

Formula: over all tokens of a generation batch, ``u = log max(H, 1e-8)``, ``pivot`` its ``rho``
quantile (nearest rank), ``sigma`` the root mean square of ``u - pivot``, ``z = (u - pivot) /
sigma``; ``h = z / max z`` for ``z > 0`` and ``z / |min z|`` below, so that ``h`` is in [-1, 1] and
0 at the pivot. With the trainer's clip range ``(low, high)`` and ``ratio = pi_theta / pi_old``:

- ``h > 0``: ``high' = high (1 + clip_scale h)``; ``h <= 0``: ``low' = low (1 - clip_scale h)``;
- neutral means ``1 - low' / 2 < ratio < 1 + high' / 2``;
- ``A' = A (1 + advantage_scale h)`` where ``h > 0`` and not neutral, and where ``h <= 0`` and
  neutral; elsewhere ``A' = A``. While ``ratio = 1``, only confident tokens are damped.

The loss is the trainer's own clipped one with ``A'`` and ``[1 - low', 1 + high']``. The authors
cap it at ``10 |A'|`` where ``A' < 0``; the trainer does that by itself (``delta=10`` of TRL, which
caps the ratio; the same for any cap above ``1 + high'``).

Where this differs from the paper: the neutral range is that of the adapted clips, as in the
authors' code; in the paper's text it is that of the trainer's (``neutral="base"``,
:meth:`HAPO.paper`). That code divides by ``min z`` where it means ``|min z|``, so that the most
confident token gets ``h = 1`` and is treated as the most uncertain one (``signed=False``,
:meth:`HAPO.released`). It also takes the quantile over each micro-batch of each rank and with the
current policy; here the statistics and entropies are those of the policy that sampled, over the
whole generation batch, so that ``h`` does not depend on how the batch is cut.

Cost: entropies of all tokens in one forward without gradient per generation batch (none if the
trainer takes its old log-probabilities anyway), one gather and a selection in linear time.

When it loses: entropy says how uncertain the policy is, not whether the token mattered; with one
reward for a whole answer, weights by token can be noise. Extremes set the scale of ``h``: one very
uncertain token shrinks all others. It has many settings; leave it off until the rest works.

If nothing qualifies: without any token the statistics give ``h = 0`` everywhere, which changes
nothing; so does an entropy that is not finite, for its token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.types import TokenSignals, TokenTerms, TokenWeights

__all__ = ["HAPO", "entropy_statistics", "normalized_entropy", "rescale", "standardize"]

_FLOOR = 1e-8
_NEUTRAL = ("adapted", "base")


def _as_float(entropy: Tensor) -> Tensor:
    return entropy.to(torch.promote_types(entropy.dtype, torch.float32))


def entropy_statistics(entropy: Tensor, rho: float = 0.8) -> dict[str, Tensor]:
    """Describe the entropies of a generation batch, for :func:`normalized_entropy`.

    Args:
        entropy: ``(M,)`` in nats, of all tokens that carry loss; values that are not finite are
            left out.
        rho: Share of the tokens below the pivot.

    Returns:
        Scalars: ``pivot``, the quantile of the log entropy; ``sigma``, its root mean square
        distance from the pivot; ``top`` > 0 and ``bottom`` < 0, the largest and smallest distance
        in units of sigma. Without any token, values that put every token at the pivot.

    Example:
        >>> import torch
        >>> said = entropy_statistics(torch.tensor([0.1, 1.0, 10.0]), rho=0.5)
        >>> {name: round(value.item(), 3) for name, value in said.items()}
        {'pivot': 0.0, 'sigma': 1.88, 'top': 1.225, 'bottom': -1.225}
    """
    entropy = _as_float(entropy)
    entropy = entropy[torch.isfinite(entropy)]
    if not entropy.numel():
        neutral = {"pivot": 0.0, "sigma": math.inf, "top": 1.0, "bottom": -1.0}
        return {name: entropy.new_tensor(value) for name, value in neutral.items()}
    u = entropy.clamp(min=_FLOOR).log()
    # Python's round goes to the even neighbour, as the authors' does.
    pivot = u.kthvalue(round(rho * (u.numel() - 1)) + 1).values
    away = u - pivot
    sigma = away.square().mean().clamp(min=_FLOOR).sqrt()
    return {
        "pivot": pivot,
        "sigma": sigma,
        "top": (away.amax() / sigma).clamp(min=_FLOOR),
        "bottom": (away.amin() / sigma).clamp(max=-_FLOOR),
    }


def standardize(
    entropy: Tensor,
    statistics: Mapping[str, Tensor],
    *,
    floor: float = _FLOOR,
    margin: float = 0.0,
) -> Tensor:
    """Return ``(log max(H, floor) - pivot) / (sigma + margin)``, in the shape of ``entropy``.

    Example:
        >>> import torch
        >>> said = {"pivot": torch.tensor(0.0), "sigma": torch.tensor(2.0)}
        >>> standardize(torch.tensor([1.0]), said).item()
        0.0
    """
    u = _as_float(entropy).clamp(min=floor).log()
    return (u - statistics["pivot"]) / (statistics["sigma"] + margin)


def rescale(z: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """Return ``z`` over the extreme on its side of 0, limited to [-1, 1].

    Example:
        >>> import torch
        >>> said = {"top": torch.tensor(2.0), "bottom": torch.tensor(-4.0)}
        >>> rescale(torch.tensor([1.0, -1.0, -9.0]), said).tolist()
        [0.5, -0.25, -1.0]
    """
    return torch.where(z > 0, z / statistics["top"], -z / statistics["bottom"]).clamp(-1, 1)


def normalized_entropy(entropy: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """Say how uncertain each token is among those of its generation batch.

    Args:
        entropy: ``(B, T)`` in nats.
        mask: ``(B, T)`` bool, True where a token carries loss.
        statistics: What :func:`entropy_statistics` said about the generation batch.

    Returns:
        ``(B, T)`` in [-1, 1]: 1 for the most uncertain token, 0 at the pivot, -1 for the most
        confident one; 0 where masked or unknown.

    Example:
        >>> import torch
        >>> entropy = torch.tensor([[0.1, 1.0, 10.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> statistics = entropy_statistics(entropy[mask], rho=0.5)
        >>> normalized_entropy(entropy, mask, statistics).tolist()
        [[-1.0, 0.0, 1.0, 0.0]]
    """
    h = rescale(standardize(entropy, statistics), statistics)
    return torch.where(mask & torch.isfinite(entropy), h, 0.0)


@dataclass(frozen=True)
class HAPO(TokenWeights):
    """Adapt advantages and clip ranges to entropy; see the module for the method card.

    ``HAPO()`` is the method as its parts are meant, :meth:`paper` as its text, :meth:`released` as
    its code.

    Args:
        rho: Share of the tokens that count as confident, in [0, 1].
        clip_scale: How much a clip range widens at most, in units of itself; 0 leaves it.
        advantage_scale: How much an advantage changes at most, in [0, 1]; 0 leaves it.
        neutral: ``"adapted"`` or ``"base"``: whose half range counts as not moving.
        clip: Clip range ``(low, high)`` to start from; None takes the trainer's.
        signed: False treats the most confident token as the most uncertain one, as the authors'
            code does.

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel.rl.hapo import HAPO
        >>> from onlinesel.rl.types import TokenSignals
        >>> entropy, ones = torch.tensor([[0.1, 1.0, 10.0]]), torch.ones(1, 3)
        >>> method = HAPO(rho=0.5)
        >>> said = method.statistics(entropy.flatten())
        >>> tokens = TokenSignals(entropy, ones, ones, ones.bool(), said, clip=(0.25, 0.25))
        >>> terms = method.weigh(tokens)
        >>> terms.advantages.tolist(), terms.clip_low.tolist(), terms.clip_high.tolist()
        ([[0.0, 1.0, 1.0]], [[0.5, 0.25, 0.25]], [[0.25, 0.25, 0.5]])
    """

    rho: float = 0.8
    clip_scale: float = 1.0
    advantage_scale: float = 1.0
    neutral: str = "adapted"
    clip: tuple[float, float] | None = None
    signed: bool = True

    def __post_init__(self) -> None:
        if self.clip is not None:
            object.__setattr__(self, "clip", tuple(self.clip))
        _check(self)

    @classmethod
    def paper(cls, clip: tuple[float, float] | None = (0.2, 0.28)) -> HAPO:
        """Return the method as its text has it: the neutral range does not adapt."""
        return cls(neutral="base", clip=clip)

    @classmethod
    def released(cls, clip: tuple[float, float] | None = (0.2, 0.2)) -> HAPO:
        """Return the method as its code has it: entropy without its sign."""
        return cls(signed=False, clip=clip)

    def statistics(self, entropy: Tensor) -> dict[str, Tensor]:
        """Return ``pivot``, ``sigma``, ``top`` and ``bottom``, as :func:`entropy_statistics`."""
        return entropy_statistics(entropy, self.rho)

    def weigh(self, tokens: TokenSignals) -> TokenTerms:
        """Return the advantages and clip ranges of every token."""
        h = normalized_entropy(tokens.entropy, tokens.mask, tokens.statistics)
        if not self.signed:
            h = h.abs()
        low, high = tokens.clip if self.clip is None else self.clip
        clip_low = low * (1 - self.clip_scale * h.clamp(max=0))
        clip_high = high * (1 + self.clip_scale * h.clamp(min=0))
        below, above = (clip_low, clip_high) if self.neutral == "adapted" else (low, high)
        still = (1 - below / 2 < tokens.ratio) & (tokens.ratio < 1 + above / 2)
        changes = torch.where(h > 0, ~still, still)
        factor = torch.where(changes, 1 + self.advantage_scale * h, 1.0)
        return TokenTerms(tokens.advantages * factor, clip_low, clip_high)


def _check(method: HAPO) -> None:
    """Refuse hyper-parameters that mean nothing."""
    for name, usual in (("rho", "0.8"), ("advantage_scale", "1.0, or 0.0 to leave advantages")):
        value = getattr(method, name)
        if not 0 <= value <= 1:
            raise ValueError(f"HAPO: {name} must be in [0, 1], got {value}. Use {usual}.")
    if not 0 <= method.clip_scale < math.inf:
        raise ValueError(
            f"HAPO: clip_scale must be at least 0 and finite, got {method.clip_scale}. "
            "Use 1.0, or 0.0 to leave the clip range."
        )
    if method.neutral not in _NEUTRAL:
        raise ValueError(
            f"HAPO: neutral must be one of {', '.join(_NEUTRAL)}, got {method.neutral!r}. "
            f"Leave it out for {HAPO.neutral!r}; help(HAPO) tells them apart."
        )
    if method.clip is not None and (len(method.clip) != 2 or not all(c > 0 for c in method.clip)):
        raise ValueError(
            f"HAPO: clip must be two positive numbers or None, got {method.clip}. "
            "Use (0.2, 0.28), or None for the trainer's own."
        )
