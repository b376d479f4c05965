"""A method of one's own that does not keep to the contract is told so at its first call."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch

from onlinesel import Chain, Selection, Selector, Signals, Strategy, When
from onlinesel.quotas import PerGroup
from onlinesel.strategies import Uniform

SIGNALS = Signals(
    ids=torch.arange(4),
    loss=torch.tensor([1.0, 4.0, 2.0, 3.0]),
    group=torch.zeros(4, dtype=torch.int64),
)
ALL = torch.ones(4)

alone_and_inside = pytest.mark.parametrize(
    "within",
    [
        lambda s: s,
        lambda s: Chain(Uniform(), s),
        lambda s: When(s),
        lambda s: When(Uniform(), start=9, otherwise=s),
        PerGroup,
    ],
    ids=["alone", "Chain", "When", "otherwise", "PerGroup"],
)


class Own(Strategy):
    """Answers what it is given."""

    needs = ("loss",)

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return self.answer(signals, state)


ANSWERS = [
    (lambda signals, state: None, "None"),
    (lambda signals, state: ALL, "Tensor"),
    (lambda signals, state: Selection(ALL), "Selection"),
    (lambda signals, state: (ALL, state), r"\(Tensor, dict\)"),
    (lambda signals, state: (Selection(ALL), state, 1), r"\(Selection, dict, int\)"),
    (lambda signals, state: [Selection(ALL), state], "list"),
]


@alone_and_inside
@pytest.mark.parametrize(("answer", "shown"), ANSWERS)
def test_an_answer_that_is_no_selection_and_state(within: Any, answer: Any, shown: str) -> None:
    message = (
        rf"^Own: select must return a Selection and the new state, got {shown}\. "
        r"Write return Selection\(weights\), state\.$"
    )
    with pytest.raises(TypeError, match=message):
        Selector(within(Own(answer))).select(SIGNALS)


@alone_and_inside
@pytest.mark.parametrize(
    ("state", "shown"),
    [(None, "None"), ({"n": 1}, "int at 'n'"), ([], "list"), ({1: ALL}, "keys that are no text")],
)
def test_a_state_that_no_checkpoint_holds(within: Any, state: Any, shown: str) -> None:
    message = (
        rf"^Own: state that select returns must be a dict of names to tensors, got {shown}\. "
        r"Write torch\.tensor\(value\) for a number, and return \{\} where nothing is remembered"
    )
    with pytest.raises(TypeError, match=message):
        Selector(within(Own(lambda *_: (Selection(ALL), state)))).select(SIGNALS)


def test_the_first_state_and_what_observe_returns_are_held_to_it_too() -> None:
    class Begins(Own):
        def init(self) -> Any:
            return {"seen": 0}

    class Learns(Own):
        observes = ("loss",)

        def observe(self, signals: Signals, state: Any) -> Any:
            return None

    with pytest.raises(TypeError, match="^Begins: state that init returns must .*int at 'seen'"):
        Selector(Begins())
    with pytest.raises(TypeError, match="^Learns: state that observe returns must .*got None"):
        Selector(Learns()).observe(SIGNALS)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0] * 4, TypeError, "Selection: weights must be a tensor, got list. Write torch.tensor"),
        (ALL[:3], ValueError, r"Own: weights must have one row per candidate \(4\), got \(3,\)"),
        (ALL[0], ValueError, r"Own: weights must have one row per candidate \(4\), got \(\)"),
    ],
)
def test_weights_that_are_not_one_a_row(weights: Any, error: Any, message: str) -> None:
    strategy = Own(lambda signals, state: (Selection(weights), state))
    with pytest.raises(error, match=message):
        Selector(strategy).select(SIGNALS)


def test_scores_are_one_a_row_and_metrics_may_be_plain_numbers() -> None:
    with pytest.raises(TypeError, match="^Selection: scores must be a tensor, got list"):
        Selection(ALL, [1.0] * 4)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^Selection: scores must be one number a row \(4,\), got"
    ):
        Selection(ALL, ALL[:2])
    selector = Selector(Own(lambda s, state: (Selection(ALL, metrics={"mean": 2.5}), state)))
    selector.select(SIGNALS)
    assert selector.metrics()["mean"] == 2.5


# Declarations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("needs", "loss", TypeError, r"needs must be a tuple of names, got 'loss'. Write needs = "
         r"\('loss',\), with the comma"),
        ("needs", ("losses",), ValueError, r"needs must be among ids, loss, .*got \['losses'\]"),
        ("observes", ("entropy",), ValueError, r"observes must be among loss, got \['entropy'\]"),
        ("normalize", "mean", ValueError, "normalize must be 'tokens', 'samples' or 'rows', got '"),
    ],
)  # fmt: skip
def test_declarations_that_nobody_can_follow(
    name: str, value: Any, error: Any, message: str
) -> None:
    kind = type("Mine", (Own,), {name: value})
    with pytest.raises(error, match=f"^Mine: {message}"):
        Selector(kind())


def test_a_select_that_takes_other_arguments() -> None:
    class Short(Strategy):
        def select(self, signals, state, keep, step):  # type: ignore[no-untyped-def, override]
            return Selection(ALL), state

    message = (
        r"^Short: select must take \(self, signals, state, \*, keep, step, generator\), got "
        r"\(signals, state, keep, step\)\. Take them all; .* \*\*unused\."
    )
    with pytest.raises(TypeError, match=message):
        Selector(Short())


@alone_and_inside
@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.entropy - s.entropy.mean(),
        lambda s: torch.where(s.entropy > 1, 1.0, 0.0),
        lambda s: helper(s),
    ],
)
def test_a_signal_that_is_read_and_not_named(within: Any, read: Any) -> None:
    strategy = Own(lambda signals, state: (Selection(read(signals)), state))
    message = (
        r"^Own: needs must name every signal that select reads, got \('loss',\), and a read of "
        r"entropy, which nobody computed \(.*\)\. Write needs = \('loss', 'entropy'\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        Selector(within(strategy)).select(SIGNALS)


def helper(signals: Signals) -> torch.Tensor:
    return signals.entropy.sigmoid()  # type: ignore[union-attr]


def test_a_signal_that_is_required_and_not_named() -> None:
    strategy = Own(lambda s, state: (Selection(s.require(strategy, "el2n")), state))
    message = (
        r"^Own: signals must hold 'el2n', got .* Name it in the class: needs = \('loss', 'el2n'"
    )
    with pytest.raises(ValueError, match=message):
        Selector(strategy).select(SIGNALS)


def test_a_mistake_of_another_kind_keeps_its_own_error() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        Selector(Own(lambda s, state: (Selection(s.loss + "1"), state))).select(SIGNALS)


# What it remembers ------------------------------------------------------------------------------


class Remembering(Strategy):
    """Keeps what it has seen on itself, in one way or another."""

    needs = ("loss",)

    def __init__(self, way: str) -> None:
        self.way, self.seen, self.table, self.mean = way, [], {}, torch.zeros(1)
        self.count, self.last, self.kinds = 0, deque(maxlen=2), Counter()

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        assert signals.loss is not None
        if self.way == "seen":
            self.seen.append(0)
        if self.way == "table":
            self.table[7] = 1
        if self.way == "mean":
            self.mean += signals.loss.mean()
        if self.way == "count":
            self.count += 1
        if self.way == "last":
            self.last.append(1)
        if self.way == "kinds":
            self.kinds["a"] += 1
        if self.way == "fresh":
            self.fresh = signals.loss
        return Selection(torch.ones(signals.size)), state


@alone_and_inside
@pytest.mark.parametrize("way", ["seen", "table", "mean", "count", "last", "kinds", "fresh"])
def test_what_is_kept_on_self_would_be_lost_and_is_refused(within: Any, way: str) -> None:
    message = (
        rf"^Remembering: select must leave the strategy as it is, got another {way} on self\. "
        r"Keep what it remembers in the state: return it from init\(\) as tensors"
    )
    with pytest.raises(ValueError, match=message):
        Selector(within(Remembering(way))).select(SIGNALS)


def test_what_leaves_itself_alone_passes() -> None:
    selector = Selector(Remembering("none"))
    assert [selector.select(SIGNALS).weights.tolist() for _ in range(2)] == [[1.0] * 4] * 2


@alone_and_inside
def test_a_frozen_one_that_assigns_is_told_where_to_keep_it(within: Any) -> None:
    @dataclass(frozen=True)
    class Frozen(Strategy):
        count: int = 0
        notes: list[int] = field(default_factory=list)

        def select(self, signals, state, **_):  # type: ignore[no-untyped-def]
            self.count = 1  # type: ignore[misc]
            return Selection(torch.ones(signals.size)), state

    with pytest.raises(ValueError, match="^Frozen: select must leave .* Keep what it remembers in"):
        Selector(within(Frozen())).select(SIGNALS)


def test_what_observe_keeps_on_self_is_refused_too() -> None:
    class Watching(Own):
        observes = ("loss",)

        def observe(self, signals: Signals, state: Any) -> Any:
            self.seen = signals.loss
            return state

    with pytest.raises(
        ValueError, match="^Watching: observe must leave .*got another seen on self"
    ):
        Selector(Watching()).observe(SIGNALS)


def test_what_is_derived_from_the_settings_once_is_no_state() -> None:
    class Derived(Own):
        @cached_property
        def half(self) -> torch.Tensor:
            return torch.tensor(0.5)

        def select(self, signals: Signals, state: Any, **_: Any) -> Any:
            return Selection(ALL * self.half), state

    assert Selector(Derived()).select(SIGNALS).weights.tolist() == [0.5] * 4


class Sums(Strategy):
    """Sums losses in the state, as it should or in place."""

    needs = ("loss",)

    def __init__(self, way: str) -> None:
        self.way = way

    def init(self) -> Any:
        return {"sum": torch.zeros(())}

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        assert signals.loss is not None
        if self.way == "in place":
            state["sum"] += signals.loss.sum()
        elif self.way == "in the dict":
            state["sum"] = state["sum"] + signals.loss.sum()
        else:
            state = {**state, "sum": state["sum"] + signals.loss.sum()}
        return Selection(torch.ones(signals.size)), state


def test_a_state_that_is_changed_in_place_is_refused() -> None:
    message = (
        r"^Sums: select must leave the tensors of the old state as they are, got another sum in "
        r"place\. .* Write \{\*\*state, 'sum': state\['sum'\] \+ \.\.\.\}\.$"
    )
    with pytest.raises(ValueError, match=message):
        Selector(Sums("in place")).select(SIGNALS)


@pytest.mark.parametrize("way", ["new", "in the dict"])
def test_the_old_state_is_still_what_it_was(way: str) -> None:
    selector = Selector(Sums(way))
    before = selector.state_dict()
    selector.select(SIGNALS)
    assert before["tensors"]["state.sum"].item() == 0.0
    assert selector.state_dict()["tensors"]["state.sum"].item() == 10.0
