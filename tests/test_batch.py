"""Rows keep their content wherever they are moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.data.batch import (
    count_labels,
    deal,
    gather_rows,
    mute_rows,
    rows_in,
    take_rows,
    trim,
)


def make_batch(lengths: list[int], side: str = "right", start: int = 1) -> dict[str, Any]:
    """Row r holds the tokens start + 100 r, start + 100 r + 1, ..."""
    width = max(lengths) + 1  # one column that is padding everywhere
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.long),
        "labels": torch.full((len(lengths), width), -100),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.long),
    }
    for r, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        tokens = torch.arange(n) + start + 100 * r
        batch["input_ids"][r, where] = tokens
        batch["labels"][r, where] = tokens
        batch["attention_mask"][r, where] = 1
    return batch


def content(batch: dict[str, Any], row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["left", "right"]),
    st.data(),
)
def test_gathered_rows_keep_their_tokens_and_labels(
    lengths: list[list[int]], side: str, data: st.DataObject
) -> None:
    batches = [make_batch(ns, side, 1 + 1000 * m) for m, ns in enumerate(lengths)]
    places = [(m, r) for m, ns in enumerate(lengths) for r in range(len(ns))]
    rows = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=6))
    joined = gather_rows(batches, rows, pad_id=63)
    assert rows_in(joined) == len(rows)
    for i, (m, r) in enumerate(rows):
        assert content(joined, i) == content(batches[m], r)
        labelled = joined["labels"][i][joined["labels"][i] != -100].tolist()
        assert labelled == content(batches[m], r)
        first = joined["attention_mask"][i].nonzero()[0]
        assert side == "left" or int(first) == 0
    # No column is padding in every row, and padding holds the padding token.
    assert joined["attention_mask"].any(dim=0).all()


def test_padding_uses_the_padding_token() -> None:
    one, two = make_batch([1]), make_batch([3])
    joined = gather_rows([one, two], [(0, 0), (1, 0)], pad_id=63)
    assert joined["input_ids"].tolist() == [[1, 63, 63], [1, 2, 3]]
    assert joined["labels"].tolist() == [[1, -100, -100], [1, 2, 3]]
    assert joined["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_batch_without_mask_is_not_trimmed() -> None:
    batch = {"input_ids": torch.tensor([[5, 0, 0]])}
    assert trim(batch)["input_ids"].shape == (1, 3)


def test_trim_cuts_both_ends() -> None:
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    assert trim({"input_ids": mask * 7, "attention_mask": mask})["input_ids"].tolist() == [
        [0, 7],
        [7, 7],
    ]


def test_take_rows_leaves_other_values_alone() -> None:
    taken = take_rows({"labels": torch.arange(3), "scale": torch.tensor(2.0), "note": "x"}, [2])
    assert taken["labels"].tolist() == [2] and taken["note"] == "x" and taken["scale"] == 2.0


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.zeros(4)},
        {"input_ids": torch.zeros(2, 9), "pixel_values": torch.zeros(7, 3)},
        {"note": "no tensor"},
    ],
)
def test_batches_without_rows_are_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Host: columns must all have one entry per row.*packed"):
        rows_in(batch, "Host")


def test_mute_and_count_labels() -> None:
    batch = make_batch([3, 2])
    assert count_labels(batch).tolist() == [2, 1]
    muted = mute_rows(batch, torch.tensor([True, False]))
    assert count_labels(muted).tolist() == [0, 1]
    assert count_labels(batch).tolist() == [2, 1]
    assert count_labels({"shift_labels": torch.tensor([[4, 4, -100]])}).tolist() == [2]


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 5))
def test_dealing_is_even_and_moves_as_few_rows_as_possible(owners: list[int], ranks: int) -> None:
    held = torch.tensor([o % ranks for o in owners], dtype=torch.long)
    target = deal(held, ranks)
    counts = torch.bincount(target, minlength=ranks)
    quota = [len(owners) // ranks + (r < len(owners) % ranks) for r in range(ranks)]
    assert counts.tolist() == quota
    surplus = sum(max(0, int((held == r).sum()) - quota[r]) for r in range(ranks))
    assert int((held != target).sum()) == surplus
