"""Advantages from the rewards of groups of completions, as GRPO trainers define them.

:func:`group_advantages` is the definition of TRL's ``GRPOTrainer``, operation by operation, because
a trainer computes its advantages inside the call that generates: once groups have been dropped,
refilled or cut, they must be computed again over the groups that train. The other functions are
what several methods share.

Paper: GRPO, Shao et al. (arXiv:2402.03300); ``scale="none"``: Dr. GRPO, Liu et al.
(arXiv:2503.20783).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deviations", "group_advantages", "sequence_advantages", "total_rewards"]

_SCALES = ("group", "batch", "none")
_AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_TRL_EPSILON = 1e-4
_EPSILON = 1e-6


def total_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """Sum up what the reward functions said about each completion.

    Args:
        rewards_per_func: ``(B, F)``, nan where a function did not score the completion.
        weights: ``(F,)``.

    Returns:
        ``(B,)`` weighted sum over the functions that scored the completion; nan if none did.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]])
        >>> total_rewards(rewards, torch.tensor([1.0, 0.5])).tolist()
        [2.0, 1.0, nan]
    """
    return _weighted_sum(rewards_per_func, weights, torch.isnan(rewards_per_func).all(dim=1))


def _weighted_sum(values: Tensor, weights: Tensor, unscored: Tensor) -> Tensor:
    total = (values * weights.to(values)).nansum(dim=1)
    return torch.where(unscored, torch.nan, total)


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Return the unbiased standard deviation of what is not nan; nan for fewer than two."""
    squares = (values - values.nanmean(dim, keepdim=True)).square()
    count = (~torch.isnan(values)).sum(dim, keepdim=True)
    # The order of the operations decides the last bit, which is to be the trainer's.
    return (squares.nanmean(dim, keepdim=True) * (count / (count - 1))).sqrt()


def group_advantages(
    rewards_per_func: Tensor,
    weights: Tensor,
    generations: int,
    *,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """Return the advantages that TRL's ``GRPOTrainer`` gives to a batch, to the last bit.

    ``sum_then_normalize``: ``(r_i - mean_g) / (s + 1e-4)`` with ``r`` the weighted sum over the
    reward functions and ``s`` the unbiased standard deviation of the group (``"group"``), of the
    batch (``"batch"``), or no division (``"none"``). ``normalize_then_sum``: every function is
    normalised in its group first, the weighted sum is normalised over the batch; ``scale`` plays
    no part.

    Args:
        rewards_per_func: ``(B, F)``, nan where a function did not score the completion; the
            completions of a group are consecutive.
        weights: ``(F,)`` weights of the reward functions.
        generations: Completions in a group; divides ``B``.
        scale: ``"group"``, ``"batch"`` or ``"none"``.
        aggregation: ``"sum_then_normalize"`` or ``"normalize_then_sum"``.

    Returns:
        ``(B,)``; 0 for a completion that no function scored, and for the only one scored in its
        group if the deviation is the group's.

    Raises:
        ValueError: Unknown ``scale`` or ``aggregation``; ``generations`` does not divide ``B``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[1.0], [0.0], [0.5], [0.5]])
        >>> group_advantages(rewards, torch.ones(1), 2, scale="none").tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    _check(rewards_per_func, generations, scale, aggregation)
    if aggregation == "normalize_then_sum":
        grouped = rewards_per_func.reshape(-1, generations, rewards_per_func.shape[1])
        centred = grouped - grouped.nanmean(dim=1, keepdim=True)
        spread = _nan_std(grouped, 1) if generations > 1 else torch.zeros_like(centred)
        by_function = (centred / (spread + _TRL_EPSILON)).view_as(rewards_per_func)
        # Of the raw rewards: the only one that a function gave in a group is nan once normalised.
        unscored = torch.isnan(rewards_per_func).all(dim=1)
        rewards = _weighted_sum(by_function, weights, unscored)
        spread = _nan_std(rewards, 0) if rewards.numel() > 1 else torch.zeros_like(rewards)
        advantages = (rewards - rewards.nanmean()) / (spread + _TRL_EPSILON)
        return torch.nan_to_num(advantages, nan=0.0)
    rewards = total_rewards(rewards_per_func, weights)
    groups = rewards.view(-1, generations)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale != "none":
        population = groups if scale == "group" else rewards.view(1, -1)
        several = population.shape[1] > 1
        spread = _nan_std(population, 1) if several else torch.zeros_like(advantages)
        advantages = advantages / (spread + _TRL_EPSILON)
    return torch.nan_to_num(advantages, nan=0.0).flatten()


def _check(rewards_per_func: Tensor, generations: int, scale: str, aggregation: str) -> None:
    """Refuse what TRL would refuse, and groups that are not whole."""
    given = {"scale": (scale, _SCALES), "aggregation": (aggregation, _AGGREGATIONS)}
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(
                f"group_advantages: {name} must be one of {', '.join(allowed)}, got {value!r}. "
                "Pass the trainer's own setting."
            )
    rows = rewards_per_func.shape[0]
    if generations < 1 or rows % generations:
        raise ValueError(
            f"group_advantages: generations must divide the number of rows ({rows}), got "
            f"{generations}. Pass whole groups, one after the other."
        )


def deviations(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each reward is from the weighted mean of its group.

    Args:
        rewards: ``(Q, G)``.
        weights: ``(Q, G)`` how often each counts; 0, or a reward that is not finite, leaves out.

    Returns:
        ``(Q, G)`` deviations, 0 for what is left out and exactly 0 if all others are equal, and
        ``(Q, 1)`` the weighted sum of their squares.

    Example:
        >>> import torch
        >>> deviation, squares = deviations(torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 1]]))
        >>> deviation.tolist(), squares.tolist()
        ([[0.25, -0.75]], [[0.75]])
    """
    known = (weights > 0) & torch.isfinite(rewards)
    counts = torch.where(known, weights, 0).to(rewards.dtype)
    # Counted from the smallest reward: the mean of n times 0.1 is not 0.1, that of n times 0 is 0,
    # and a deviation by rounding alone must not be divided by a spread by rounding alone.
    smallest = torch.where(known, rewards, torch.inf).amin(dim=-1, keepdim=True)
    above = torch.where(known, rewards - smallest, 0.0)
    total = counts.sum(dim=-1, keepdim=True)
    mean = (counts * above).sum(dim=-1, keepdim=True) / total.clamp(min=1)
    deviation = torch.where(known, above - mean, 0.0)
    return deviation, (counts * deviation.square()).sum(dim=-1, keepdim=True)


def sequence_advantages(rewards: Tensor, known: Tensor, *, scale: bool = True) -> Tensor:
    """Return GRPO's advantages ``(r_i - mean) / (std + 1e-6)`` over some rows of each group.

    Args:
        rewards: ``(Q, G)``.
        known: ``(Q, G)`` bool, the rows that count; rewards that are not finite never do.
        scale: Divide by the unbiased standard deviation.

    Returns:
        ``(Q, G)``, 0 for rows that do not count.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[2.0, 0.0, 9.0]])
        >>> known = torch.tensor([[True, True, False]])
        >>> [round(value, 4) for value in sequence_advantages(rewards, known)[0].tolist()]
        [0.7071, -0.7071, 0.0]
    """
    deviation, squares = deviations(rewards, known.to(rewards.dtype))
    if not scale:
        return deviation
    count = (known & torch.isfinite(rewards)).sum(dim=-1, keepdim=True)
    return deviation / ((squares / (count - 1).clamp(min=1)).sqrt() + _EPSILON)
