"""What every strategy must do, whatever its method."""

from __future__ import annotations

import io
import json
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from onlinesel import Chain, Selection, Selector, Signals, Strategy, When, strategies
from tests.strategies.contract_table import CANDIDATES, CASES, Case, make_signals

KEEP = 5
WARM = 4
LABELS = ["Idea", "Paper", "Formula", "Cost", "When it loses", "If nothing qualifies"]

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def only(**wanted: bool) -> pytest.MarkDecorator:
    """Parametrise over the strategies of a kind."""
    chosen = {
        name: case
        for name, case in CASES.items()
        if all(getattr(case, key) == value for key, value in wanted.items())
    }
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def play(selector: Selector, steps: range) -> list[Tensor]:
    """Select and observe for some steps; return the weights."""
    found = []
    for step in steps:
        signals = make_signals(step)
        found.append(selector.select(signals, keep=KEEP).weights)
        selector.observe(signals.take(found[-1] > 0))
    return found


@every
def test_what_only_drops_has_nothing_to_drop_where_all_train(case: Case) -> None:
    """A host refuses it there; any other method does something even without more candidates."""
    selector = warm(case)
    weights = [selector.select(make_signals(step), keep=CANDIDATES).weights for step in range(8)]
    acts = any(not torch.equal(w, torch.ones(CANDIDATES)) for w in weights)
    plans = case.build().epoch_plan(8, epoch=0, seed=0) is not None
    assert (acts or plans) != case.build().drops_only


def warm(case: Case, seed: int = 0) -> Selector:
    """Return a selector whose state is no longer empty."""
    selector = Selector(case.build(), seed=seed)
    play(selector, range(WARM))
    return selector


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = a["tensors"], b["tensors"]
    return tensors[0].keys() == tensors[1].keys() and all(
        value.dtype == tensors[1][name].dtype and torch.equal(value, tensors[1][name])
        for name, value in tensors[0].items()
    )


def spoil(signals: Signals, names: tuple[str, ...], rows: Tensor, value: float) -> Signals:
    """Overwrite float signals of some rows."""
    spoilt = {}
    for name in names:
        tensor = getattr(signals, name).clone()
        if tensor.is_floating_point():
            tensor[rows] = value
            spoilt[name] = tensor
    return replace(signals, **spoilt)


def test_the_table_covers_every_strategy() -> None:
    assert {type(case.build()).__name__ for case in CASES.values()} == set(strategies.__all__)


def test_all_is_sorted() -> None:
    assert strategies.__all__ == sorted(strategies.__all__, key=str.lower)


@pytest.mark.parametrize("name", strategies.__all__)
def test_the_module_is_a_method_card(name: str) -> None:
    module = __import__(getattr(strategies, name).__module__, fromlist=["__doc__"])
    paragraphs = module.__doc__.split("\n\n")
    assert paragraphs[0].startswith(f"{name}: ")
    labelled = [re.match(r"([A-Z][\w ]*): ", text) for text in paragraphs[1:]]
    assert [match[1] for match in labelled if match] == LABELS


@every
def test_it_is_a_frozen_dataclass_whose_repr_builds_it_again(case: Case) -> None:
    strategy = case.build()
    assert isinstance(strategy, Strategy) and is_dataclass(strategy)
    assert eval(repr(strategy), vars(strategies)) == strategy
    for name in [f.name for f in fields(strategy)] + ["needs"]:
        with pytest.raises(FrozenInstanceError):
            setattr(strategy, name, None)


@every
def test_weights_are_finite_and_one_per_row(case: Case) -> None:
    for weights in play(Selector(case.build()), range(WARM)):
        assert weights.shape == (CANDIDATES,) and weights.dtype == torch.float32
        assert bool((torch.isfinite(weights) & (weights >= 0)).all())
        assert not weights.requires_grad


@only(chooses=True)
@pytest.mark.parametrize("keep", [1, KEEP, CANDIDATES])
def test_a_choosing_method_keeps_exactly_keep_rows_with_weight_one(case: Case, keep: int) -> None:
    weights = warm(case).select(make_signals(WARM), keep=keep).weights
    assert sorted(weights.tolist()) == [0.0] * (CANDIDATES - keep) + [1.0] * keep


@only(chooses=False)
def test_the_mean_weight_of_a_weighing_method_is_near_one(case: Case) -> None:
    means = [w.mean() for w in play(Selector(case.build()), range(30))]
    limits = (0.2, 0.6) if case is CASES["SelectiveBackprop-paper"] else (0.9, 1.1)
    assert limits[0] < torch.stack(means).mean().item() < limits[1]


@every
@given(order=st.permutations(range(CANDIDATES)), keep=st.integers(1, CANDIDATES))
def test_the_order_of_the_candidates_does_not_matter(
    case: Case, order: list[int], keep: int
) -> None:
    one, other = warm(case), warm(case)
    signals, moved = make_signals(WARM), torch.tensor(order)
    weights = one.select(signals, keep=keep).weights
    assert torch.equal(other.select(signals.take(moved), keep=keep).weights, weights[moved])
    one.observe(signals)
    other.observe(signals.take(moved))
    assert same_state(one.state_dict(), other.state_dict())


@every
def test_the_same_seed_gives_the_same_answer(case: Case) -> None:
    first, second = warm(case, seed=3), warm(case, seed=3)
    assert same_state(first.state_dict(), second.state_dict())
    for a, b in zip(play(first, range(9)), play(second, range(9)), strict=True):
        assert torch.equal(a, b)


@every
def test_another_seed_gives_another_answer_if_and_only_if_it_is_random(case: Case) -> None:
    first, second = (torch.stack(play(Selector(case.build(), seed=s), range(12))) for s in (0, 1))
    assert torch.equal(first, second) != case.random


@every
def test_a_deterministic_method_leaves_the_generator_alone(case: Case) -> None:
    selector = Selector(case.build())
    before = selector.state_dict()["tensors"]["generator"]
    play(selector, range(WARM))
    after = selector.state_dict()["tensors"]["generator"]
    assert torch.equal(before, after) != case.random


@every
@pytest.mark.parametrize("saved_at", [0, 1, 6])
def test_a_resumed_run_equals_one_that_was_never_stopped(case: Case, saved_at: int) -> None:
    whole = Selector(case.build(), seed=5)
    expected = play(whole, range(10))
    stopped = Selector(case.build(), seed=5)
    play(stopped, range(saved_at))
    state = stopped.state_dict()
    plain = json.loads(json.dumps({k: v for k, v in state.items() if k != "tensors"}))
    resumed = Selector(case.build(), seed=99)
    resumed.load_state_dict({**plain, "tensors": load(save(state["tensors"]))})
    for got, want in zip(play(resumed, range(saved_at, 10)), expected[saved_at:], strict=True):
        assert torch.equal(got, want)
    assert same_state(resumed.state_dict(), whole.state_dict())


@every
def test_the_state_is_a_flat_mapping_of_tensors(case: Case) -> None:
    strategy = case.build()
    state = strategy.init()
    for step in range(3):
        signals = make_signals(step)
        generator = torch.Generator().manual_seed(step)
        selection, state = strategy.select(
            signals, state, keep=KEEP, step=step, generator=generator
        )
        state = strategy.observe(signals, state)
        assert isinstance(selection, Selection)
        assert all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
        assert all(v.is_contiguous() for v in state.values())
    torch.save(state, io.BytesIO())


@every
def test_nothing_that_is_handed_in_is_changed(case: Case) -> None:
    strategy, signals = case.build(), make_signals(0)
    state = strategy.init()
    for step in range(WARM):
        generator = torch.Generator().manual_seed(step)
        held = {**signals.present(), **{f"state.{k}": v for k, v in state.items()}}
        copies = {name: value.clone() for name, value in held.items()}
        _, after = strategy.select(signals, state, keep=KEEP, step=step, generator=generator)
        after = strategy.observe(signals, after)
        assert all(torch.equal(held[name], copies[name]) for name in held)
        assert {f"state.{name}" for name in state} == {n for n in held if n.startswith("state.")}
        state = after


@only(scored=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_never_kept(case: Case, value: float) -> None:
    bad = torch.tensor([0, 3, 7, 11])
    needs = case.build().needs
    for name in needs:
        selector = warm(case)
        signals = spoil(make_signals(WARM), (name,), bad, value)
        weights = selector.select(signals, keep=CANDIDATES).weights
        assert weights[bad].tolist() == [0.0] * 4
        if case.chooses:
            assert weights.sum().item() == CANDIDATES - 4
        # What was remembered is still usable: later rows are decided as ever.
        later = selector.select(make_signals(WARM + 1), keep=KEEP)
        assert later.rows.numel() == KEEP if case.chooses else later.rows.numel() > 0


@only(scored=True)
def test_if_no_row_is_finite_all_weights_are_zero(case: Case) -> None:
    everything = torch.arange(CANDIDATES)
    for selector in (Selector(case.build()), warm(case)):
        before = {k: v for k, v in selector.state_dict()["tensors"].items() if "state" in k}
        signals = spoil(make_signals(WARM), selector.strategy.needs, everything, float("nan"))
        weights = selector.select(signals, keep=KEEP).weights
        assert weights.tolist() == [0.0] * CANDIDATES
        after = selector.state_dict()["tensors"]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert selector.metrics()["nonfinite"] == CANDIDATES


@every
def test_only_the_signals_it_needs_are_read(case: Case) -> None:
    strategy, signals = case.build(), make_signals(0)
    least = Signals(**{n: getattr(signals, n) for n in (*strategy.needs, "ids")})
    want = Selector(strategy).select(signals, keep=KEEP).weights
    assert torch.equal(Selector(strategy).select(least, keep=KEEP).weights, want)


@every
def test_a_missing_signal_is_named(case: Case) -> None:
    strategy, signals = case.build(), make_signals(0)
    for name in strategy.needs:
        without = replace(signals, **{name: None})
        message = (
            rf"^{type(strategy).__name__}: signals must hold '{name}', got .*\. "
            rf"Use a scorer that provides '{name}'\.$"
        )
        with pytest.raises(ValueError, match=message):
            Selector(strategy).select(without, keep=KEEP)


@every
def test_it_works_in_a_chain(case: Case) -> None:
    alone, chained = Selector(case.build(), seed=2), Selector(Chain(case.build()), seed=2)
    for a, b in zip(play(alone, range(6)), play(chained, range(6)), strict=True):
        assert torch.equal(a, b)
    assert chained.strategy.needs == alone.strategy.needs
    assert chained.strategy.normalize == alone.strategy.normalize


@every
def test_it_works_in_a_window(case: Case) -> None:
    alone = Selector(case.build(), seed=2)
    window = Selector(When(case.build(), start=2, stop=4), seed=2)
    results = []
    for step in range(6):
        signals = make_signals(step)
        results.append(window.select(signals, keep=KEEP).weights)
        want = alone.select(signals, keep=KEEP).weights if 2 <= step < 4 else torch.ones(12)
        assert torch.equal(results[-1], want)
        alone.observe(signals)
        window.observe(signals)


@every
def test_the_metrics_are_numbers(case: Case) -> None:
    selector = warm(case)
    found = selector.metrics()
    assert 0 < found["kept_share"] <= 1 and 0 < found["ess"] <= 1 + 1e-6
    assert all(isinstance(value, float) and value == value for value in found.values())
