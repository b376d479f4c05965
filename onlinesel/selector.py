"""The one stateful object: a strategy with its state, its generator and its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onlinesel._contract import begin, check_strategy, decide, learn
from onlinesel.types import Selection, Signals, Strategy
from onlinesel.weights import effective_size

__all__ = ["Selector", "describe"]


def describe(signals: Signals, selection: Selection, *, brief: bool = False) -> dict[str, float]:
    """Return scalars about one decision.

    With ``brief`` only ``kept_share``, ``nonfinite`` and ``score_kept``. All of them are:
    ``kept_share`` of rows; ``ess``, the effective sample size over the number of kept rows;
    ``score_kept`` and ``score_dropped``, mean scores; ``length_bias``, mean labelled tokens of
    kept rows over that of all rows; ``nonfinite``, rows with a signal that is not finite; and the
    strategy's own metrics.
    """
    weights = selection.weights if selection.weights.dim() == 1 else selection.weights.mean(dim=1)
    kept = weights > 0
    count = int(kept.sum())
    result = {"kept_share": count / signals.size}
    floats = [v for v in signals.present().values() if v.is_floating_point()]
    if floats:
        flat = torch.stack([torch.isfinite(v.reshape(signals.size, -1)).all(dim=1) for v in floats])
        result["nonfinite"] = signals.size - float(flat.all(dim=0).sum())
    if selection.scores is not None:
        finite = torch.isfinite(selection.scores)
        asked = (("score_kept", kept & finite), ("score_dropped", ~kept & finite))
        for name, rows in asked[:1] if brief else asked:
            if bool(rows.any()):
                result[name] = selection.scores[rows].mean().item()
    if brief:
        return result
    own = {name: value.float().mean().item() for name, value in selection.metrics.items()}
    result = own | result
    if count:
        result["ess"] = effective_size(weights).item() / count
    if signals.tokens is not None and count:
        tokens = signals.tokens.float()
        result["length_bias"] = (tokens[kept].mean() / tokens.mean().clamp(min=1e-9)).item()
    return result


def _finite_only(selection: Selection, signals: Signals, needs: Sequence[str]) -> Selection:
    """Take the weight off rows whose needed signals are not finite, whatever the method said."""
    good = signals.finite(needs)
    if bool(good.all()):
        return selection
    alive = good if selection.weights.dim() == 1 else good[:, None]
    return replace(selection, weights=torch.where(alive, selection.weights, 0.0))


class Selector:
    """Run a strategy over a sequence of steps, and carry what must survive a checkpoint.

    Args:
        strategy: The method.
        seed: Seed of the generator that the strategy draws from. Ranks that decide together must
            share it.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import TopLoss
        >>> selector = Selector(TopLoss())
        >>> selector.select(Signals(loss=torch.tensor([0.1, 2.0, 1.0])), keep=2).rows.tolist()
        [1, 2]
        >>> selector.step
        1
    """

    def __init__(self, strategy: Strategy, *, seed: int = 0) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"Selector: strategy must be a Strategy instance, got {strategy!r}. "
                "Pass the method itself, for example Selector(TopLoss())."
            )
        check_strategy(strategy)
        self.strategy = strategy
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._state = begin(strategy)
        self._last: tuple[Signals, Selection] | None = None

    def select(
        self, signals: Signals, *, keep: int | None = None, step: int | None = None
    ) -> Selection:
        """Decide about one set of candidates and advance the state.

        Args:
            signals: The candidates; moved to the CPU, where every rank computes the same bits.
            keep: Rows to train, clamped to ``N``; by default all.
            step: Optimizer step; by default this selector's own count of calls.

        Returns:
            The decision, on the CPU. Rows whose needed signals are not finite have weight 0.

        Raises:
            ValueError: ``keep`` below 1, a signal is missing, or the strategy does not keep to the
                contract; :class:`onlinesel.Strategy` states it.
            TypeError: The strategy returns something else than a selection and a state.
        """
        if keep is not None and keep < 1:
            raise ValueError(
                f"Selector: keep must be at least 1, got {keep}. Say how many rows train."
            )
        signals = signals.to("cpu")
        keep = min(signals.size, keep or signals.size)
        step = self.step if step is None else step
        with torch.no_grad():
            selection, self._state = decide(
                self.strategy, signals, self._state,
                keep=keep, step=step, generator=self._generator,
            )  # fmt: skip
        selection = _finite_only(selection, signals, self.strategy.needs_at(step))
        self.step = step + 1
        self._last = (signals, selection)
        return selection

    def observe(self, signals: Signals) -> None:
        """Hand the strategy what the training forward showed about the rows that trained."""
        with torch.no_grad():
            self._state = learn(self.strategy, signals.to("cpu"), self._state)

    def rows_of_epoch(self, rows: int, *, fresh: bool) -> Tensor | None:
        """Return which rows of a dataset the epoch reads, None for all.

        Args:
            rows: Size of the dataset, whose row numbers are the ids.
            fresh: Whether the epoch begins, and is drawn; else it is the one that was drawn.

        Returns:
            ``(rows,)`` bool.
        """
        if fresh:
            self._state = self.strategy.draw_epoch(
                rows, self._state, step=self.step, generator=self._generator
            )
        return self.strategy.rows_of_epoch(self._state)

    def metrics(self) -> dict[str, float]:
        """Return scalars about the last decision, as :func:`describe`; empty before the first."""
        return {} if self._last is None else describe(*self._last)

    def mark(self) -> tuple[int, dict[str, Tensor], Tensor]:
        """Return the present for a later :meth:`state_dict`; this costs nothing.

        No state is changed in place, so that keeping it is enough.
        """
        return self.step, self._state, self._generator.get_state()

    def state_dict(
        self, at: tuple[int, dict[str, Tensor], Tensor] | None = None
    ) -> dict[str, Any]:
        """Return everything that a resumed run needs: plain numbers, text and CPU tensors.

        Args:
            at: What :meth:`mark` returned, for the state of then; None for that of now.
        """
        step, state, generator = self.mark() if at is None else at
        tensors: dict[str, Tensor] = {f"state.{k}": v.cpu() for k, v in state.items()}
        tensors["generator"] = generator
        return {"strategy": repr(self.strategy), "step": step, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Args:
            state: What :meth:`state_dict` returned, of a selector with an equal strategy.

        Raises:
            ValueError: The state belongs to another strategy. Nothing is changed then.
        """
        if state["strategy"] != repr(self.strategy):
            raise ValueError(
                f"Selector: state must come from {self.strategy!r}, got {state['strategy']}. "
                "Resume with the strategy and hyper-parameters that wrote the checkpoint."
            )
        tensors = state["tensors"]
        self._state = {
            name.removeprefix("state."): value.clone()
            for name, value in tensors.items()
            if name.startswith("state.")
        }
        self._generator.set_state(tensors["generator"])
        self.step = int(state["step"])

    def load_states(self, states: Sequence[dict[str, Any]], rank: int, ranks: int) -> None:
        """Continue one of several selectors that decided alone, whatever their number is now.

        With as many ranks as there are states, each takes its own. Otherwise a rank takes the
        state of its number, counted round, with what the strategy's ``merge`` unites of the others;
        ranks that there were not before keep the fresh generator that they were built with.

        Args:
            states: What :meth:`state_dict` returned on each rank, in their order.
            rank: This rank.
            ranks: Number of ranks now.

        Raises:
            ValueError: A state belongs to another strategy. Nothing is changed then.
        """
        fresh, count = self._generator.get_state(), len(states)
        self.load_state_dict(states[rank % count])
        if ranks == count:
            return
        prefix = "state."
        own_first = [states[(rank + i) % count]["tensors"] for i in range(count)]
        parts = [
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for tensors in own_first
        ]
        self._state = {name: value.clone() for name, value in self.strategy.merge(parts).items()}
        if rank >= count:
            self._generator.set_state(fresh)
