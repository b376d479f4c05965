"""Which number of a completion says right or wrong, among several reward functions and tasks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from onlinesel._base.words import did_you_mean
from onlinesel.callbacks.grpo.checks import refuse
from onlinesel.callbacks.grpo.rewards import RewardGuard
from onlinesel.parallel.distributed import rank

__all__ = ["OutcomeRule", "Outcomes", "labels"]

OutcomeRule = Callable[[dict[str, float | None], Mapping[str, Any]], float | None]
"""``(rewards by name, row) -> outcome``; None for a completion of which nothing is known."""


def labels(names: Sequence[str]) -> list[str]:
    """Return names that are all different: those that occur several times are counted.

    Example:
        >>> from onlinesel.callbacks.grpo.outcomes import labels
        >>> labels(["format", "judge", "judge"])
        ['format', 'judge#1', 'judge#2']
    """
    return [
        f"{name}#{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


class Outcomes:
    """The outcome of every completion: one reward function's, the first of several, or a rule's.

    Args:
        trainer: A GRPO trainer; its reward functions and environments have the names.
        outcome: A name, a reward function itself, several of them, a rule, or None.
        success: Outcome above which an answer is right; None takes outcomes as they are.
        asking: Arguments of the callback that decide by outcomes.
        counting: Whether outcomes are counted, for which they must lie between 0 and 1.

    Attributes:
        name: What the outcome is, for records.

    Raises:
        ValueError: No such function, or several of which none is named.
        TypeError: ``outcome`` is of another kind.
    """

    def __init__(
        self,
        trainer: Any,
        outcome: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None,
        success: float | None,
        *,
        asking: Sequence[str],
        counting: bool,
    ) -> None:
        self.labels = labels(list(trainer.reward_func_names))
        self._functions, self._size = list(trainer.reward_funcs), trainer.num_generations
        self._success, self._counting, self._told = success, counting, not asking
        self._rule: OutcomeRule | None = None
        self._columns = [0]
        if outcome is None:
            self._check_alone(asking)
        elif isinstance(outcome, (str, *_SEQUENCES)) or self._place(outcome) is not None:
            several = list(outcome) if isinstance(outcome, _SEQUENCES) else [outcome]
            if not several:
                refuse("outcome", f"one or several of {', '.join(self.labels)}", "none", _NAME_ONE)
            self._columns = [self._column(one) for one in several]
        else:
            self._rule = _checked_rule(outcome)
        chosen = [self.labels[column] for column in self._columns]
        self.name = ", ".join(chosen) if self._rule is None else _name_of(self._rule)

    def _check_alone(self, asking: Sequence[str]) -> None:
        if len(self.labels) > 1 and asking:
            refuse(
                "outcome", f"named for {asking[0]}= with {len(self.labels)} reward functions",
                "None", f"Say which one tells right from wrong: {', '.join(self.labels)}. Name "
                "several, the first of which that is not None counts, if each scores the rows of "
                "its own task. A shaped sum must not decide.",
            )  # fmt: skip

    def _place(self, function: Any) -> int | None:
        """Return which reward function this is, None if it is none of them."""
        found = [i for i, own in enumerate(self._functions) if own is function]
        return found[0] if found else None

    def _column(self, one: Any) -> int:
        if not isinstance(one, str):
            place = self._place(one)
            if place is not None:
                return place
            refuse(
                "outcome", "among the trainer's reward functions", _name_of(one),
                f"Name it instead: {', '.join(self.labels)}.",
            )  # fmt: skip
        if one not in self.labels:
            several = f"{one}#1" in self.labels
            refuse(
                "outcome", f"one of {', '.join(self.labels)}", repr(one),
                "Functions of one name are counted in their order; or pass the function itself."
                if several else did_you_mean(one, self.labels, _NAME_ONE),
            )  # fmt: skip
        return self.labels.index(one)

    def of(self, rewards: Tensor, rows: Sequence[Mapping[str, Any]], guard: RewardGuard) -> Tensor:
        """Return the outcome of every completion of all ranks: ``(B,)`` float32, on the CPU.

        Args:
            rewards: ``(B, F)`` of all ranks, equal on all of them.
            rows: The rows of this rank's own completions, equally many on every rank.
            guard: Takes an error of the rule, which becomes one of all ranks.
        """
        value = rewards[:, self._columns[0]]
        for column in self._columns[1:]:
            value = torch.where(torch.isnan(value), rewards[:, column], value)
        if self._rule is not None:
            value = self._ruled(rewards, rows, guard)
        value = value.float().cpu()
        if self._success is not None:
            value = torch.where(torch.isnan(value), value, (value > self._success).float())
        if self._counting:
            _check_counted(value)
        self._tell_unknown(rewards.cpu(), value)
        return value

    def _ruled(
        self, rewards: Tensor, rows: Sequence[Mapping[str, Any]], guard: RewardGuard
    ) -> Tensor:
        assert self._rule is not None
        start, found = rank() * len(rows), []
        for row, own in zip(rows, rewards[start : start + len(rows)].tolist(), strict=True):
            known = [None if reward != reward else reward for reward in own]
            said = dict(zip(self.labels, known, strict=True))
            found.append(guard.number("outcome", self._rule, said, row))
        value: Tensor = gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
        guard.check()
        return value

    def _tell_unknown(self, rewards: Tensor, value: Tensor) -> None:
        """Say once that groups have no outcome though they were scored: nobody can decide on them.

        Args:
            rewards: ``(B, F)``.
            value: ``(B,)``.
        """
        if self._told:
            return
        scored = ~torch.isnan(rewards).all(dim=1).view(-1, self._size).all(dim=1)
        unknown = torch.isnan(value).view(-1, self._size).all(dim=1) & scored
        if not bool(unknown.any()):
            return
        self._told = True
        warnings.warn(
            f"RolloutSelection: the outcome ({self.name}) is None for every completion of "
            f"{int(unknown.sum())} of {len(unknown)} groups that other reward functions scored. "
            "A gate drops such groups and a sampler learns nothing of them. If they belong to "
            f"another task, name its function too (outcome=[...]): {', '.join(self.labels)}.",
            stacklevel=2,
        )


_SEQUENCES = (list, tuple)
_NAME_ONE = "Name one of them."


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _checked_rule(outcome: Any) -> OutcomeRule:
    """Return a callable that takes rewards and a row, as far as that can be known."""
    if not callable(outcome):
        raise TypeError(
            "RolloutSelection: outcome must be a name, several, or a function of (rewards by name, "
            f"row), got {outcome!r}. Name the reward function that says right or wrong."
        )
    try:
        inspect.signature(outcome).bind({}, {})
    except TypeError:
        refuse(
            "outcome", "a function that can be called with (rewards by name, row)",
            f"{_name_of(outcome)}{inspect.signature(outcome)}",
            "A reward function must be one of the trainer's; name it, or pass that very object.",
        )  # fmt: skip
    except ValueError:  # written in C, without a signature
        pass
    rule: OutcomeRule = outcome
    return rule


def _check_counted(outcome: Tensor) -> None:
    """Refuse outcomes that are not between 0 and 1: samplers count right answers."""
    known = outcome[~torch.isnan(outcome)]
    other = known[~((known >= 0) & (known <= 1))]
    if len(other):
        refuse(
            "outcome", "between 0 and 1 for prompts=", f"{other[0].item():g}",
            "Name the reward function that says right or wrong (outcome=), or say above which "
            "value an answer is right (success=).",
        )  # fmt: skip
