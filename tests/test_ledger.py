from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Ledger

NAN, INF = float("nan"), float("inf")
tables = st.dictionaries(st.integers(-(2**62), 2**62), st.floats(0, 9, width=32), min_size=1)


def made(ids: list[int], loss: list[float], **more: object) -> Ledger:
    return Ledger().update(torch.tensor(ids), torch.tensor(loss), **more)  # type: ignore[arg-type]


def same(a: Ledger, b: Ledger) -> bool:
    ours, theirs = a.to_state(), b.to_state()
    return all(torch.equal(v, theirs[k]) and v.dtype == theirs[k].dtype for k, v in ours.items())


def test_values_by_hand() -> None:
    ledger = made([7, 3], [1.0, 2.0], decay=0.75)
    ledger = ledger.update(torch.tensor([3, 5]), torch.tensor([6.0, 4.0]), decay=0.75)
    assert ledger.ids.tolist() == [3, 5, 7]
    assert ledger.loss.tolist() == [6.0, 4.0, 1.0]
    assert ledger.average.tolist() == [0.75 * 2 + 0.25 * 6, 4.0, 1.0]
    assert ledger.visits.tolist() == [2, 1, 1]
    assert len(ledger) == 3 and len(Ledger()) == 0


def test_passes_count_successes() -> None:
    ledger = made([1, 2], [0.0, 0.0], passed=torch.tensor([True, False]))
    ledger = ledger.update(torch.tensor([2, 1]), torch.zeros(2), passed=torch.tensor([True, True]))
    assert ledger.passes.tolist() == [2, 1] and ledger.visits.tolist() == [2, 2]
    assert made([1], [0.0]).passes.tolist() == [0]


def test_lookup_of_known_and_unknown_ids() -> None:
    ledger = made([10, 30], [1.0, 3.0])
    ids = torch.tensor([30, 20, 10, 99, -5])
    assert ledger.lookup(ids, "loss", default=-1.0).tolist() == [3.0, -1.0, 1.0, -1.0, -1.0]
    assert torch.isnan(ledger.lookup(ids, "loss")).tolist() == [False, True, False, True, True]
    assert ledger.lookup(ids, "visits").tolist() == [1, 0, 1, 0, 0]
    assert Ledger().lookup(ids, "loss", default=2.0).tolist() == [2.0] * 5
    assert Ledger().lookup(ids, "visits").tolist() == [0] * 5


def test_ids_above_what_a_float_can_tell_apart() -> None:
    ledger = made([2**53, 2**53 + 1], [1.0, 2.0])
    assert ledger.lookup(torch.tensor([2**53 + 1]), "loss").tolist() == [2.0]


def test_a_view_of_ids_is_looked_up_without_a_warning() -> None:
    ids = torch.arange(10)[::3]
    assert made([3, 9], [1.0, 2.0]).lookup(ids, "loss", default=0.0).tolist() == [0, 1, 0, 2]


@given(rows=tables, random=st.randoms())
def test_the_content_does_not_depend_on_order_or_sharding(
    rows: dict[int, float], random: object
) -> None:
    items = list(rows.items())
    whole = made(list(rows), list(rows.values()))
    random.shuffle(items)  # type: ignore[attr-defined]
    cut = random.randrange(len(items) + 1)  # type: ignore[attr-defined]
    pieces = Ledger()
    for part in (items[:cut], items[cut:]):
        ids = torch.tensor([i for i, _ in part], dtype=torch.int64)
        pieces = pieces.update(ids, torch.tensor([x for _, x in part]))
    assert same(whole, pieces)
    assert whole.ids.tolist() == sorted(rows)
    assert whole.lookup(torch.tensor(list(rows)), "loss").tolist() == list(rows.values())


def test_a_row_that_occurs_twice_counts_once_with_its_last_value() -> None:
    ledger = made([4, 8, 4, 8, 4], [1.0, 2.0, 3.0, 9.0, 5.0])
    assert ledger.loss.tolist() == [5.0, 9.0] and ledger.visits.tolist() == [1, 1]
    passed = torch.tensor([True, True, False])
    again = made([1, 2, 1], [0.0, 0.0, 0.0], passed=passed)
    assert again.passes.tolist() == [0, 1]


def test_losses_that_are_not_finite_are_left_out() -> None:
    ledger = made([1, 2, 3, 1], [1.0, NAN, INF, NAN])
    assert ledger.ids.tolist() == [1] and ledger.loss.tolist() == [1.0]
    assert ledger.update(torch.tensor([5]), torch.tensor([NAN])) is ledger
    passed = torch.tensor([False, True, True, False])
    assert made([1, 2, 3, 4], [NAN, 1.0, 1.0, 1.0], passed=passed).passes.tolist() == [1, 1, 0]


def test_an_update_changes_nothing_in_place() -> None:
    before = made([1, 2], [1.0, 2.0])
    state = {name: value.clone() for name, value in before.to_state().items()}
    before.update(torch.tensor([1, 9]), torch.tensor([7.0, 7.0]))
    assert same(before, Ledger.from_state(state))


def test_the_state_round_trip() -> None:
    ledger = made([5, 1], [1.0, 2.0])
    state = ledger.to_state()
    assert sorted(state) == [f"ledger.{n}" for n in ("average", "ids", "loss", "passes", "visits")]
    assert same(Ledger.from_state(state), ledger)
    with pytest.raises(KeyError, match=r"ledger\.ids"):
        Ledger.from_state({})
