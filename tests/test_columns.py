"""A batch of any structure comes apart into named leaves and back into what it was."""

from __future__ import annotations

import weakref
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from onlinesel.data.columns import as_columns


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Record:
    pixels: Any
    label: Any


LEAVES = st.integers() | st.text(max_size=2) | st.none()
NAMES = st.text("abc", min_size=1, max_size=2)
BATCHES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Record, inner, inner)
    ),
    max_leaves=8,
)


@given(BATCHES)
def test_a_batch_is_rebuilt_as_it_was(batch: Any) -> None:
    columns = as_columns(batch)
    rebuilt = columns.rebuild(columns.values)
    assert rebuilt == batch and type(rebuilt) is type(batch)


def test_leaves_have_the_names_of_their_paths() -> None:
    batch = Pair({"pixels": 1, "mask": [2, 3]}, Record(4, 5))
    wanted = {"0.pixels": 1, "0.mask.0": 2, "0.mask.1": 3, "1.pixels": 4, "1.label": 5}
    assert as_columns(batch).values == wanted


def test_other_leaves_take_their_places() -> None:
    columns = as_columns((1, Record(2, 3)))
    changed = {name: value * 10 for name, value in columns.values.items()}
    assert columns.rebuild(changed) == (10, Record(20, 30))


def test_leaves_that_are_taken_out_are_gone_or_none() -> None:
    columns = as_columns([{"ids": 1, "x": 2}, Record(3, 4), Pair(5, 6), 7])
    rest = {k: v for k, v in columns.values.items() if k not in ("0.ids", "1.label", "2.0", "3")}
    assert columns.rebuild(rest) == [{"x": 2}, Record(3, None), Pair(None, 6)]


def test_what_rebuilds_a_batch_does_not_hold_it() -> None:
    class Leaf:
        pass

    leaf = Leaf()
    alive = weakref.ref(leaf)
    rebuild = as_columns({"a": [leaf], "b": Record(leaf, 1)}).rebuild
    del leaf
    assert alive() is None
    assert rebuild({"a.0": 2, "b.pixels": 3, "b.label": 4}) == {"a": [2], "b": Record(3, 4)}


def test_a_mapping_of_another_kind_comes_back_as_a_dict() -> None:
    columns = as_columns(UserDict({"labels": 1}))
    assert columns.rebuild(columns.values) == {"labels": 1}
    assert as_columns(7).values == {"batch": 7} and as_columns(7).rebuild({"batch": 8}) == 8
