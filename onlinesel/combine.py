"""The two combinators: multiply strategies, and switch one on for a window of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinesel._contract import begin, decide, learn
from onlinesel.types import Selection, Signals, State, Strategy

__all__ = ["Chain", "When"]


def _prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _part(state: State, prefix: str) -> State:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply weights of rows (N,) or of tokens (N, T)."""
    if a.dim() != b.dim():
        a, b = (w[:, None] if w.dim() == 1 else w for w in (a, b))
    return a * b


def _scorer_options(owner: str, parts: tuple[Strategy, ...]) -> dict[str, object]:
    """Merge the parts' scorer options; two parts may share one only if they agree on it."""
    merged: dict[str, object] = {}
    for part in parts:
        for name, value in part.scorer_options.items():
            if merged.setdefault(name, value) != value:
                raise ValueError(
                    f"{owner}: parts must agree on the scorer option '{name}', got "
                    f"{merged[name]!r} and {value!r}. Give both parts the same setting."
                )
    return merged


def _merged(parts: tuple[Strategy, ...], states: Sequence[State]) -> State:
    new: State = {}
    for i, part in enumerate(parts):
        united = part.merge([_part(state, str(i)) for state in states])
        new.update(_prefixed(united, str(i)))
    return new


def _plan(parts: tuple[Strategy, ...], rows: int, epoch: int, seed: int) -> Tensor | None:
    plans = [part.epoch_plan(rows, epoch=epoch, seed=seed) for part in parts]
    return next((plan for plan in plans if plan is not None), None)


@dataclass(frozen=True, init=False)
class Chain(Strategy):
    """Multiply the weights of several strategies that look at the same candidates.

    Every part sees all candidates and the same ``keep``; a row trains if every part gives it
    weight. The loss is normalised as the last part defines it.

    Args:
        *parts: Strategies, at least one.

    Raises:
        ValueError: No part, or parts that want different settings of the scorer.

    Example:
        >>> import torch
        >>> from onlinesel import Chain, Selector, Signals
        >>> from onlinesel.strategies import LossReweight, TopLoss
        >>> chain = Chain(TopLoss(), LossReweight(min_rows=2))
        >>> selection = Selector(chain).select(Signals(loss=torch.tensor([1.0, 2.0, 4.0])), keep=2)
        >>> selection.rows.tolist()
        [1, 2]
    """

    parts: tuple[Strategy, ...]

    def __init__(self, *parts: Strategy) -> None:
        if not parts or not all(isinstance(part, Strategy) for part in parts):
            raise ValueError(
                f"Chain: parts must be one or more strategies, got {parts!r}. "
                "Write Chain(UDS(), LossReweight())."
            )
        object.__setattr__(self, "parts", parts)
        for name in ("needs", "observes"):
            union = dict.fromkeys(n for part in parts for n in getattr(part, name))
            object.__setattr__(self, name, tuple(union))
        object.__setattr__(self, "normalize", parts[-1].normalize)
        object.__setattr__(self, "drops_only", all(part.drops_only for part in parts))
        _scorer_options("Chain", parts)

    @property
    def scorer_options(self) -> dict[str, object]:
        """The parts' options, merged."""
        return _scorer_options("Chain", self.parts)

    def needs_at(self, step: int) -> tuple[str, ...]:
        """Return the union of what the parts need at ``step``."""
        return tuple(dict.fromkeys(n for part in self.parts for n in part.needs_at(step)))

    def needs_for(self, step: int, rows: int) -> tuple[str, ...]:
        """Return the union of what the parts need at ``step`` from so many candidates."""
        return tuple(dict.fromkeys(n for part in self.parts for n in part.needs_for(step, rows)))

    def init(self) -> State:
        """Return the parts' states, each under its number."""
        states = (_prefixed(begin(part), str(i)) for i, part in enumerate(self.parts))
        return {name: value for state in states for name, value in state.items()}

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Multiply the parts' weights; scores and metrics are those of the parts."""
        weights, scores = torch.ones(signals.size), None
        metrics: dict[str, Tensor] = {}
        new: State = {}
        for i, part in enumerate(self.parts):
            selection, after = decide(
                part, signals, _part(state, str(i)), keep=keep, step=step, generator=generator
            )
            weights = _product(weights, selection.weights)
            scores = selection.scores if scores is None else scores
            metrics.update(selection.metrics)
            new.update(_prefixed(after, str(i)))
        return Selection(weights, scores, metrics), new

    def observe(self, signals: Signals, state: State) -> State:
        """Let every part observe."""
        new: State = {}
        for i, part in enumerate(self.parts):
            new.update(_prefixed(learn(part, signals, _part(state, str(i))), str(i)))
        return new

    def merge(self, states: Sequence[State]) -> State:
        """Let every part unite its own."""
        return _merged(self.parts, states)

    def epoch_plan(self, rows: int, *, epoch: int, seed: int) -> Tensor | None:
        """Return the plan of the first part that has one."""
        return _plan(self.parts, rows, epoch, seed)


@dataclass(frozen=True)
class When(Strategy):
    """Use a strategy in a window of optimizer steps, and another one outside it.

    Args:
        strategy: Used at steps ``start <= step < stop`` that are ``every`` apart.
        start: First step.
        stop: First step after the window; None for never.
        every: 1 for each step of the window, 2 for every other, ...
        otherwise: Used at all other steps. By default every candidate trains with weight 1, which
            is the neutral choice inside a :class:`Chain`. With ``candidates > 1``, pass
            ``Uniform()`` to keep the number of trained rows constant.

    Raises:
        ValueError: A window that is empty or not made of non-negative steps.

    Example:
        Warm up on uniform rows for 100 steps, and stop choosing after step 900:

        >>> from onlinesel import When
        >>> from onlinesel.strategies import TopLoss, Uniform
        >>> When(TopLoss(), start=100, stop=900, otherwise=Uniform()).active(99)
        False
    """

    strategy: Strategy
    start: int = 0
    stop: int | None = None
    every: int = 1
    otherwise: Strategy | None = None

    def __post_init__(self) -> None:
        window = (self.start, self.stop, self.every)
        if self.start < 0 or self.every < 1 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(
                "When: start, stop and every must give a window 0 <= start < stop with every >= 1, "
                f"got {window}. Count optimizer steps from 0."
            )
        for name in ("needs", "observes"):
            union = dict.fromkeys(n for part in self._parts for n in getattr(part, name))
            object.__setattr__(self, name, tuple(union))
        object.__setattr__(self, "normalize", self.strategy.normalize)
        object.__setattr__(self, "drops_only", all(part.drops_only for part in self._parts))
        _scorer_options("When", self._parts)

    @property
    def _parts(self) -> tuple[Strategy, ...]:
        return (self.strategy,) if self.otherwise is None else (self.strategy, self.otherwise)

    def active(self, step: int) -> bool:
        """Return whether the strategy decides at ``step``."""
        inside = self.start <= step and (self.stop is None or step < self.stop)
        return inside and (step - self.start) % self.every == 0

    @property
    def scorer_options(self) -> dict[str, object]:
        """The parts' options, merged."""
        return _scorer_options("When", self._parts)

    def needs_at(self, step: int) -> tuple[str, ...]:
        """Return what the side whose turn it is needs."""
        i = 0 if self.active(step) else 1
        return self._parts[i].needs_at(step) if i < len(self._parts) else ()

    def needs_for(self, step: int, rows: int) -> tuple[str, ...]:
        """Return what the side whose turn it is needs from so many candidates."""
        i = 0 if self.active(step) else 1
        return self._parts[i].needs_for(step, rows) if i < len(self._parts) else ()

    def init(self) -> State:
        """Return the state of both sides."""
        states = (_prefixed(begin(part), str(i)) for i, part in enumerate(self._parts))
        return {name: value for state in states for name, value in state.items()}

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Ask the side whose turn it is; the other side's state stays as it is."""
        i = 0 if self.active(step) else 1
        if i >= len(self._parts):
            return Selection(torch.ones(signals.size)), state
        selection, after = decide(
            self._parts[i], signals, _part(state, str(i)), keep=keep, step=step, generator=generator
        )
        # Only the other side's: a ledger has other keys after its runs were merged.
        rest = {name: value for name, value in state.items() if not name.startswith(f"{i}.")}
        return selection, {**rest, **_prefixed(after, str(i))}

    def observe(self, signals: Signals, state: State) -> State:
        """Let both sides observe, so that a table is warm when its window opens."""
        new: State = {}
        for i, part in enumerate(self._parts):
            new.update(_prefixed(learn(part, signals, _part(state, str(i))), str(i)))
        return new

    def draw_epoch(
        self, rows: int, state: State, *, step: int, generator: torch.Generator
    ) -> State:
        """Let the strategy draw an epoch that begins in its window; it is read to its end."""
        open_ = self.every == 1 and self.active(step)
        after = self.strategy.draw_epoch(
            rows if open_ else 0, _part(state, "0"), step=step, generator=generator
        )
        rest = {name: value for name, value in state.items() if not name.startswith("0.")}
        return {**rest, **_prefixed(after, "0")}

    def rows_of_epoch(self, state: State) -> Tensor | None:
        """Return the rows that the strategy drew."""
        return self.strategy.rows_of_epoch(_part(state, "0"))

    def merge(self, states: Sequence[State]) -> State:
        """Let both sides unite their own."""
        return _merged(self._parts, states)

    def epoch_plan(self, rows: int, *, epoch: int, seed: int) -> Tensor | None:
        """Return the strategy's plan: a loader's epoch cannot switch in the middle."""
        return _plan(self._parts, rows, epoch, seed)
