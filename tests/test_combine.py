from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from onlinesel import Chain, Selection, Selector, Signals, Strategy, When
from onlinesel.strategies import (
    RS2,
    UDS,
    InfoBatch,
    LossReweight,
    SelectiveBackprop,
    TopLoss,
    Uniform,
)

LOSS = torch.tensor([1.0, 4.0, 2.0, 3.0])


@dataclass(frozen=True)
class Fixed(Strategy):
    """Gives set weights, counts its calls, and reports them."""

    weights: tuple[Any, ...]
    name: str = "fixed"

    def init(self) -> dict[str, torch.Tensor]:
        return {"calls": torch.tensor(0), "observed": torch.tensor(0)}

    def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
        metrics = {self.name: torch.tensor(float(len(self.weights)))}
        scores = torch.tensor(self.weights) if self.name == "scored" else None
        after = {**state, "calls": state["calls"] + 1}
        return Selection(torch.tensor(self.weights), scores, metrics), after

    def observe(self, signals, state):  # type: ignore[no-untyped-def]
        return {**state, "observed": state["observed"] + signals.size}


def test_a_chain_multiplies() -> None:
    chain = Chain(Fixed((1.0, 0.0, 2.0, 3.0)), Fixed((0.5, 4.0, 0.0, 2.0)))
    weights = Selector(chain).select(Signals(loss=LOSS)).weights
    assert weights.tolist() == [0.5, 0.0, 0.0, 6.0]


def test_a_chain_multiplies_weights_of_rows_and_of_tokens() -> None:
    rows, tokens = Fixed((2.0, 0.0)), Fixed(((1.0, 3.0), (5.0, 7.0)))
    for chain in (Chain(rows, tokens), Chain(tokens, rows)):
        found = Selector(chain).select(Signals(loss=LOSS[:2]))
        assert found.weights.tolist() == [[2.0, 6.0], [0.0, 0.0]]
        assert found.rows.tolist() == [0]


def test_a_row_trains_if_every_part_gives_it_weight() -> None:
    chain = Chain(TopLoss(), LossReweight.paper("linear"))
    selection = Selector(chain).select(Signals(loss=LOSS), keep=2)
    assert selection.rows.tolist() == [1, 3]
    alone = Selector(LossReweight.paper("linear")).select(Signals(loss=LOSS)).weights
    assert torch.equal(selection.weights[selection.rows], alone[[1, 3]])


def test_a_chain_joins_what_its_parts_declare() -> None:
    chain = Chain(UDS(), InfoBatch(), LossReweight())
    assert chain.needs == ("nuclear_norm", "embedding", "ids", "loss")
    assert chain.observes == ("loss",)
    assert chain.normalize == "samples" and Chain(LossReweight(), UDS()).normalize == "tokens"
    assert chain.scorer_options == UDS().scorer_options
    assert Chain(When(TopLoss(), start=3), Uniform()).needs_at(0) == ()
    assert Chain(When(TopLoss(), start=3), LossReweight()).needs_at(3) == ("loss",)


def test_the_report_sees_the_first_scores_and_all_metrics() -> None:
    ones = (1.0, 1.0)
    chain = Chain(Fixed(ones, "a"), Fixed((3.0, 4.0), "scored"), Fixed((9.0, 9.0), "scored"))
    selection = Selector(chain).select(Signals(loss=LOSS[:2]))
    assert selection.scores is not None and selection.scores.tolist() == [3.0, 4.0]
    assert sorted(selection.metrics) == ["a", "scored"]


def test_every_part_keeps_its_own_state() -> None:
    chain = Chain(Fixed((1.0,)), Chain(Fixed((1.0,)), SelectiveBackprop()))
    selector = Selector(chain)
    selector.select(Signals(loss=torch.tensor([2.5])))
    selector.observe(Signals(loss=torch.ones(1)))
    tensors = selector.state_dict()["tensors"]
    names = ["0.calls", "0.observed", "1.0.calls", "1.0.observed", "1.1.history"]
    assert sorted(n for n in tensors if n != "generator") == [f"state.{name}" for name in names]
    assert tensors["state.1.1.history"].tolist() == [2.5]
    assert tensors["state.0.calls"] == tensors["state.1.0.observed"] == 1


def test_more_than_ten_parts_do_not_mix_their_states() -> None:
    chain = Chain(*[Fixed((1.0,)) for _ in range(11)])
    selector = Selector(chain)
    selector.select(Signals(loss=torch.ones(1)))
    counts = [v.item() for k, v in selector.state_dict()["tensors"].items() if "calls" in k]
    assert counts == [1] * 11


@pytest.mark.parametrize("parts", [(), (TopLoss,), (TopLoss(), "uniform")])
def test_a_chain_of_something_else_is_refused(parts: tuple[Any, ...]) -> None:
    message = r"^Chain: parts must be one or more strategies, got \(.*\)\. Write Chain\(UDS\(\), "
    with pytest.raises(ValueError, match=message):
        Chain(*parts)


def test_parts_that_score_differently_are_refused() -> None:
    message = (
        r"^Chain: parts must agree on the scorer option 'length', got 'raw' and 'sqrt'\. "
        r"Give both parts the same setting\.$"
    )
    with pytest.raises(ValueError, match=message):
        Chain(UDS(), UDS(length="sqrt"))
    with pytest.raises(ValueError, match="parts must agree on the scorer option 'length'"):
        When(UDS(), otherwise=UDS(length="sqrt"))


def test_a_window_opens_and_closes() -> None:
    when = When(TopLoss(), start=3, stop=10, every=3)
    assert [step for step in range(14) if when.active(step)] == [3, 6, 9]
    assert [step for step in range(4) if When(TopLoss(), start=2).active(step)] == [2, 3]


def test_outside_its_window_every_row_trains() -> None:
    selector = Selector(When(TopLoss(), start=1, stop=2))
    kept = [selector.select(Signals(loss=LOSS), keep=1).weights.tolist() for _ in range(3)]
    assert kept == [[1.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0] * 4]


def test_outside_its_window_the_other_strategy_decides() -> None:
    when = When(TopLoss(), start=1, otherwise=TopLoss(lowest=True))
    selector = Selector(when)
    kept = [selector.select(Signals(loss=LOSS), keep=1).rows.tolist() for _ in range(2)]
    assert kept == [[0], [1]]


def test_a_window_needs_only_what_its_turn_needs() -> None:
    when = When(UDS(), start=2, otherwise=TopLoss())
    assert when.needs == ("nuclear_norm", "embedding", "loss")
    assert when.needs_at(1) == ("loss",) and when.needs_at(2) == ("nuclear_norm", "embedding")
    assert When(UDS(), start=2).needs_at(0) == ()
    assert when.scorer_options == UDS().scorer_options
    assert When(LossReweight()).normalize == "samples"
    selector = Selector(When(TopLoss(), start=1))
    assert selector.select(Signals(ids=torch.arange(2))).weights.tolist() == [1.0, 1.0]


def test_selecting_moves_one_side_and_observing_both() -> None:
    selector = Selector(When(Fixed((1.0,)), start=1, otherwise=Fixed((1.0,), "other")))
    for _ in range(3):
        selector.select(Signals(loss=torch.ones(1)))
        selector.observe(Signals(loss=torch.ones(1)))
    state = selector.state_dict()["tensors"]
    assert (state["state.0.calls"], state["state.1.calls"]) == (2, 1)
    assert (state["state.0.observed"], state["state.1.observed"]) == (3, 3)


def test_a_window_keeps_nothing_that_its_strategy_has_dropped() -> None:
    """A ledger's runs are merged as they fill up; the keys of those that are gone go too."""
    window = When(InfoBatch(), start=0, otherwise=Uniform())
    selector, alone = Selector(window), Selector(InfoBatch())
    for step in range(40):
        ids = torch.arange(4) + 4 * step
        for each in (selector, alone):
            each.select(Signals(ids=ids))
            each.observe(Signals(ids=ids, loss=torch.ones(4)))
    keys = {name.removeprefix("0.") for name in selector._state if name.startswith("0.")}
    assert keys == set(alone._state)


def test_the_first_plan_is_used() -> None:
    plan = RS2(0.5).epoch_plan(10, epoch=2, seed=1)
    for combined in (
        Chain(TopLoss(), RS2(0.5), RS2(0.1)),
        When(RS2(0.5), stop=3),
        When(TopLoss(), otherwise=RS2(0.5)),
    ):
        found = combined.epoch_plan(10, epoch=2, seed=1)
        assert found is not None and torch.equal(found, plan)
    assert Chain(TopLoss(), Uniform()).epoch_plan(10, epoch=0, seed=0) is None


@pytest.mark.parametrize(
    "window", [{"start": -1}, {"start": 5, "stop": 5}, {"every": 0}, {"start": 3, "stop": 1}]
)
def test_an_empty_window_is_refused(window: dict[str, int]) -> None:
    message = (
        r"^When: start, stop and every must give a window 0 <= start < stop with every >= 1, "
        r"got \(-?\d+, (None|\d+), \d+\)\. Count optimizer steps from 0\.$"
    )
    with pytest.raises(ValueError, match=message):
        When(TopLoss(), **window)


def test_the_repr_tells_combinations_apart() -> None:
    assert repr(Chain(TopLoss())) == "Chain(parts=(TopLoss(lowest=False),))"
    assert repr(When(TopLoss(), start=1)) != repr(When(TopLoss(), start=2))
