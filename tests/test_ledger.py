from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Ledger
from onlinesel.ledger import runs as _runs

NAN, INF = float("nan"), float("inf")
IDS = st.one_of(st.integers(0, 12), st.integers(-(2**63), 2**63 - 1))
LOSSES = st.integers(0, 72).map(lambda eighths: eighths / 8)
tables = st.dictionaries(IDS, LOSSES, min_size=1)
batches = st.lists(st.lists(st.tuples(IDS, LOSSES, st.booleans()), min_size=1, max_size=9))

Row = tuple[float, float, int, int]  # loss, average, visits, passes
ROW = ("loss", "average", "visits", "passes")


@contextmanager
def many_runs() -> Iterator[None]:
    """Let a handful of rows fill several runs."""
    with mock.patch.object(_runs, "SMALL", 1), mock.patch.object(_runs, "RATIO", 2):
        yield


def made(ids: list[int], loss: list[float], **more: object) -> Ledger:
    return Ledger().update(torch.tensor(ids), torch.tensor(loss), **more)  # type: ignore[arg-type]


def content(ledger: Ledger) -> dict[int, Row]:
    """Return what is known, having checked that every way to read it says the same."""
    table = ledger.table
    ids = table["ids"]
    assert ids.tolist() == sorted(set(ids.tolist())) and len(ledger) == ids.shape[0]
    for name in ROW:
        assert torch.equal(ledger.lookup(ids, name), table[name])
        assert table[name].dtype == (torch.int32 if name in ROW[2:] else torch.float32)
    columns = [table[name].tolist() for name in ROW]
    return dict(zip(ids.tolist(), zip(*columns, strict=True), strict=True))


def same(a: Ledger, b: Ledger) -> bool:
    return content(a) == content(b) and float(a.mean) == float(b.mean)


def test_values_by_hand() -> None:
    ledger = made([7, 3], [1.0, 2.0], decay=0.75)
    ledger = ledger.update(torch.tensor([3, 5]), torch.tensor([6.0, 4.0]), decay=0.75)
    assert content(ledger) == {3: (6.0, 3.0, 2, 0), 5: (4.0, 4.0, 1, 0), 7: (1.0, 1.0, 1, 0)}
    assert float(ledger.mean) == 11 / 3 and ledger.mean.dtype == torch.float64
    assert len(Ledger()) == 0 and math.isnan(float(Ledger().mean)) and content(Ledger()) == {}


def test_passes_count_successes() -> None:
    ledger = made([1, 2], [0.0, 0.0], passed=torch.tensor([True, False]))
    ledger = ledger.update(torch.tensor([2, 1]), torch.zeros(2), passed=torch.tensor([True, True]))
    assert ledger.table["passes"].tolist() == [2, 1] and ledger.table["visits"].tolist() == [2, 2]
    assert made([1], [0.0]).table["passes"].tolist() == [0]


def test_lookup_of_known_and_unknown_ids() -> None:
    ledger = made([10, 30], [1.0, 3.0])
    ids = torch.tensor([30, 20, 10, 99, -5])
    assert ledger.lookup(ids, "loss", default=-1.0).tolist() == [3.0, -1.0, 1.0, -1.0, -1.0]
    assert torch.isnan(ledger.lookup(ids, "loss")).tolist() == [False, True, False, True, True]
    assert ledger.lookup(ids, "visits").tolist() == [1, 0, 1, 0, 0]
    assert Ledger().lookup(ids, "loss", default=2.0).tolist() == [2.0] * 5
    assert Ledger().lookup(ids, "visits").tolist() == [0] * 5


def test_ids_without_a_gap_are_found_by_their_place() -> None:
    ledger = made([5, 3, 4], [5.0, 3.0, 4.0])
    ids = torch.tensor([2**63 - 1, 6, 5, 4, 3, 2, -(2**63)])
    assert ledger.lookup(ids, "loss", default=0.0).tolist() == [0, 0, 5, 4, 3, 0, 0]


def test_ids_above_what_a_float_can_tell_apart() -> None:
    ledger = made([2**53, 2**53 + 1, 2**53 + 9], [1.0, 2.0, 3.0])
    assert ledger.lookup(torch.tensor([2**53 + 1]), "loss").tolist() == [2.0]


def test_a_view_of_ids_is_looked_up_without_a_warning() -> None:
    ids = torch.arange(10)[::3]
    assert made([3, 9], [1.0, 2.0]).lookup(ids, "loss", default=0.0).tolist() == [0, 1, 0, 2]


@given(batches, st.lists(IDS, min_size=1, max_size=9), st.data())
def test_it_is_a_dictionary(
    seen: list[list[tuple[int, float, bool]]], asked: list[int], data: st.DataObject
) -> None:
    """Updates, lookups, recalls and resuming, with many runs, against a plain dictionary."""
    ids = torch.tensor(asked)
    with many_runs():
        ledger, model = Ledger(), {}
        for rows in seen:
            here, loss, passed = zip(*rows, strict=True)
            before = content(ledger)
            grown = ledger.update(
                torch.tensor(here), torch.tensor(loss), passed=torch.tensor(passed), decay=0.5
            )
            assert content(ledger) == before
            for i, new, hit in {i: (i, new, hit) for i, new, hit in rows}.values():
                _, average, visits, passes = model.get(i, (new, new, 0, 0))
                model[i] = (new, (average + new) / 2, visits + 1, passes + hit)
            turn = data.draw(st.sampled_from(["go on", "recall", "resume", "both"]))
            if turn in ("recall", "both"):
                found, ledger = grown.recall(ids, "loss", default=-1.0)
                wanted = [model.get(i, (-1.0, 0.0, 0, 0)) for i in asked]
                assert found.tolist() == [row[0] for row in wanted]
            else:
                ledger = grown
            ledger = Ledger.from_state(ledger.to_state()) if turn in ("resume", "both") else ledger
            assert content(ledger) == model
            exact = sum(Fraction(row[0]) for row in model.values())
            assert float(ledger.mean) == float(exact / len(model))
        wanted = [model.get(i, (-1.0, 0.0, 0, 0)) for i in asked]
        assert ledger.lookup(ids, "loss", default=-1.0).tolist() == [row[0] for row in wanted]
        assert ledger.lookup(ids, "passes").tolist() == [row[3] for row in wanted]


@given(rows=tables, random=st.randoms())
def test_the_content_does_not_depend_on_order_or_sharding(
    rows: dict[int, float], random: object
) -> None:
    items = list(rows.items())
    whole = made(list(rows), list(rows.values()))
    random.shuffle(items)  # type: ignore[attr-defined]
    pieces = Ledger()
    with many_runs():
        while items:
            cut = random.randrange(len(items)) + 1  # type: ignore[attr-defined]
            part, items = items[:cut], items[cut:]
            ids = torch.tensor([i for i, _ in part], dtype=torch.int64)
            pieces = pieces.update(ids, torch.tensor([x for _, x in part]))
    assert same(whole, pieces)
    assert whole.lookup(torch.tensor(list(rows)), "loss").tolist() == list(rows.values())


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1), st.data())
def test_the_mean_is_exact_whatever_was_forgotten(losses: list[float], data: st.DataObject) -> None:
    """Numbers that a float64 sum would swallow are still there when the large ones are gone."""
    ids = torch.arange(len(losses))
    order = data.draw(st.permutations(range(len(losses))))
    ledger = Ledger(("loss",)).update(ids, torch.full(ids.shape, 3e38))
    for i in order:
        ledger = ledger.update(ids[[i]], torch.tensor([losses[i]]))
    wanted = sum(map(Fraction, losses)) / len(losses)
    assert float(ledger.mean) == wanted.numerator / wanted.denominator


def test_a_row_that_occurs_twice_counts_once_with_its_last_value() -> None:
    ledger = made([4, 8, 4, 8, 4], [1.0, 2.0, 3.0, 9.0, 5.0])
    assert content(ledger) == {4: (5.0, 5.0, 1, 0), 8: (9.0, 9.0, 1, 0)}
    passed = torch.tensor([True, True, False])
    again = made([1, 2, 1], [0.0, 0.0, 0.0], passed=passed)
    assert again.table["passes"].tolist() == [0, 1]


def test_losses_that_are_not_finite_are_left_out() -> None:
    ledger = made([1, 2, 3, 1], [1.0, NAN, INF, NAN])
    assert content(ledger) == {1: (1.0, 1.0, 1, 0)}
    assert ledger.update(torch.tensor([5]), torch.tensor([NAN])) is ledger
    passed = torch.tensor([False, True, True, False])
    again = made([1, 2, 3, 4], [NAN, 1.0, 1.0, 1.0], passed=passed)
    assert again.table["passes"].tolist() == [1, 1, 0]


def test_an_update_changes_nothing_in_place() -> None:
    with many_runs():
        before = made([1, 2], [1.0, 2.0])
        state = {name: value.clone() for name, value in before.to_state().items()}
        for ids in ([1, 9], [1, 2], [0]):
            _, ledger = before.recall(torch.tensor(ids), "visits")
            ledger.update(torch.tensor(ids), torch.full((len(ids),), 7.0))
        after = before.to_state()
        assert all(torch.equal(value, state[name]) for name, value in after.items())


def test_an_update_copies_only_runs_that_are_full() -> None:
    large = Ledger().update(torch.arange(100_000), torch.ones(100_000))
    small = large.update(torch.tensor([5]), torch.tensor([3.0]))
    assert small.to_state()["ledger.loss.0"] is large.to_state()["ledger.loss.0"]
    assert small.to_state()["ledger.sizes"].tolist() == [100_000, 1]
    assert small.lookup(torch.tensor([5, 6]), "loss").tolist() == [3.0, 1.0]
    assert float(small.mean) == 1 + 2 / 100_000


@pytest.mark.parametrize("repeats", [False, True])
def test_rows_are_rewritten_as_often_as_the_logarithm_says(repeats: bool) -> None:
    """500 updates of 20 rows: of one large table, or of ever new rows."""
    written, original = [0], _runs.merged

    def counting(older: _runs.Run, newer: _runs.Run) -> _runs.Run:
        result = original(older, newer)
        written[0] += _runs.size(result)
        return result

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(10_000, generator=generator)
    ledger = Ledger()
    if repeats:
        ledger = ledger.update(order, torch.zeros(10_000))
    with (
        mock.patch.object(_runs, "SMALL", 1),
        mock.patch.object(_runs, "merged", counting),
    ):
        for ids in order.split(20):
            ledger = ledger.update(ids, torch.ones(20))
            sizes = ledger.to_state()["ledger.sizes"].tolist()
            assert all(a >= 8 * b for a, b in zip(sizes, sizes[1:], strict=False))
            assert sum(sizes) <= sizes[0] * 8 / 7
    # A row moves up a level after 9 times at most; there are log8(10,000 / 20) of them.
    assert written[0] / 10_000 < 9 * (math.log(500, 8) + 1)
    assert len(ledger) == 10_000 and float(ledger.mean) == 1.0


def test_the_state_round_trip() -> None:
    ledger = made([5, 1], [1.0, 2.0])
    state = ledger.to_state()
    columns = ("average", "ids", "loss", "passes", "visits")
    rest = ("ledger.known", "ledger.sizes", "ledger.total")
    runs = [f"ledger.{name}.{run}" for name in columns for run in ("0", "recalled")]
    assert sorted(state) == sorted((*runs, *rest))
    assert same(Ledger.from_state(state), ledger)
    assert Ledger.from_state(Ledger(("loss",)).to_state()).columns == ("loss",)
    with pytest.raises(KeyError, match=r"ledger\.ids"):
        Ledger.from_state({})


def test_a_state_of_whole_columns_is_taken() -> None:
    """Version 0.1.0 wrote its columns so."""
    old = {"ids": torch.tensor([2, 4]), "loss": torch.tensor([1.0, 5.0])}
    old |= {"average": torch.tensor([2.0, 3.0]), "visits": torch.tensor([3, 1], dtype=torch.int32)}
    old["passes"] = torch.tensor([1, 0], dtype=torch.int32)
    ledger = Ledger.from_state({f"ledger.{name}": value for name, value in old.items()})
    assert content(ledger) == {2: (1.0, 2.0, 3, 1), 4: (5.0, 3.0, 1, 0)}
    assert float(ledger.mean) == 3.0


def test_runs_of_earlier_steps_in_a_state_are_not_read() -> None:
    """Whoever updates a dictionary with a newer state keeps runs that were merged since."""
    ledger, state, stale = Ledger(), {}, 0
    with many_runs():
        for i in range(40):
            ids = torch.arange(i, i + 1 + i % 7)
            ledger = ledger.update(ids, torch.full(ids.shape, float(i)))
            state |= ledger.to_state()
            assert same(Ledger.from_state(state), ledger)
            stale += state.keys() > ledger.to_state().keys()
    assert stale > 10


def test_columns_of_ones_choice() -> None:
    ledger = Ledger(("visits", "loss")).update(torch.tensor([1]), torch.tensor([2.0]))
    assert ledger.columns == ("loss", "visits") and list(ledger.table) == ["ids", "loss", "visits"]
    with pytest.raises(
        ValueError, match=r"Ledger: name must be a column \(loss, visits\), got 'av"
    ):
        ledger.lookup(torch.tensor([1]), "average")
    with pytest.raises(ValueError, match="Ledger: name must be a column .*, got 'ids'. Make"):
        ledger.recall(torch.tensor([1]), "ids")
    with pytest.raises(ValueError, match="Ledger: name must be a column .*, got 'passes'. Make"):
        ledger.update(torch.tensor([1]), torch.ones(1), passed=torch.tensor([True]))
    for wrong in (("visits",), ("loss", "loss"), ("loss", "reward")):
        with pytest.raises(ValueError, match="Ledger: columns must be 'loss' and any of loss, av"):
            Ledger(wrong)


@given(st.lists(st.lists(st.tuples(IDS, LOSSES), max_size=9), min_size=1, max_size=4))
def test_a_union_takes_the_row_with_more_visits(ranks: list[list[tuple[int, float]]]) -> None:
    ledgers, model = [], {}
    for rows in ranks:
        ledger = Ledger()
        for i, loss in rows:  # one by one: an id that comes up again is visited again
            ledger = ledger.update(torch.tensor([i]), torch.tensor([loss]))
        ledgers.append(ledger)
        for i, row in content(ledger).items():
            if i not in model or row[2] >= model[i][2]:
                model[i] = row
    united = Ledger.union(ledgers)
    assert content(united) == model
    exact = sum(Fraction(row[0]) for row in model.values())
    assert not model or float(united.mean) == float(exact / len(model))


def test_a_union_without_visits_takes_the_last() -> None:
    first, second = (
        Ledger(("loss",)).update(torch.tensor(ids), torch.tensor(loss))
        for ids, loss in (([1, 2], [1.0, 2.0]), ([2, 3], [5.0, 6.0]))
    )
    assert Ledger.union([first, second]).table["loss"].tolist() == [1.0, 5.0, 6.0]
    assert Ledger.union([second, first]).table["loss"].tolist() == [1.0, 2.0, 6.0]
    for wrong in ([], [first, Ledger()]):
        with pytest.raises(ValueError, match="Ledger: ledgers must be one or more with the same c"):
            Ledger.union(wrong)
