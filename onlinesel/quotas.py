"""The third combinator: let a strategy choose inside each group, with a quota of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from onlinesel._contract import begin, decide, learn
from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["PerGroup", "apportion"]


def apportion(total: int, weights: Sequence[Fraction | int], limits: Sequence[int]) -> list[int]:
    """Deal a number of places out in proportion to weights, by the largest remainder.

    What a group cannot use goes to the others in proportion to their weights; ties go to the first.

    Args:
        total: Places.
        weights: One number >= 0 per group; a group of weight 0 gets nothing.
        limits: The most places that each group can use.

    Returns:
        Places of each group; they sum to ``total``, or to all that the groups of positive weight
        can use if that is less.

    Example:
        >>> from onlinesel.quotas import apportion
        >>> apportion(5, [3, 3, 1], [9, 9, 9])
        [2, 2, 1]
        >>> apportion(5, [3, 3, 1], [1, 9, 9])
        [1, 3, 1]
    """
    places = [0] * len(weights)
    rest = {i for i, weight in enumerate(weights) if weight > 0 and limits[i] > 0}
    while rest:
        whole = sum(Fraction(weights[i]) for i in rest)
        fair = {i: total * Fraction(weights[i]) / whole for i in sorted(rest)}
        full = [i for i in rest if fair[i] >= limits[i]]
        if not full:
            break
        for i in full:
            places[i] = limits[i]
            total -= limits[i]
        rest -= set(full)
    if rest:
        for i in rest:
            places[i] = math.floor(fair[i])
        left = total - sum(places[i] for i in rest)
        for i in sorted(rest, key=lambda i: (places[i] - fair[i], i))[:left]:
            places[i] += 1
    return places


@dataclass(frozen=True)
class PerGroup(Strategy):
    """Let a strategy choose inside each group, so that no source or domain crowds out another.

    The group of a row is :attr:`onlinesel.Signals.group`, the source or domain it comes from. Each
    group is asked about its own rows alone and keeps its quota of ``keep``: its part of the
    candidates, or the share that is set for it, rounded by the largest remainder (ties to the lower
    group). Quotas sum to ``keep``. Rows with a needed signal that is not finite do not count as
    usable, and what a group cannot use goes to the others in proportion to their shares; a group of
    share 0 gets nothing even then. If fewer than ``keep`` rows are usable, all of them train.

    The groups are asked in ascending order with one state and one generator; a group without a
    quota is not asked. A strategy that only weighs and does not choose keeps to no quota.

    Args:
        strategy: Chooses inside each group.
        shares: Group -> share of the kept rows, >= 0, with a sum of at most 1. The groups that are
            not named divide what is left of 1 in proportion to their candidates; if nothing is
            left, a group that is not named is an error when it appears. None: all groups in
            proportion to their candidates.

    Raises:
        ValueError: No strategy, or shares that are empty, not whole group numbers, negative, not
            finite, or above 1 in sum; and from ``select``, no ``group`` among the signals, or a
            group for which the shares leave nothing.

    Example:
        The best row of each of two sources, where the best two are of one:

        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.quotas import PerGroup
        >>> from onlinesel.strategies import TopLoss
        >>> loss, group = torch.tensor([9.0, 8.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> signals = Signals(loss=loss, group=group)
        >>> Selector(PerGroup(TopLoss())).select(signals, keep=2).rows.tolist()
        [0, 3]
        >>> everything = PerGroup(TopLoss(), shares={0: 1.0, 1: 0.0})
        >>> Selector(everything).select(signals, keep=2).rows.tolist()
        [0, 1]
    """

    strategy: Strategy
    shares: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Strategy):
            raise ValueError(
                f"PerGroup: strategy must be a strategy, got {self.strategy!r}. "
                "Write PerGroup(TopLoss())."
            )
        if self.shares is not None:
            _check(self.shares)
            # Sorted, so that the order in which the shares were written is not part of the repr.
            shares = {group: float(share) for group, share in sorted(self.shares.items())}
            object.__setattr__(self, "shares", shares)
        needs = dict.fromkeys((*self.strategy.needs, "group"))
        object.__setattr__(self, "needs", tuple(needs))
        object.__setattr__(self, "observes", self.strategy.observes)
        object.__setattr__(self, "normalize", self.strategy.normalize)
        # Where as many train as there are, all groups do, but for those whose share is 0.
        emptied = self.shares is not None and 0.0 in self.shares.values()
        object.__setattr__(self, "drops_only", self.strategy.drops_only and not emptied)

    @property
    def scorer_options(self) -> dict[str, object]:
        """The strategy's options."""
        return self.strategy.scorer_options

    def needs_at(self, step: int) -> tuple[str, ...]:
        """Return what the strategy needs at ``step``, and the group."""
        return tuple(dict.fromkeys((*self.strategy.needs_at(step), "group")))

    def needs_for(self, step: int, rows: int) -> tuple[str, ...]:
        """Return what the strategy needs where all candidates are of one group, and the group."""
        return tuple(dict.fromkeys((*self.strategy.needs_for(step, rows), "group")))

    def init(self) -> State:
        """Return the strategy's state."""
        return begin(self.strategy)

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Ask the strategy about each group; metrics are means over the rows that were asked for.

        Scores are nan for the rows of a group that was not asked.
        """
        groups, place = signals.require(self, "group").unique(return_inverse=True)
        usable = signals.finite(self.strategy.needs_at(step))
        counts = torch.bincount(place).tolist()
        limits = torch.bincount(place[usable], minlength=len(counts)).tolist()
        quotas = apportion(keep, self._weights(groups.tolist(), counts), limits)
        asked: list[tuple[Tensor, Selection]] = []
        for i, quota in enumerate(quotas):
            if not quota:
                continue
            rows = (place == i).nonzero().flatten()
            selection, state = decide(
                self.strategy, signals.take(rows), state, keep=quota, step=step, generator=generator
            )
            asked.append((rows, selection))
        return _joined(asked, signals.size), state

    def _weights(self, groups: list[int], counts: list[int]) -> list[Fraction]:
        """Return the share of each group that is present, up to a common factor."""
        if self.shares is None:
            return [Fraction(count) for count in counts]
        named = {group: _exact(share) for group, share in self.shares.items()}
        others = {g: n for g, n in zip(groups, counts, strict=True) if g not in named}
        left = _left(self.shares)
        if others and not left:
            raise ValueError(
                f"PerGroup: shares must leave something for group {min(others)}, got "
                f"{self.shares}. Name the group (with 0 to leave its rows out), or let the shares "
                "sum to less than 1 for the groups that they do not name."
            )
        whole = sum(others.values())
        return [
            named[g] if g in named else left * Fraction(n, whole)
            for g, n in zip(groups, counts, strict=True)
        ]

    def observe(self, signals: Signals, state: State) -> State:
        """Let the strategy observe."""
        return learn(self.strategy, signals, state)

    def merge(self, states: Sequence[State]) -> State:
        """Let the strategy unite what several ranks remember."""
        return self.strategy.merge(states)

    def epoch_plan(self, rows: int, *, epoch: int, seed: int) -> Tensor | None:
        """Return the strategy's plan."""
        return self.strategy.epoch_plan(rows, epoch=epoch, seed=seed)


def _exact(share: float) -> Fraction:
    """Return the decimal number that was written, so that equal remainders are equal."""
    return Fraction(repr(float(share)))


def _left(shares: Mapping[int, float]) -> Fraction:
    """Return what shares leave of 1; thirds that were rounded leave nothing."""
    left = 1 - sum((_exact(share) for share in shares.values()), Fraction(0))
    return left if left > Fraction(1, 10**6) else Fraction(0)


def _check(shares: Mapping[int, float]) -> None:
    """Refuse shares that mean nothing."""
    whole = all(isinstance(g, int) and not isinstance(g, bool) for g in shares)
    if not shares or not whole:
        raise ValueError(
            f"PerGroup: shares must map one or more whole group numbers to shares, got {shares}. "
            "Write shares={0: 0.7, 1: 0.3}, or None for shares by the candidates."
        )
    if not all(math.isfinite(share) and share >= 0 for share in shares.values()):
        raise ValueError(
            f"PerGroup: shares must be finite and >= 0, got {shares}. Use 0 to leave a group out."
        )
    if math.fsum(shares.values()) > 1 + 1e-6:
        raise ValueError(
            f"PerGroup: shares must sum to at most 1, got {math.fsum(shares.values()):g}. "
            "Divide them by their sum."
        )


def _joined(asked: list[tuple[Tensor, Selection]], size: int) -> Selection:
    """Put the decisions about the groups together, each on its rows."""
    if not asked:
        return Selection(torch.zeros(size))
    shape = (size, *asked[0][1].weights.shape[1:])
    weights, scores = torch.zeros(shape), None
    metrics: dict[str, Tensor] = {}
    told: dict[str, int] = {}
    for rows, selection in asked:
        weights[rows] = selection.weights
        if selection.scores is not None:
            scores = torch.full((size,), float("nan")) if scores is None else scores
            scores[rows] = selection.scores.to(scores)
        for name, value in selection.metrics.items():
            told[name] = told.get(name, 0) + len(rows)
            metrics[name] = metrics.get(name, torch.zeros(())) + value.float().mean() * len(rows)
    return Selection(weights, scores, {name: metrics[name] / told[name] for name in metrics})
