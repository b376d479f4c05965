from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from onlinesel import Chain, Selection, Selector, Signals, Strategy, When
from onlinesel.ledger import Ledger
from onlinesel.strategies import InfoBatch, LossReweight, SelectiveBackprop, TopLoss, Uniform

NAN = float("nan")
LOSS = torch.tensor([1.0, 4.0, 2.0, 3.0])


@dataclass(frozen=True)
class Counter(Strategy):
    """Remembers what it was asked and draws once."""

    needs = ("loss",)
    observes = ("loss",)

    def init(self) -> dict[str, torch.Tensor]:
        return {"calls": torch.tensor(0), "seen": torch.tensor(0.0)}

    def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
        drawn = torch.rand((), generator=generator)
        metrics = {"keep": torch.tensor(keep), "at": torch.tensor(step), "drawn": drawn}
        weights = torch.ones(signals.size)
        return Selection(weights, None, metrics), {**state, "calls": state["calls"] + 1}

    def observe(self, signals, state):  # type: ignore[no-untyped-def]
        return {**state, "seen": state["seen"] + signals.loss.sum()}


@dataclass(frozen=True)
class Wrong(Strategy):
    def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
        return Selection(torch.ones(signals.size + 1)), state


def test_keep_defaults_to_all_and_is_cut_to_what_there_is() -> None:
    selector, signals = Selector(Counter()), Signals(loss=LOSS)
    asked = [selector.select(signals, keep=k).metrics["keep"].item() for k in (None, 2, 4, 9)]
    assert asked == [4, 2, 4, 4]


def test_steps_are_counted_unless_given() -> None:
    selector, signals = Selector(Counter()), Signals(loss=LOSS)
    at = [selector.select(signals, step=s).metrics["at"].item() for s in (None, None, 10, None)]
    assert at == [0, 1, 10, 11] and selector.step == 12


def test_observations_reach_the_strategy() -> None:
    selector = Selector(Counter())
    selector.observe(Signals(loss=LOSS))
    assert selector.state_dict()["tensors"]["state.seen"].item() == 10.0


def test_the_state_continues_where_it_was_taken() -> None:
    first = Selector(Counter(), seed=1)
    for _ in range(3):
        first.select(Signals(loss=LOSS))
    saved = first.state_dict()
    second = Selector(Counter(), seed=2)
    second.load_state_dict(saved)
    assert second.step == 3 and saved["strategy"] == "Counter()"
    drawn = [s.select(Signals(loss=LOSS)).metrics["drawn"].item() for s in (first, second)]
    assert drawn[0] == drawn[1]
    assert second.state_dict()["tensors"]["state.calls"].item() == 4
    assert saved["tensors"]["state.calls"].item() == 3
    third = Selector(Counter())
    third.load_state_dict(saved)
    saved["tensors"]["state.calls"].zero_()
    assert third.state_dict()["tensors"]["state.calls"].item() == 3


def test_the_state_of_another_strategy_is_refused_and_changes_nothing() -> None:
    selector = Selector(TopLoss())
    selector.select(Signals(loss=LOSS), keep=1)
    before = selector.state_dict()
    message = (
        r"^Selector: state must come from TopLoss\(lowest=False\), got TopLoss\(lowest=True\)\. "
        r"Resume with the strategy and hyper-parameters that wrote the checkpoint\.$"
    )
    with pytest.raises(ValueError, match=message):
        selector.load_state_dict(Selector(TopLoss(lowest=True), seed=4).state_dict())
    after = selector.state_dict()
    assert after["step"] == before["step"] == 1
    assert torch.equal(after["tensors"]["generator"], before["tensors"]["generator"])


@pytest.mark.parametrize("keep", [0, -3])
def test_keeping_nothing_is_refused(keep: int) -> None:
    message = rf"^Selector: keep must be at least 1, got {keep}\. Say how many rows train\.$"
    with pytest.raises(ValueError, match=message):
        Selector(TopLoss()).select(Signals(loss=LOSS), keep=keep)


@pytest.mark.parametrize("strategy", [TopLoss, "top", None])
def test_something_that_is_no_strategy_is_refused(strategy: Any) -> None:
    message = r"^Selector: strategy must be a Strategy instance, got .*\. Pass the method itself, "
    with pytest.raises(TypeError, match=message):
        Selector(strategy)


def test_weights_of_another_length_are_refused() -> None:
    message = (
        r"^Wrong: weights must have one row per candidate \(4\), got \(5,\)\. "
        r"Return 0 for rows that drop\.$"
    )
    selector = Selector(Wrong())
    with pytest.raises(ValueError, match=message):
        selector.select(Signals(loss=LOSS))
    assert selector.step == 0


def test_metrics_by_hand() -> None:
    selector = Selector(TopLoss())
    assert selector.metrics() == {}
    loss = torch.tensor([1.0, 4.0, float("nan"), 3.0, float("inf")])
    signals = Signals(loss=loss, tokens=torch.tensor([1, 2, 3, 8, 6]))
    selector.select(signals, keep=2)
    assert selector.metrics() == {
        "kept_share": pytest.approx(2 / 5),
        "ess": 1.0,
        "nonfinite": 2.0,
        "score_kept": 3.5,
        "score_dropped": 1.0,
        "length_bias": 1.25,
    }


def test_the_effective_size_shows_uneven_weights() -> None:
    selector = Selector(LossReweight.paper(kind="linear"))
    selection = selector.select(Signals(loss=LOSS))
    w = selection.weights.double()
    assert selector.metrics()["ess"] == pytest.approx((w.sum() ** 2 / w.square().sum() / 4).item())
    assert selector.metrics()["ess"] < 0.9


def test_metrics_of_a_step_that_keeps_nothing() -> None:
    selector = Selector(TopLoss())
    selector.select(Signals(loss=torch.full((3,), float("nan")), tokens=torch.ones(3).long()))
    assert selector.metrics() == {"kept_share": 0.0, "nonfinite": 3.0}


def test_metrics_when_the_host_saved_the_scores_of_a_step_that_needs_none() -> None:
    selector = Selector(When(TopLoss(), start=5, otherwise=Uniform()))
    selector.select(Signals(ids=torch.arange(4)), keep=2)
    assert selector.metrics() == {"kept_share": 0.5, "ess": 1.0}


def test_an_embedding_counts_once_a_row_in_nonfinite() -> None:
    @dataclass(frozen=True)
    class Far(Strategy):
        needs = ("embedding",)

        def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
            return Selection(torch.ones(signals.size)), state

    selector = Selector(Far())
    embedding = torch.tensor([[1.0, float("nan")], [float("nan")] * 2, [0.0, 0.0]])
    selector.select(Signals(embedding=embedding))
    assert selector.metrics()["nonfinite"] == 2.0


def test_a_row_without_a_finite_signal_never_trains_whatever_the_method_says() -> None:
    class All(Strategy):
        needs = ("loss",)

        def select(self, signals: Signals, state: Any, **_: Any) -> Any:
            return Selection(torch.ones(signals.size)), state

    signals = Signals(loss=torch.tensor([1.0, float("nan"), float("inf")]))
    assert Selector(All()).select(signals).weights.tolist() == [1.0, 0.0, 0.0]


def ranks_alone(strategy: Strategy, count: int) -> list[dict[str, Any]]:
    """Return the states of ranks that chose among rows of their own."""
    states = []
    for rank in range(count):
        selector = Selector(strategy, seed=100 + rank)
        ids = torch.arange(3) + 10 * rank
        loss = torch.tensor([1.0, 2.0, 3.0]) + rank
        selector.select(Signals(ids=ids, loss=loss), keep=1)
        selector.observe(Signals(ids=ids, loss=loss))
        states.append(selector.state_dict())
    return states


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_that_decided_alone_go_on_in_any_number(ranks: int) -> None:
    strategy = Chain(InfoBatch(), SelectiveBackprop())
    states = ranks_alone(strategy, 2)
    for rank in range(ranks):
        selector = Selector(strategy, seed=7 + rank)
        fresh = selector._generator.get_state()
        selector.load_states(states, rank, ranks)
        found = selector.state_dict()
        own = states[rank % 2]
        history = {k: v for k, v in found["tensors"].items() if k.endswith("history")}
        assert all(torch.equal(v, own["tensors"][k]) for k, v in history.items()) and history
        generator = fresh if rank >= 2 else own["tensors"]["generator"]
        assert torch.equal(found["tensors"]["generator"], generator)
        start = "state.0."
        table = {k[len(start) :]: v for k, v in found["tensors"].items() if k.startswith(start)}
        known = Ledger.from_state(table).lookup(torch.tensor([0, 2, 10, 12]), "loss").tolist()
        if ranks == 2:  # each goes on with its own
            wanted = [[1.0, 3.0, NAN, NAN], [NAN, NAN, 2.0, 4.0]][rank]
        else:
            wanted = [1.0, 3.0, 2.0, 4.0]
        assert known == pytest.approx(wanted, nan_ok=True)


def test_states_of_another_strategy_are_refused() -> None:
    with pytest.raises(ValueError, match="Selector: state must come from TopLoss"):
        Selector(TopLoss()).load_states(ranks_alone(Uniform(), 2), 0, 1)


def test_a_window_unites_both_of_its_sides() -> None:
    strategy = When(InfoBatch(), start=5, otherwise=Uniform())
    selector = Selector(strategy)
    selector.load_states(ranks_alone(strategy, 3), 0, 1)
    tensors = selector.state_dict()["tensors"]
    start = "state.0."
    table = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    assert len(Ledger.from_state(table)) == 9
