"""Everything with one entry a row follows its row, whatever it is and wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinesel.data.batch import gather_rows, rows_in, take_rows, trim
from onlinesel.data.columns import as_columns

PAD = 63
ROW = dict[str, Any]


def make_row(number: int, length: int) -> ROW:
    """Everything about a row says which row it is."""
    tokens = torch.arange(length) + 100 * number
    return {
        "input_ids": tokens,
        "labels": tokens + 1,
        "attention_mask": torch.ones(length, dtype=torch.long),
        "token_weight": tokens / 7 + 1,  # known by no name: its size follows the tokens
        "aux": tokens % 5,  # padded with 9 by its collator
        "image": torch.full((2, 3, 3), float(number)),
        "weight": float(number),
        "text": f"row {number}",
        "boxes": torch.full((number % 3, 4), float(number)),
        "meta": {"number": number, "tensor": torch.tensor([number])},
        "tag": number % 4,
    }


def padded(values: Sequence[torch.Tensor], fill: float, side: str) -> torch.Tensor:
    width = max(len(v) for v in values) + 1  # one column that is padding everywhere
    whole = torch.full((len(values), width), fill).to(values[0].dtype)
    for row, value in zip(whole, values, strict=True):
        row[slice(0, len(value)) if side == "right" else slice(width - len(value), width)] = value
    return whole


def collated(rows: Sequence[ROW], side: str, features: int) -> dict[str, Any]:
    """A collator as people write them, with a column of fixed size and rows in lists and arrays."""
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0, "token_weight": 0.0, "aux": 9}
    batch: dict[str, Any] = {
        name: padded([r[name] for r in rows], fill, side) for name, fill in fills.items()
    }
    numbers = torch.tensor([r["weight"] for r in rows])
    batch["features"] = numbers[:, None].expand(-1, features)  # not contiguous
    batch["image"] = torch.stack([r["image"] for r in rows])
    batch["weight"] = [r["weight"] for r in rows]
    batch["text"] = tuple(r["text"] for r in rows)
    batch["boxes"] = [r["boxes"] for r in rows]
    batch["meta"] = [r["meta"] for r in rows]
    batch["tag"] = np.array([r["tag"] for r in rows])
    batch["table"] = np.stack([np.full(features, r["weight"]) for r in rows])
    return {**batch, "scale": 2.0, "mode": "train", "zero_dim": torch.tensor(3)}


def check_row(batch: dict[str, Any], at: int, row: ROW, features: int) -> None:
    alive = batch["attention_mask"][at] == 1
    for name in ("input_ids", "labels", "token_weight", "aux"):
        assert batch[name].shape == batch["attention_mask"].shape, name
        assert torch.equal(batch[name][at][alive], row[name]), name
    assert set(batch["labels"][at][~alive].tolist()) <= {-100}
    assert set(batch["aux"][at][~alive].tolist()) <= {9}
    assert set(batch["token_weight"][at][~alive].tolist()) <= {0.0}
    assert batch["features"][at].tolist() == [row["weight"]] * features
    assert batch["table"][at].tolist() == [row["weight"]] * features
    assert torch.equal(batch["image"][at], row["image"]) and batch["tag"][at] == row["tag"]
    assert batch["weight"][at] == row["weight"] and batch["text"][at] == row["text"]
    assert torch.equal(batch["boxes"][at], row["boxes"]) and batch["meta"][at] is row["meta"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["left", "right"]),
    st.integers(2, 8),
    st.data(),
)
def test_all_of_a_row_follows_it(
    lengths: list[list[int]], side: str, features: int, data: st.DataObject
) -> None:
    """`features` is as wide as the tokens now and then; it is neither cut nor padded."""
    rows = {(m, r): make_row(10 * m + r + 1, n)
            for m, ns in enumerate(lengths) for r, n in enumerate(ns)}  # fmt: skip
    batches = [
        collated([rows[m, r] for r in range(len(ns))], side, features)
        for m, ns in enumerate(lengths)
    ]
    places = data.draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, max_size=6))
    joined = gather_rows(batches, places, pad_id=PAD)
    assert rows_in(joined) == len(places)
    for at, place in enumerate(places):
        check_row(joined, at, rows[place], features)
    assert all(v.is_contiguous() for v in joined.values() if isinstance(v, torch.Tensor))
    assert joined["scale"] == 2.0 and joined["mode"] == "train" and joined["zero_dim"] == 3
    assert type(joined["text"]) is tuple and type(joined["weight"]) is list
    if len({batch["input_ids"].shape[1] for batch in batches}) > 1:
        # What follows the tokens is known now, so that padding is cut.
        assert joined["attention_mask"].any(dim=0).all() or features == joined["labels"].shape[1]


def test_a_size_that_happens_to_fit_cuts_nothing() -> None:
    """Four features beside four tokens: of which two are padding."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {
        "input_ids": mask * 5,
        "attention_mask": mask,
        "features": torch.arange(8.0).view(2, 4),
    }
    for result in (trim(batch), gather_rows([batch], [(0, 0), (1, 0)][:1])):
        assert result["features"].shape[1] == 4
    assert trim(batch)["features"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    plain = {k: v for k, v in batch.items() if k != "features"}
    assert trim(plain)["input_ids"].tolist() == [[5, 5], [5, 0]]


def test_labels_of_another_sequence_keep_their_tokens() -> None:
    """In an encoder-decoder batch labels are as wide as the inputs by chance."""
    mask = torch.tensor([[1, 1, 0]])
    short = {"input_ids": mask * 5, "attention_mask": mask, "labels": torch.tensor([[7, 8, 9]])}
    assert trim(short)["labels"].tolist() == [[7, 8, 9]]
    wide = {"input_ids": torch.tensor([[5, 5, 5, 5]]), "attention_mask": torch.ones(1, 4).long(),
            "labels": torch.tensor([[7, 8]])}  # fmt: skip
    joined = gather_rows([short, wide], [(1, 0), (0, 0)])
    assert joined["labels"].tolist() == [[7, 8, -100], [7, 8, 9]]
    assert joined["input_ids"].shape == joined["attention_mask"].shape == (2, 4)


def test_two_kinds_of_tokens_have_widths_of_their_own() -> None:
    def pairs(chosen: int, rejected: int) -> dict[str, Any]:
        return {
            f"{name}_{kind}": torch.full((1, width + 1), 1).index_fill(1, torch.tensor(width), 0)
            for name, width in (("chosen", chosen), ("rejected", rejected))
            for kind in ("input_ids", "attention_mask")
        }

    joined = gather_rows([pairs(2, 5), pairs(4, 3)], [(0, 0), (1, 0)], pad_id=0)
    assert joined["chosen_input_ids"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert joined["rejected_input_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(joined["rejected_attention_mask"], joined["rejected_input_ids"])


@pytest.mark.parametrize("kind", ["bool", "int", "added", "three"])
def test_masks_of_queries_by_keys_of_different_widths(kind: str) -> None:
    def batch(width: int) -> dict[str, Any]:
        open_ = torch.ones(width, width).tril().bool()
        masks = {
            "bool": open_,
            "three": open_,
            "int": open_.long(),
            "added": torch.where(open_, 0.0, torch.finfo(torch.float32).min),
        }
        mask = masks[kind].expand(1, *(() if kind == "three" else (1,)), -1, -1)
        ids = torch.arange(1, width + 1)[None]
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}

    joined = gather_rows([batch(2), batch(4)], [(0, 0), (1, 0)], pad_id=PAD)
    mask = joined["attention_mask"].reshape(2, 4, 4)
    seen = mask >= 0 if kind == "added" else mask != 0
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert seen[0].long().tolist() == wanted
    assert torch.equal(seen[1], torch.ones(4, 4).tril().bool())
    assert joined["input_ids"].tolist() == [[1, 2, PAD, PAD], [1, 2, 3, 4]]


def test_a_row_of_padding_alone_does_not_say_on_which_side_padding_is() -> None:
    full = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3).long()}
    other = {
        "input_ids": torch.tensor([[4, 0], [0, 0]]),
        "attention_mask": torch.tensor([[1, 0], [0, 0]]),
    }
    joined = gather_rows([full, other], [(0, 0), (1, 0), (1, 1)])
    assert joined["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": [1.0, 2.0, 3.0]},
            "one entry per row in their first dimension, got .*weight': 3",
        ),
        ({"x": np.ones(3)}, "one entry per row in their first dimension"),
        ({"x": {1.0, 2.0}}, "'x' must be a tensor, an array or a list .* got set"),
        ({"x": {"y": 1}}, "'x' must be a tensor, an array or a list .* got dict"),
        ({"x": torch.eye(2).to_sparse()}, "'x' must be a tensor, an array or a list"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(changes: Any, message: str) -> None:
    batch = {"input_ids": torch.ones(2, 3), "scale": 1.0, "none": None, **changes}
    with pytest.raises(ValueError, match=message):
        take_rows(batch, [0])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"scale": 3.0}, "'scale' must be the same for all batches .* got 2.0 and others"),
        ({"n": torch.tensor(5)}, "'n' must be the same for all batches"),
        ({"x": torch.ones(1, 5)}, r"rows of 'x' must have one size, or follow the width"),
        ({"extra": torch.ones(1)}, "same columns where their rows are joined, got others in extra"),
        ({"x": [1.0]}, "same columns where their rows are joined, got others in x"),
    ],
)
def test_batches_that_cannot_be_joined_are_refused(other: Any, message: str) -> None:
    batch = {"input_ids": torch.ones(1, 3).long(), "x": torch.ones(1, 4), "scale": 2.0}
    batch["n"] = torch.tensor(4)
    with pytest.raises(ValueError, match=message):
        gather_rows([batch, {**batch, **other}], [(0, 0), (1, 0)])


def test_lists_have_rows_or_hold_columns() -> None:
    rows = {"x": torch.ones(3, 2), "images": [torch.ones(5, 2, 2)] * 3, "nothing": []}
    assert len(as_columns(rows).values["images"]) == 3
    box = {"x": torch.ones(3, 2), "box": [torch.ones(3)] * 4}  # as torch collates lists
    assert sorted(as_columns(box).values) == ["box.0", "box.1", "box.2", "box.3", "x"]
    both = {"x": torch.ones(3, 2), "images": [torch.ones(3, 2, 2)] * 3}
    with pytest.raises(ValueError, match=r"'images' must have one entry per row \(3\) or hold"):
        as_columns(both)
    layout: dict[str, bool] = {}
    as_columns(rows, layout=layout)
    assert as_columns(both, layout=layout).values["images"] is both["images"]
    with pytest.raises(ValueError, match=r"'texts' must have one .* got a length of 2"):
        as_columns({"x": torch.ones(3), "texts": ["a", "b"]})
    with pytest.raises(ValueError, match="names of a batch's parts must be different, got 'a.b'"):
        as_columns({"a.b": 1, "a": {"b": 2}})
    pair = (torch.ones(2, 3), torch.ones(2))  # the batch itself is a container
    assert list(as_columns(pair).values) == ["0", "1"]
