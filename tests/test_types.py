from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from onlinesel import Selection, Selector, Signals, Strategy

NAN = float("nan")


def test_scores_become_float32_and_ids_stay_integers() -> None:
    signals = Signals(
        ids=torch.tensor([2**53 + 1, 1], dtype=torch.int64),
        loss=torch.tensor([1.0, 2.0], dtype=torch.float64),
        reward=torch.tensor([1, 0]),
        tokens=torch.tensor([3, 4], dtype=torch.int32),
    )
    assert signals.ids is not None and signals.ids.tolist() == [2**53 + 1, 1]
    assert {name: value.dtype for name, value in signals.present().items()} == {
        "ids": torch.int64,
        "loss": torch.float32,
        "reward": torch.float32,
        "tokens": torch.int64,
    }


def test_signals_are_detached_and_frozen() -> None:
    loss = torch.ones(2, requires_grad=True)
    signals = Signals(loss=loss * 2)
    assert signals.loss is not None and not signals.loss.requires_grad
    with pytest.raises(FrozenInstanceError):
        signals.loss = loss  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ids", "group", "tokens"])
def test_ids_as_floats_are_refused(name: str) -> None:
    message = (
        rf"^Signals: {name} must be an integer tensor, got torch\.float32\. "
        r"Carry ids as int64: floats lose integers above 2\*\*24\.$"
    )
    with pytest.raises(TypeError, match=message):
        Signals(**{name: torch.ones(2)})


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, "{}"),
        ({"loss": torch.ones(2), "reward": torch.ones(3)}, "{'loss': 2, 'reward': 3}"),
        ({"loss": torch.tensor(1.0)}, "{'loss': -1}"),
    ],
)
def test_signals_of_no_common_length_are_refused(
    fields: dict[str, torch.Tensor], sizes: str
) -> None:
    message = (
        "^"
        + re.escape(f"Signals: fields must be non-empty tensors of one length N, got {sizes}. ")
        + r"Give every signal one entry per candidate row\.$"
    )
    with pytest.raises(ValueError, match=message):
        Signals(**fields)


def test_a_missing_signal_names_who_needs_it() -> None:
    @dataclass(frozen=True)
    class Mine(Strategy):
        needs = ("loss", "entropy")

        def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    message = (
        r"^Mine: signals must hold 'entropy', got \['ids', 'loss'\]\. "
        r"Use a scorer that provides 'entropy'\.$"
    )
    signals = Signals(loss=torch.ones(1), ids=torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        signals.require(Mine(), "entropy")
    assert signals.require(Mine(), "loss").tolist() == [1.0]


def test_rows_are_taken_from_every_field_in_the_order_asked_for() -> None:
    signals = Signals(
        ids=torch.tensor([7, 8, 9]),
        loss=torch.tensor([0.1, 0.2, 0.3]),
        embedding=torch.arange(6.0).view(3, 2),
    )
    part = signals.take(torch.tensor([2, 0]))
    assert part.row_ids().tolist() == [9, 7]
    assert part.embedding is not None and part.embedding.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert part.reward is None
    mask = torch.tensor([False, True, False])
    assert signals.take(mask).size == 1 and signals.to("cpu").size == 3


def test_row_numbers_stand_in_for_ids() -> None:
    assert Signals(loss=torch.ones(3)).row_ids().tolist() == [0, 1, 2]


def test_rows_of_a_selection() -> None:
    assert Selection(torch.tensor([0.0, 2.0, 0.5])).rows.tolist() == [1, 2]
    tokens = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert Selection(tokens).rows.tolist() == [1]
    assert Selection(torch.zeros(3)).rows.tolist() == []


def test_weights_become_float32_without_gradient() -> None:
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = Selection(weights).weights
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("bad", [-1.0, NAN, float("inf")])
def test_weights_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    message = (
        rf"^Selection: weights must be finite and >= 0, got \[1\.0, {bad}\]\. "
        r"Give non-finite rows weight 0\.$"
    )
    with pytest.raises(ValueError, match=message):
        Selection(torch.tensor([1.0, bad]))


def test_the_defaults_of_a_strategy() -> None:
    @dataclass(frozen=True)
    class Everything(Strategy):
        needs = ("loss",)

        def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
            return Selection(torch.ones(signals.size)), state

    strategy = Everything()
    state = {"a": torch.ones(1)}
    assert strategy.init() == {} and strategy.scorer_options == {}
    assert strategy.needs_at(5) == ("loss",) and strategy.normalize == "tokens"
    assert strategy.observe(Signals(loss=torch.ones(1)), state) is state
    assert strategy.epoch_plan(10, epoch=0, seed=0) is None
    assert Selector(strategy).select(Signals(loss=torch.ones(2))).weights.tolist() == [1.0, 1.0]


def test_a_strategy_must_select() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Strategy()  # type: ignore[abstract]
