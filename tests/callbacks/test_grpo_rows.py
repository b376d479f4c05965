"""Rows of generation batches keep what belongs to them, whatever they are joined with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinesel.callbacks.grpo.rows import check_text, join, loss_mask, mute, rows_of, take, trim


def batch(prompts: list[int], answers: list[int], **more: Any) -> dict[str, torch.Tensor]:
    """Rows of these lengths; every token is 10 times its row, from 1, plus its place."""
    wide, long = max(prompts), max(answers)
    rows: dict[str, Any] = {
        name: torch.zeros(len(prompts), width, dtype=torch.long)
        for name, width in (
            ("prompt_ids", wide), ("prompt_mask", wide), ("completion_ids", long),
            ("completion_mask", long),
        )
    }  # fmt: skip
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        rows["prompt_ids"][i, wide - p :] = 10 * (i + 1) + torch.arange(p)
        rows["prompt_mask"][i, wide - p :] = 1
        rows["completion_ids"][i, :a] = 10 * (i + 1) + torch.arange(a)
        rows["completion_mask"][i, :a] = 1
    rows["advantages"] = torch.arange(1.0, len(prompts) + 1)
    return {**rows, **more}


def test_prompts_are_filled_on_the_left_and_completions_on_the_right() -> None:
    one, two = batch([1, 2], [3, 1]), batch([4], [2])
    made = join([one, two], pad_id=63)
    assert made["prompt_ids"].tolist() == [
        [63, 63, 0, 10], [63, 63, 20, 21], [10, 11, 12, 13]
    ]  # fmt: skip
    assert made["prompt_mask"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert made["completion_ids"].tolist() == [[10, 11, 12], [20, 0, 0], [10, 11, 63]]
    assert made["advantages"].tolist() == [1, 2, 1]


def test_tool_tokens_carry_no_loss_and_filling_does_not_count() -> None:
    one = batch([1], [3], tool_mask=torch.tensor([[1, 0, 1]]))
    two = batch([1], [1], tool_mask=torch.tensor([[1]]))
    made = join([one, two], pad_id=0)
    assert made["tool_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert loss_mask(made).tolist() == [[1, 0, 1], [1, 0, 0]]
    assert loss_mask(mute(made, [0])).tolist() == [[0, 0, 0], [1, 0, 0]]
    assert made["tool_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]  # not changed in place


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ratios_of_tokens_are_filled_with_one(order: tuple[int, int]) -> None:
    """Also where the first batch holds completions of one token only."""
    parts = [
        batch([1], [1], importance_sampling_ratio=torch.tensor([[0.5]])),
        batch([1], [3], importance_sampling_ratio=torch.tensor([[0.2, 0.3, 0.4]])),
    ]
    made = join([parts[i] for i in order], pad_id=0)["importance_sampling_ratio"]
    torch.testing.assert_close(made[order.index(0)], torch.tensor([0.5, 1.0, 1.0]))
    torch.testing.assert_close(made[order.index(1)], torch.tensor([0.2, 0.3, 0.4]))


def test_ratios_of_sequences_stay_one_number() -> None:
    parts = [batch([1], [n], importance_sampling_ratio=torch.tensor([[0.5 * n]])) for n in (2, 3)]
    assert join(parts, pad_id=0)["importance_sampling_ratio"].tolist() == [[1.0], [1.5]]


@pytest.mark.parametrize(("multiple", "widths"), [(None, (2, 3)), (4, (4, 4)), (8, (8, 8))])
def test_padding_is_cut_to_the_multiple(multiple: int | None, widths: tuple[int, int]) -> None:
    whole = join([batch([1, 2], [3, 1]), batch([5], [6])], pad_id=7)
    made = trim(take(whole, [1, 0]), multiple, pad_id=7)
    assert (made["prompt_ids"].shape[1], made["completion_ids"].shape[1]) == widths
    prompt = made["prompt_ids"][0][made["prompt_mask"][0].bool()]
    answer = made["completion_ids"][1][made["completion_mask"][1].bool()]
    assert prompt.tolist() == [20, 21] and answer.tolist() == [10, 11, 12]
    assert set(made["prompt_ids"][0][~made["prompt_mask"][0].bool()].tolist()) <= {7}


def test_columns_that_only_some_have_are_refused() -> None:
    with pytest.raises(ValueError, match="same columns, got \\['tool_mask'\\] in some only"):
        join([batch([1], [1]), batch([1], [1], tool_mask=torch.ones(1, 1))], pad_id=0)


def test_rows_of_images_are_refused() -> None:
    images = batch([1], [1], pixel_values=torch.ones(3), num_items_in_batch=torch.tensor(1))
    assert "pixel_values" not in rows_of(images)
    with pytest.raises(ValueError, match="must hold text rows only, got pixel_values"):
        check_text(images)
