from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Chain, Selection, Selector, Signals, Strategy, When, quotas
from onlinesel.quotas import PerGroup, apportion
from onlinesel.strategies import (
    RS2,
    UDS,
    GradNorm,
    InfoBatch,
    LossReweight,
    SelectiveBackprop,
    TopLoss,
    Uniform,
)
from tests.strategies.contract_table import make_signals

NAN = float("nan")


@dataclass(frozen=True)
class Told(Strategy):
    """Keeps the first rows, and writes down in its state what it was asked."""

    needs = ("loss",)
    observes = ("loss",)

    def init(self) -> dict[str, torch.Tensor]:
        return {"calls": torch.zeros(0, 3), "observed": torch.tensor(0)}

    def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
        drawn = torch.rand((), generator=generator)
        call = torch.tensor([float(signals.group[0]), keep, drawn])
        weights = torch.zeros(signals.size)
        weights[:keep] = 2.0
        metrics = {"size": torch.tensor(float(signals.size))}
        after = {**state, "calls": torch.cat([state["calls"], call[None]])}
        return Selection(weights, signals.loss * 10, metrics), after

    def observe(self, signals, state):  # type: ignore[no-untyped-def]
        return {**state, "observed": state["observed"] + signals.size}

    def merge(self, states):  # type: ignore[no-untyped-def]
        return {"calls": torch.cat([state["calls"] for state in states])}


def rows_of(groups: list[int], loss: list[float] | None = None) -> Signals:
    size = len(groups)
    return Signals(
        ids=torch.arange(size) + 100,
        loss=torch.arange(size).float() if loss is None else torch.tensor(loss),
        group=torch.tensor(groups),
    )


def quotas_of(groups: list[int], keep: int, **kwargs: Any) -> dict[int, int]:
    """Return what each group was asked to keep."""
    selector = Selector(PerGroup(Told(), **kwargs))
    selector.select(rows_of(groups), keep=keep)
    calls = selector.state_dict()["tensors"]["state.calls"]
    return {int(group): int(quota) for group, quota, _ in calls}


# Dealing places out ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "weights", "limits", "places"),
    [
        (10, [6, 3, 1], [99, 99, 99], [6, 3, 1]),
        (3, [1, 1, 1, 1], [9, 9, 9, 9], [1, 1, 1, 0]),  # equal remainders: the first ones
        (5, [5, 3, 2], [9, 9, 9], [3, 1, 1]),  # 2.5, 1.5, 1.0: the tie goes to the first
        (7, [1, 2, 4], [9, 1, 9], [1, 1, 5]),  # 1 is left over: 1.2 and 4.8 of 6
        (10, [8, 1, 1], [2, 5, 5], [2, 4, 4]),
        (10, [8, 1, 1], [2, 3, 3], [2, 3, 3]),  # more places than anybody can use
        (4, [1, 0, 1], [9, 9, 1], [3, 0, 1]),  # a weight of 0 gets nothing even then
        (4, [0, 0], [9, 9], [0, 0]),
        (0, [1, 1], [9, 9], [0, 0]),
    ],
)
def test_places_are_dealt_by_the_largest_remainder(
    total: int, weights: list[int], limits: list[int], places: list[int]
) -> None:
    assert apportion(total, weights, limits) == places


pairs = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=6)


@given(total=st.integers(0, 40), pairs=pairs)
def test_places_sum_up_and_keep_to_the_limits(total: int, pairs: list[tuple[int, int]]) -> None:
    weights, limits = [list(column) for column in zip(*pairs, strict=True)]
    places = apportion(total, weights, limits)
    room = sum(limit for weight, limit in pairs if weight)
    assert sum(places) == min(total, room)
    assert all(0 <= place <= limit for place, limit in zip(places, limits, strict=True))
    assert all(weight or not place for place, weight in zip(places, weights, strict=True))
    whole = sum(weights)
    if whole and all(total * w <= limit * whole for w, limit in pairs):
        # Nobody is full: each is within one place of its exact part.
        assert all(
            abs(p - Fraction(total * w, whole)) < 1 for p, w in zip(places, weights, strict=True)
        )


# Quotas ---------------------------------------------------------------------------------------


def test_without_shares_groups_keep_their_part_of_the_candidates() -> None:
    groups = [5] * 6 + [1] * 3 + [-2] * 3
    assert quotas_of(groups, 4) == {-2: 1, 1: 1, 5: 2}
    assert quotas_of(groups, 6) == {-2: 2, 1: 1, 5: 3}  # 1.5, 1.5, 3: the tie goes to the lower
    assert quotas_of(groups, 12) == {-2: 3, 1: 3, 5: 6}
    assert quotas_of(groups, 1) == {5: 1}  # groups without a quota are not asked


def test_shares_are_exact_decimals() -> None:
    # In binary, 10 * 0.35 has a larger remainder than 10 * 0.15; in what was written they are
    # equal, and the place goes to the lower group.
    groups = [0] * 20 + [1] * 20 + [2] * 20
    assert quotas_of(groups, 10, shares={0: 0.15, 1: 0.35, 2: 0.5}) == {0: 2, 1: 3, 2: 5}
    assert quotas_of(groups, 10, shares={0: 0.35, 1: 0.15, 2: 0.5}) == {0: 4, 1: 1, 2: 5}
    third = 1 / 3
    assert quotas_of(groups, 7, shares={0: third, 1: third, 2: third}) == {0: 3, 1: 2, 2: 2}


def test_what_a_group_cannot_use_goes_to_the_others_by_their_shares() -> None:
    groups = [0] * 2 + [1] * 20 + [2] * 20
    assert quotas_of(groups, 12, shares={0: 0.5, 1: 0.4, 2: 0.1}) == {0: 2, 1: 8, 2: 2}
    assert quotas_of([1] * 5 + [2] * 5, 5, shares={0: 0.5, 1: 0.3, 2: 0.2}) == {1: 3, 2: 2}


def test_groups_that_are_not_named_divide_what_is_left() -> None:
    groups = [0] * 10 + [1] * 6 + [2] * 3
    assert quotas_of(groups, 9, shares={0: 1 / 3}) == {0: 3, 1: 4, 2: 2}
    assert quotas_of(groups, 6, shares={0: 0.0}) == {1: 4, 2: 2}
    # A group that is left out gets nothing, whatever is over.
    selection = Selector(PerGroup(TopLoss(), {0: 0.0})).select(rows_of(groups), keep=19)
    assert selection.rows.tolist() == list(range(10, 19))
    only = Selector(PerGroup(TopLoss(), {0: 0.0})).select(rows_of([0, 0]), keep=1)
    assert only.weights.tolist() == [0.0, 0.0] and only.scores is None


def test_a_group_for_which_nothing_is_left_is_an_error() -> None:
    selector = Selector(PerGroup(TopLoss(), shares={0: 0.7, 1: 0.3}))
    assert selector.select(rows_of([0, 0, 1]), keep=2).rows.tolist() == [1, 2]
    message = (
        r"^PerGroup: shares must leave something for group 4, got \{0: 0\.7, 1: 0\.3\}\. Name the "
        r"group \(with 0 to leave its rows out\), or let the shares sum to less than 1 for the "
        r"groups that they do not name\.$"
    )
    with pytest.raises(ValueError, match=message):
        selector.select(rows_of([0, 9, 4, 1]), keep=2)
    thirds = PerGroup(TopLoss(), shares={0: 1 / 3, 1: 2 / 3})  # 0.9999999999999999 as decimals
    with pytest.raises(ValueError, match="shares must leave something for group 2"):
        Selector(thirds).select(rows_of([0, 1, 2]), keep=2)


def test_rows_that_are_not_finite_give_their_quota_away() -> None:
    loss = [NAN, NAN, NAN, 1.0, 4.0, 2.0, 3.0, math.inf]
    signals = rows_of([0, 0, 0, 1, 1, 1, 1, 1], loss)
    weights = Selector(PerGroup(TopLoss())).select(signals, keep=3).weights
    assert weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    weights = Selector(PerGroup(TopLoss())).select(signals, keep=8).weights
    assert weights.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    # The quota follows the candidates, not the usable rows: 3 of 8 of 5 would be 2 for group 0.
    loss = [NAN, NAN, 9.0, 1.0, 4.0, 2.0, 3.0, 5.0]
    kept = Selector(PerGroup(TopLoss())).select(rows_of([0, 0, 0, 1, 1, 1, 1, 1], loss), keep=5)
    assert kept.rows.tolist() == [2, 4, 5, 6, 7]
    # A signal that nobody needs may be anything.
    kept = Selector(PerGroup(Uniform())).select(signals, keep=4)
    assert kept.rows.numel() == 4 and (kept.rows < 3).sum() in (1, 2)


def test_if_no_row_is_usable_all_weights_are_zero() -> None:
    selector = Selector(PerGroup(SelectiveBackprop()))
    before = selector.state_dict()["tensors"]
    selection = selector.select(rows_of([0, 1, 1], [NAN, math.inf, NAN]), keep=2)
    assert selection.weights.tolist() == [0.0] * 3
    after = selector.state_dict()["tensors"]
    assert all(torch.equal(before[name], after[name]) for name in before)


# What the strategy is asked -------------------------------------------------------------------


def test_state_and_generator_go_through_the_groups_in_ascending_order() -> None:
    selector = Selector(PerGroup(Told()), seed=4)
    selection = selector.select(rows_of([8, 3, 8, 3, 8, -1]), keep=3)
    calls = selector.state_dict()["tensors"]["state.calls"]
    generator = torch.Generator().manual_seed(4)
    draws = torch.stack([torch.rand((), generator=generator) for _ in range(3)])
    assert calls[:, :2].tolist() == [[-1, 1], [3, 1], [8, 1]]  # 0.5, 1 and 1.5 places
    assert torch.equal(calls[:, 2], draws)
    assert selection.weights.tolist() == [2.0, 2.0, 0.0, 0.0, 0.0, 2.0]


def test_scores_and_metrics_are_put_together() -> None:
    selection = Selector(PerGroup(Told(), {3: 0.0})).select(rows_of([7, 3, 7, 9, 7, 9]), keep=4)
    assert selection.scores is not None
    torch.testing.assert_close(
        selection.scores, torch.tensor([0.0, NAN, 20, 30, 40, 50]), equal_nan=True
    )
    assert selection.metrics["size"].item() == pytest.approx((3 * 3 + 2 * 2) / 5)


def test_weights_of_tokens_are_put_together() -> None:
    @dataclass(frozen=True)
    class Tokens(Strategy):
        def select(self, signals, state, *, keep, step, generator):  # type: ignore[no-untyped-def]
            return Selection(signals.loss[:, None] * torch.tensor([1.0, 2.0])), state

    weights = Selector(PerGroup(Tokens())).select(rows_of([1, 0, 1], [3.0, 4.0, 5.0])).weights
    assert weights.tolist() == [[3, 6], [4, 8], [5, 10]]


def test_it_declares_what_the_strategy_declares() -> None:
    method = PerGroup(LossReweight())
    assert method.needs == ("loss", "group") and method.normalize == "samples"
    assert PerGroup(InfoBatch()).observes == ("loss",)
    assert PerGroup(UDS()).scorer_options == UDS().scorer_options
    assert PerGroup(When(TopLoss(), start=2)).needs_at(1) == ("group",)
    assert PerGroup(When(TopLoss(), start=2)).needs_at(2) == ("loss", "group")
    plan = RS2(0.5).epoch_plan(10, epoch=2, seed=1)
    found = PerGroup(RS2(0.5)).epoch_plan(10, epoch=2, seed=1)
    assert found is not None and torch.equal(found, plan)
    assert PerGroup(TopLoss()).epoch_plan(10, epoch=0, seed=0) is None
    states = [{"calls": torch.ones(1, 3)}, {"calls": torch.zeros(2, 3)}]
    assert PerGroup(Told()).merge(states)["calls"].sum(dim=1).tolist() == [3, 0, 0]


def test_the_strategy_observes() -> None:
    selector = Selector(PerGroup(Told()))
    selector.observe(Signals(loss=torch.ones(5)))
    assert selector.state_dict()["tensors"]["state.observed"] == 5


def test_one_group_is_the_strategy_alone() -> None:
    for build in (TopLoss, lambda: SelectiveBackprop(capacity=20), lambda: UDS(capacity=7)):
        alone, inside = Selector(build(), seed=1), Selector(PerGroup(build()), seed=1)
        for step in range(4):
            signals = make_signals(step)
            one = Signals(**{**signals.present(), "group": torch.full((signals.size,), 6)})
            want = alone.select(one, keep=5).weights
            assert torch.equal(inside.select(one, keep=5).weights, want)


def test_it_works_in_a_chain_and_in_a_window() -> None:
    signals = rows_of([0, 0, 0, 1, 1, 1])
    chain = Chain(PerGroup(TopLoss()), LossReweight(min_rows=2))
    assert Selector(chain).select(signals, keep=2).rows.tolist() == [2, 5]
    window = When(PerGroup(TopLoss()), start=1, otherwise=TopLoss())
    selector = Selector(window)
    kept = [selector.select(signals, keep=2).rows.tolist() for _ in range(2)]
    assert kept == [[4, 5], [2, 5]]


# Properties -----------------------------------------------------------------------------------

inner = st.sampled_from(
    [
        TopLoss(),
        TopLoss(lowest=True),
        Uniform(),
        SelectiveBackprop(capacity=20),
        GradNorm(),
        UDS(capacity=7),
    ]
)
some_shares = st.sampled_from([None, {0: 0.5}, {0: 0.2, 2: 0.5}, {1: 0.1, 0: 0.6, 2: 0.3}])


@given(
    method=inner,
    shares=some_shares,
    order=st.permutations(range(12)),
    keep=st.integers(1, 12),
    bad=st.sets(st.integers(0, 11), max_size=9),
)
def test_any_order_of_the_rows_gives_the_same_choice(
    method: Strategy, shares: Any, order: list[int], keep: int, bad: set[int]
) -> None:
    signals, moved = make_signals(7), torch.tensor(order)
    spoilt = {
        name: value.index_fill(0, torch.tensor(sorted(bad), dtype=torch.int64), NAN)
        for name, value in signals.present().items()
        if value.is_floating_point()
    }
    signals = Signals(**{**signals.present(), **spoilt})
    one, other = (Selector(PerGroup(method, shares), seed=2) for _ in range(2))
    for selector in (one, other):
        selector.select(make_signals(3), keep=5)  # a state that is not empty
    weights = one.select(signals, keep=keep).weights
    assert torch.equal(other.select(signals.take(moved), keep=keep).weights, weights[moved])
    first, second = one.state_dict()["tensors"], other.state_dict()["tensors"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Exactly as many rows as asked for, if as many can be used, and none that cannot.
    room = signals.size - (len(bad) if method.needs else 0)
    assert weights.tolist().count(1.0) == min(keep, room)
    assert set(weights.tolist()) <= {0.0, 1.0}
    if method.needs:
        assert not weights[sorted(bad)].any()


@given(groups=st.lists(st.integers(-1, 3), min_size=1, max_size=14), keep=st.integers(1, 14))
def test_each_group_keeps_its_own_best(groups: list[int], keep: int) -> None:
    generator = torch.Generator().manual_seed(len(groups))
    loss = torch.rand(len(groups), generator=generator)
    signals = Signals(loss=loss, group=torch.tensor(groups))
    kept = Selector(PerGroup(TopLoss())).select(signals, keep=keep).weights > 0
    for group in set(groups):
        mine = signals.group == group
        part = min(keep, len(groups)) * int(mine.sum()) / len(groups)
        assert abs(int(kept[mine].sum()) - part) < 1
        inside, outside = loss[mine & kept], loss[mine & ~kept]
        assert not len(inside) or not len(outside) or inside.min() > outside.max()


# Identity and bad input -----------------------------------------------------------------------


def test_the_repr_is_the_identity_of_a_checkpoint() -> None:
    one = PerGroup(TopLoss(), shares={2: 0.25, 0: 0.5})
    assert repr(one) == "PerGroup(strategy=TopLoss(lowest=False), shares={0: 0.5, 2: 0.25})"
    names = {**vars(quotas), "TopLoss": TopLoss}
    assert eval(repr(one), names) == one == PerGroup(TopLoss(), shares={0: 0.5, 2: 0.25})
    assert repr(PerGroup(TopLoss())) != repr(PerGroup(Uniform()))
    with pytest.raises(ValueError, match="state must come from PerGroup"):
        Selector(PerGroup(TopLoss())).load_state_dict(Selector(one).state_dict())


def test_the_shares_are_its_own_copy() -> None:
    shares = {0: 1.0}
    method = PerGroup(TopLoss(), shares)
    shares[1] = 1.0
    assert method.shares == {0: 1.0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strategy": TopLoss}, r"strategy must be a strategy, got <class .*\. Write PerGroup\("),
        ({"shares": {}}, r"shares must map one or more whole group numbers to shares, got \{\}\. "),
        ({"shares": {"web": 1.0}}, r"shares must map .* got \{'web': 1\.0\}\. Write shares=\{0: "),
        ({"shares": {True: 1.0}}, "shares must map one or more whole group numbers"),
        ({"shares": {0: -0.1, 1: 0.4}}, r"shares must be finite and >= 0, got .*\. Use 0 to leave"),
        ({"shares": {0: NAN}}, r"shares must be finite and >= 0, got \{0: nan\}"),
        ({"shares": {0: 7, 1: 3}}, r"shares must sum to at most 1, got 10\. Divide them by their "),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^PerGroup: {message}"):
        PerGroup(**{"strategy": TopLoss(), **kwargs})


def test_a_missing_group_is_named() -> None:
    message = r"^PerGroup: signals must hold 'group', got \['loss'\]\. Use a scorer that provides "
    with pytest.raises(ValueError, match=message):
        Selector(PerGroup(TopLoss())).select(Signals(loss=torch.ones(3)), keep=1)
