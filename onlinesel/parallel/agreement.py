"""What settings must agree with: each other, and those of the other ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from onlinesel.parallel.distributed import world_size
from onlinesel.types import Normalize, Scope, Strategy

__all__ = [
    "check_arguments",
    "check_candidates",
    "check_scorer",
    "check_settings",
    "smallest_over_ranks",
    "stack_over_ranks",
]


def check_arguments(owner: str, candidates: object, scope: object, normalize: object) -> None:
    """Refuse arguments that every host takes and that mean nothing.

    Args:
        owner: Name used in errors.
        candidates: Candidates per trained row.
        scope: What competes.
        normalize: Whether the loss is a mean over tokens or over rows.

    Raises:
        ValueError: One of them is none of what it may be.
    """
    whole = isinstance(candidates, int) and not isinstance(candidates, bool)
    for good, name, rule, got, remedy in (
        (whole and int(candidates) >= 1, "candidates", "an integer >= 1", candidates,  # type: ignore[call-overload]
         "Use 1 to weigh without dropping."),
        (scope in get_args(Scope), "scope", f"one of {', '.join(get_args(Scope))}", scope,
         "With 'global' all candidates of a step compete, with 'rank' those of each process, with "
         "'batch' those of each micro-batch."),
        (normalize in get_args(Normalize), "normalize", "'tokens', 'samples', 'rows' or None",
         normalize,
         "'tokens' is the mean over labelled tokens, 'samples' that over the rows' means, 'rows' "
         "their weighted sum over the number of rows, and None leaves it to the method."),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"{owner}: {name} must be {rule}, got {got!r}. {remedy}")


def check_candidates(owner: str, strategy: Strategy, candidates: int) -> None:
    """Refuse a method that would score every row and then drop none.

    Args:
        owner: Name used in errors.
        strategy: The method.
        candidates: Candidates per trained row.

    Raises:
        ValueError: There is nothing to drop.
    """
    if candidates == 1 and strategy.drops_only and strategy.needs:
        raise ValueError(
            f"{owner}: candidates must be at least 2 for {type(strategy).__name__}, which only "
            "drops rows, got 1. Pass candidates=4 to train the best of every four rows."
        )


def check_scorer(owner: str, argument: str, strategy: Strategy, scorer: Any) -> None:
    """Refuse a scorer that says what it provides, and lacks what the method reads.

    Args:
        owner: Name used in errors.
        argument: What the host calls the scorer.
        strategy: The method.
        scorer: With ``provides``, or any function.

    Raises:
        ValueError: A signal is missing.
    """
    provides = getattr(scorer, "provides", None)
    known = (*(provides or ()), "ids", "tokens", "group")
    missing = [name for name in strategy.needs if name not in known]
    if provides is not None and missing:
        raise ValueError(
            f"{owner}: {argument} must provide {', '.join(missing)} for {type(strategy).__name__}, "
            f"got {type(scorer).__name__} with {', '.join(provides)}. Use a method that reads "
            "these, or write a function (model, batch) -> Signals that gives the rest."
        )


def smallest_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    """Return the smallest of a number that every rank gives."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def stack_over_ranks(value: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the tensors of all ranks, of one shape, stacked in their order, on the CPU."""
    if world_size() == 1:
        return value.cpu()[None]
    parts = [torch.empty_like(value, device=device) for _ in range(world_size())]
    dist.all_gather(parts, value.to(device).contiguous())
    return torch.stack(parts).cpu()


def check_settings(owner: str, settings: Mapping[str, Any], device: torch.device | str) -> None:
    """Raise on every rank if the ranks were given different settings, naming those that differ.

    A rank with another seed or strategy would choose other rows, or wait for a collective that
    the others never enter.

    Args:
        owner: Name used in the error.
        settings: What JSON can hold, the same names on every rank.
        device: Where the process group's tensors must live.

    Raises:
        ValueError: The settings differ.
    """
    if world_size() == 1:
        return
    text = torch.tensor(list(json.dumps(dict(settings)).encode()), dtype=torch.uint8)
    longest = -smallest_over_ranks(-text.numel(), device)
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
    padded[: text.numel()] = text
    everyone = [json.loads(bytes(row.tolist())) for row in stack_over_ranks(padded, device)]
    for name in settings:
        values = [str(other.get(name)) for other in everyone]
        if len(set(values)) > 1:
            raise ValueError(
                f"{owner}: {name} must be the same on every rank, got {values}. Build the "
                "selection from the same configuration everywhere."
            )
