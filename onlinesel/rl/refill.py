"""Refill: keep the batch full when a gate drops groups, within stated bounds.

The problems are those that the loader would give next: a curriculum stays one, and no problem comes
twice before all have come. The trainer's epochs count the loader's own batches, so with a refill
the data are gone through sooner than ``num_train_epochs`` says. A stream is read a second time for
it, besides the loader's own reading.

The rule is pure: it sees counts that are equal on all ranks, and never a clock, so that every rank
generates equally often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Refill", "fill_up"]

_ON_SHORT = ("partial", "replace", "top_up", "skip", "raise")


@dataclass(frozen=True)
class Refill:
    """How a generation batch that a gate left short is filled.

    Args:
        max_rounds: Further generation calls for one batch, at the same weights.
        max_rollouts: Completions of one batch, the first call's included, beyond which no further
            call is made; the first call itself is never cut. None for no bound but the rounds.
        on_short: What happens if the batch is still short.
            ``"partial"``: train on what was kept, with the loss normalised over it; with nothing
            kept the gradient is 0, but momentum and decay still move the weights.
            ``"replace"`` (Polaris): repeat kept groups at random if more than a third of the batch
            was kept, else skip.
            ``"top_up"``: fill with rejected groups, those of the most varied outcomes first; they
            train as they do without a gate.
            ``"skip"``: the weights stay as they are in this step.
            ``"raise"``: stop with an error.
            Of an optimizer step over several generation batches, those that train nothing take no
            share.
        leftover: Kept groups beyond a full batch are ``"discard"``-ed, or ``"carry"``-ed into the
            next batch, where they are one generation old and train as if the policy had just
            sampled them (unless the trainer keeps their old log-probabilities); never for longer.
        oversample: Groups asked for, relative to what the acceptance so far predicts.
        patience: Batches in a row without any kept group after which training stops with an
            error. None goes on, with a warning after every 20: an easy set may be solved, or the
            format of answers be learnt before the answers.

    Raises:
        ValueError: An unknown policy or a bound below its least value.

    Example:
        >>> refill = Refill(max_rounds=2)
        >>> refill.ask(wanted=8, kept=2, acceptance=0.25, rounds=0, rollouts=64, generations=8)
        8
        >>> refill.ask(wanted=8, kept=7, acceptance=0.25, rounds=1, rollouts=128, generations=8)
        5
        >>> refill.ask(wanted=8, kept=7, acceptance=0.25, rounds=2, rollouts=168, generations=8)
        0
    """

    max_rounds: int = 3
    max_rollouts: int | None = None
    on_short: str = "partial"
    leftover: str = "discard"
    oversample: float = 1.1
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_rounds", 0), ("patience", 1), ("oversample", 1.0)):
            if name == "patience" and self.patience is None:
                continue
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"Refill: {name} must be at least {least}, got {getattr(self, name)}. "
                    "Leave it out for the default."
                )
        if self.max_rollouts is not None and self.max_rollouts < 1:
            raise ValueError(
                f"Refill: max_rollouts must be at least 1, got {self.max_rollouts}. "
                "Use None for no bound but max_rounds."
            )
        for name, known in (("on_short", _ON_SHORT), ("leftover", ("discard", "carry"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Refill: {name} must be one of {', '.join(known)}, got "
                    f"{getattr(self, name)!r}. Leave it out for {getattr(Refill, name)!r}; "
                    "help(Refill) "
                    "says what each one does."
                )

    def ask(
        self,
        *,
        wanted: int,
        kept: int,
        acceptance: float,
        rounds: int,
        rollouts: int,
        generations: int,
        multiple: int = 1,
    ) -> int:
        """Return how many groups to generate next; 0 ends the refill.

        Args:
            wanted: Groups of a full batch; never more are asked for at once.
            kept: Groups kept so far.
            acceptance: Share of groups that the gate has been keeping.
            rounds: Further calls made so far.
            rollouts: Completions generated so far for this batch.
            generations: Completions of a group.
            multiple: The number asked for is a multiple of it, for ranks to share it equally.
        """
        if kept >= wanted or rounds >= self.max_rounds:
            return 0
        count = math.ceil((wanted - kept) / max(acceptance, 0.1) * self.oversample)
        count = min(math.ceil(count / multiple) * multiple, math.ceil(wanted / multiple) * multiple)
        if self.max_rollouts is not None:
            left = (self.max_rollouts - rollouts) // generations
            count = min(count, left // multiple * multiple)
        return max(count, 0)


def fill_up(
    policy: str, kept: int, spread: Tensor, wanted: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Decide what a short batch trains.

    Args:
        policy: :attr:`Refill.on_short`.
        kept: Groups that the gate kept, fewer than ``wanted``.
        spread: ``(R,)`` variance of the outcomes of each rejected group; nan where unknown.
        wanted: Groups of a full batch.
        generator: Of the choice of repeated groups.

    Returns:
        Positions of kept groups to train, repeated ones included, and positions of rejected groups
        to add. ``"raise"`` is the host's part: here it is ``"partial"``.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> fill_up("top_up", 1, torch.tensor([0.0, 0.1]), 2, g)
        ([0], [1])
        >>> sorted(fill_up("replace", 2, torch.zeros(2), 4, g)[0])
        [0, 0, 1, 1]
        >>> fill_up("replace", 1, torch.zeros(3), 4, g)
        ([], [])
    """
    mine, missing = list(range(kept)), wanted - kept
    if policy == "top_up":
        order = torch.nan_to_num(spread, nan=-1.0).argsort(descending=True, stable=True)
        return mine, order[:missing].tolist()
    if policy == "replace":
        if 3 * kept <= wanted:
            return [], []
        if kept >= missing:
            again = torch.randperm(kept, generator=generator)[:missing]
        else:
            again = torch.randint(kept, (missing,), generator=generator)
        return mine + again.tolist(), []
    return ([], []) if policy == "skip" else (mine, [])
