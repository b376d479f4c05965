"""Asks a strategy, and holds it to the contract: what it must be, answer, and leave as it is.

Whoever writes a method of his own meets the contract here, at the first call and in words, and not
later as a checkpoint that does not continue or as an error inside of a host.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from functools import cached_property
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from onlinesel.types import Normalize, Selection, Signals, State, Strategy

__all__ = ["begin", "check_strategy", "decide", "learn"]

_SIGNALS = tuple(f.name for f in fields(Signals))
_OBSERVED = ("loss",)  # what training forwards give for nothing
_LARGE = 64  # containers above this size are compared by identity and length alone
_FIXED = (str, int, float, bool, type(None))
_ABSENT = object()
_KEEP_IN_STATE = (
    "Keep what it remembers in the state: return it from init() as tensors, and give the new one "
    "back. Only the state is in a checkpoint."
)


def _refuse(
    strategy: Strategy, argument: str, rule: str, got: object, remedy: str, kind: type = ValueError
) -> NoReturn:
    raise kind(f"{type(strategy).__name__}: {argument} must {rule}, got {got}. {remedy}")


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy whose declarations a host could not follow.

    Args:
        strategy: The method.

    Raises:
        ValueError: ``needs``, ``observes`` or ``normalize`` hold what nobody provides.
        TypeError: They are of the wrong type, or ``select`` takes other arguments.
    """
    for name, known in (("needs", _SIGNALS), ("observes", _OBSERVED)):
        value = getattr(strategy, name)
        if not isinstance(value, tuple | list):
            _refuse(
                strategy, name, "be a tuple of names", repr(value),
                f"Write {name} = ({str(value)!r},), with the comma.", TypeError,
            )  # fmt: skip
        unknown = [n for n in value if n not in known]
        if unknown:
            _refuse(
                strategy, name, f"be among {', '.join(known)}", unknown,
                "Name the signals as the fields of onlinesel.Signals.",
            )  # fmt: skip
    if strategy.normalize not in get_args(Normalize):
        _refuse(
            strategy, "normalize", "be 'tokens', 'samples' or 'rows'", repr(strategy.normalize),
            "'tokens' is the mean over labelled tokens, 'samples' that over the rows' means.",
        )  # fmt: skip
    try:
        inspect.signature(strategy.select).bind(None, {}, keep=1, step=0, generator=None)
    except TypeError as error:
        raise TypeError(
            f"{type(strategy).__name__}: select must take (self, signals, state, *, keep, step, "
            f"generator), got {inspect.signature(strategy.select)}. Take them all; what select "
            "does not use may go into **unused."
        ) from error


def begin(strategy: Strategy) -> State:
    """Return the strategy's state before the first step.

    Raises:
        TypeError: It is no mapping of names to tensors.
    """
    with _Untouched(strategy, "init", {}):
        return _checked_state(strategy, "init", strategy.init())


def decide(
    strategy: Strategy,
    signals: Signals,
    state: State,
    *,
    keep: int,
    step: int,
    generator: torch.Generator,
) -> tuple[Selection, State]:
    """Ask a strategy about one set of candidates; arguments as :meth:`Strategy.select`.

    Raises:
        ValueError: It reads a signal that it does not name in ``needs``, keeps what it remembers
            on itself or in the old state's tensors, or weighs another number of rows.
        TypeError: It returns something else than a selection and a state.
    """
    with _Untouched(strategy, "select", state):
        try:
            answer = strategy.select(
                signals, dict(state), keep=keep, step=step, generator=generator
            )
        except (TypeError, AttributeError) as error:
            _explain_needs(strategy, signals, error)
            raise
    if not (
        isinstance(answer, tuple)
        and len(answer) == 2
        and isinstance(answer[0], Selection)
    ):  # fmt: skip
        _refuse(
            strategy, "select", "return a Selection and the new state", _shown(answer),
            "Write return Selection(weights), state.", TypeError,
        )  # fmt: skip
    selection, after = answer
    if selection.weights.dim() == 0 or selection.weights.shape[0] != signals.size:
        _refuse(
            strategy, "weights", f"have one row per candidate ({signals.size})",
            tuple(selection.weights.shape), "Return 0 for rows that drop.",
        )  # fmt: skip
    return selection, _checked_state(strategy, "select", after)


def learn(strategy: Strategy, signals: Signals, state: State) -> State:
    """Let a strategy observe the rows that trained; arguments as :meth:`Strategy.observe`.

    Raises:
        ValueError: It keeps what it remembers on itself or in the old state's tensors.
        TypeError: It returns something else than a state.
    """
    with _Untouched(strategy, "observe", state):
        after = strategy.observe(signals, dict(state))
    return _checked_state(strategy, "observe", after)


def _checked_state(strategy: Strategy, method: str, state: object) -> State:
    if isinstance(state, dict):
        wrong = next((i for i in state.items() if not isinstance(i[1], Tensor)), None)
        if wrong is None and all(isinstance(name, str) for name in state):
            return state
        shown = "keys that are no text" if wrong is None else f"{_shown(wrong[1])} at {wrong[0]!r}"
    else:
        shown = _shown(state)
    _refuse(
        strategy, f"state that {method} returns", "be a dict of names to tensors", shown,
        "Write torch.tensor(value) for a number, and return {} where nothing is remembered.",
        TypeError,
    )  # fmt: skip


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return "None" if value is None else type(value).__name__


def _explain_needs(strategy: Strategy, signals: Signals, error: Exception) -> None:
    """Say which signal was read and not asked for, if that may be why a method failed."""
    if isinstance(error, FrozenInstanceError):
        _refuse(strategy, "select", "leave the strategy as it is", error, _KEEP_IN_STATE)
    read: set[str] = set()
    trace = error.__traceback__
    while trace is not None:
        read |= {*trace.tb_frame.f_code.co_names}
        trace = trace.tb_next
    present, needs = signals.present(), tuple(strategy.needs)
    missing = [n for n in _SIGNALS if n in read and n not in present and n not in needs]
    if missing:
        wanted = (*needs, *missing)
        raise ValueError(
            f"{type(strategy).__name__}: needs must name every signal that select reads, got "
            f"{needs}, and a read of {', '.join(missing)}, which nobody computed ({error}). "
            f"Write needs = {wanted!r}."
        ) from error


class _Untouched:
    """Holds what a strategy must leave as it is during a call: itself, and the old state."""

    def __init__(self, strategy: Strategy, method: str, state: Mapping[str, Tensor]) -> None:
        self._strategy, self._method = strategy, method
        # What cannot change in place needs no mark: it is another object after a change.
        self._settings = {
            name: (value, None if isinstance(value, _FIXED) else _mark(value))
            for name, value in vars(strategy).items()
        }
        self._state = [(name, value, _version(value)) for name, value in state.items()]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        names = [n for n, value in vars(self._strategy).items() if self._changed(n, value)]
        if names:
            _refuse(
                self._strategy, self._method, "leave the strategy as it is",
                f"another {', '.join(names)} on self", _KEEP_IN_STATE,
            )  # fmt: skip
        moved = [name for name, value, version in self._state if _version(value) != version]
        if moved:
            _refuse(
                self._strategy, self._method, "leave the tensors of the old state as they are",
                f"another {', '.join(moved)} in place",
                "A step that is interrupted goes on from the old state. Write "
                f"{{**state, {moved[0]!r}: state[{moved[0]!r}] + ...}}.",
            )  # fmt: skip

    def _changed(self, name: str, value: object) -> bool:
        before, mark = self._settings.get(name, (_ABSENT, None))
        if before is value and mark is None:
            return False
        # Derived, not remembered.
        if isinstance(getattr(type(self._strategy), name, None), cached_property):
            return False
        return before is _ABSENT or _mark(value) != (_mark(before) if mark is None else mark)


def _mark(value: Any) -> Any:
    """Return something that differs after a change, cheap also where the value is large."""
    if isinstance(value, _FIXED):
        return (type(value), repr(value))  # nan is itself
    if isinstance(value, Tensor):
        return (_Same(value), _version(value))
    if isinstance(value, Strategy) or not hasattr(value, "__len__"):
        return _Same(value)
    size = len(value)
    return (_Same(value), size, repr(value) if size <= _LARGE else None)


class _Same:
    """Equal to another of the same object, which it keeps alive: its address is not given away."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]


def _version(value: Tensor) -> int:
    """Return the count of changes in place; a tensor of inference mode has none."""
    return -1 if value.is_inference() else value._version
