"""Say when batch after batch there is nothing to learn from, and why."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from onlinesel.callbacks.grpo.decide import Filled
from onlinesel.parallel.distributed import rank

__all__ = ["Watch"]

_BARREN = 20  # batches in a row without a group that passes the gate
_FLAT = 10  # batches in a row of equal rewards
_UNSCORED = 3  # batches in a row without any reward


class Watch:
    """Count batches in a row that teach nothing; warn, or end the run if that was asked for.

    Args:
        gated: Whether there is a gate.
        patience: Batches without a group that passes it after which the run ends; None for never.
    """

    def __init__(self, gated: bool, patience: int | None) -> None:
        self.gated, self.patience = gated, patience
        self.barren = self.idle = 0

    def saw(self, filled: Filled, advantages: Tensor) -> None:
        """Note a generation batch; called with the same numbers on every rank.

        Args:
            filled: What was generated and chosen.
            advantages: ``(K,)`` of the rows that train, over all ranks.

        Raises:
            ValueError: As many batches as ``patience`` had no group that passes the gate.
        """
        carried = any(group.rows is not None for group in filled.groups)
        passed = not self.gated or carried or any(group.kept for group in filled.scored)
        self.barren = 0 if passed else self.barren + 1
        teaches = bool((advantages.abs() >= 1e-6).any())
        self.idle = 0 if teaches or self.barren else self.idle + 1
        if self.barren:
            self._barren(filled)
        elif self.idle:
            self._idle(filled)

    def _barren(self, filled: Filled) -> None:
        found = f"in {self.barren} batches in a row ({_told(filled)})"
        if self.patience is not None and self.barren >= self.patience:
            raise ValueError(
                f"RolloutSelection: gate must keep a group now and then, got none {found}. Widen "
                "the gate, look at the reward function, start from a policy that solves some of "
                "the problems, or set patience=None to go on."
            )
        if self.barren % _BARREN == 0:
            _warn(
                f"the gate kept no group {found}; on_short says what such batches train. Widen "
                "the gate, or set Refill(patience=...) to end the run."
            )

    def _idle(self, filled: Filled) -> None:
        unscored = bool(torch.isnan(_rewards(filled)).all())
        if not filled.groups and self.idle % _BARREN == 0:
            _warn(
                f"{self.idle} batches in a row were left too short by the gate, and trained "
                "nothing. Raise the bounds of the refill, widen the gate, or use "
                "on_short='partial'."
            )
        elif filled.groups and self.idle == (_UNSCORED if unscored else _FLAT):
            _warn(
                f"{self.idle} batches in a row had no advantage but 0 ({_told(filled)}): nothing "
                "is learnt from them. Look at the reward functions and the length of completions, "
                "or choose problems that the policy solves sometimes (prompts=)."
            )


def _rewards(filled: Filled) -> Tensor:
    return torch.cat([group.rewards for group in filled.scored])


def _told(filled: Filled) -> str:
    """Put the rewards of a batch in words."""
    rewards = _rewards(filled)
    known = rewards[~torch.isnan(rewards)]
    if not len(known):
        return "in the last one every reward was None"
    low, high = known.min().item(), known.max().item()
    if low == high:
        return f"in the last one every reward was {low:g}"
    return f"in the last one rewards went from {low:g} to {high:g}"


def _warn(message: str) -> None:
    if rank() == 0:
        warnings.warn(f"RolloutSelection: {message}", stacklevel=2)
