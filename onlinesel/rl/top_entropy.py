"""TopEntropy: only the tokens at which the policy was uncertain train.

Idea: most tokens of an answer follow from what stands before them. The few at which the policy was
uncertain are where answers part; let the gradient come from those alone.

Paper: Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
Reinforcement Learning for LLM Reasoning" (arXiv:2506.01939).

Formula: ``A'_it = A_it`` where ``H_it >= threshold``, else 0; ``threshold`` is the ``1 - share``
quantile (linear) of the entropies of all tokens that carry loss. The loss is still divided by the
number of all tokens, so the gradient gets smaller with the share.

Where this differs from TRL's ``top_entropy_quantile``: the threshold is taken once per generation
batch and with the policy that sampled, not per micro-batch with the current one, so the tokens that
train do not depend on how the batch is cut. Use one of the two.

Cost: as HAPO's: entropies of all tokens once per generation batch. It saves no compute.

When it loses: on small models; the paper's gain grows with size and vanishes near 8 billion
parameters. Uncertain tokens are also where noise is largest.

If nothing qualifies: cannot happen; some token is at or above the threshold. If many entropies
equal the threshold, as where the policy is certain throughout, all of them stay. A token whose
entropy is not finite does not train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel.rl.types import TokenSignals, TokenTerms, TokenWeights

__all__ = ["TopEntropy", "entropy_threshold"]


def entropy_threshold(entropy: Tensor, share: float) -> Tensor:
    """Return the entropy that a share of the tokens reaches.

    The linear quantile of ``torch.quantile``, without its limit of 16 million values.

    Args:
        entropy: ``(M,)``, may be empty; values that are not finite are left out.
        share: In (0, 1].

    Returns:
        Scalar; 0 if there is no token.

    Example:
        >>> import torch
        >>> entropy_threshold(torch.tensor([0.0, 4.0, 1.0, 3.0, 2.0]), 0.25).item()
        3.0
    """
    entropy = entropy.to(torch.promote_types(entropy.dtype, torch.float32))
    entropy = entropy[torch.isfinite(entropy)]
    if not entropy.numel():
        return entropy.new_zeros(())
    position = (1 - share) * (entropy.numel() - 1)
    rank = int(position)
    below = entropy.kthvalue(rank + 1).values
    above = entropy.kthvalue(min(rank + 2, entropy.numel())).values
    return torch.lerp(below, above, position - rank)


@dataclass(frozen=True)
class TopEntropy(TokenWeights):
    """Train the tokens of highest entropy; see the module for the method card.

    Args:
        share: Share of the tokens that train, in (0, 1].

    Raises:
        ValueError: ``share`` outside (0, 1].

    Example:
        >>> import torch
        >>> from onlinesel.rl.top_entropy import TopEntropy
        >>> from onlinesel.rl.types import TokenSignals
        >>> entropy, ones = torch.tensor([[0.1, 2.0, 0.3, 0.2]]), torch.ones(1, 4)
        >>> said = TopEntropy(0.25).statistics(entropy.flatten())
        >>> tokens = TokenSignals(entropy, ones, 3 * ones, ones.bool(), said, clip=(0.2, 0.2))
        >>> TopEntropy(0.25).weigh(tokens).advantages.tolist()
        [[0.0, 3.0, 0.0, 0.0]]
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"TopEntropy: share must be in (0, 1], got {self.share}. "
                "Use 0.2 for the fifth of highest entropy."
            )

    def statistics(self, entropy: Tensor) -> dict[str, Tensor]:
        """Return the ``threshold``, as :func:`entropy_threshold`."""
        return {"threshold": entropy_threshold(entropy, self.share)}

    def weigh(self, tokens: TokenSignals) -> TokenTerms:
        """Return the advantages, 0 below the threshold, and the trainer's own clip ranges."""
        entropy = tokens.entropy.to(tokens.statistics["threshold"].dtype)
        trains = tokens.mask & (entropy >= tokens.statistics["threshold"])
        advantages = torch.where(trains, tokens.advantages, 0.0)
        low, high = (torch.full_like(advantages, bound) for bound in tokens.clip)
        return TokenTerms(advantages, low, high)
