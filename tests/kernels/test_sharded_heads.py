"""A head that FSDP2 has cut by rows gives the scores of the whole one, on two processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onlinesel.kernels import LMHead, LowRank
from onlinesel.kernels._columns import merge_columns, sum_over_vocabulary
from onlinesel.kernels._shards import gathered, shared_out
from tests.launching import torchrun


@pytest.mark.slow
def test_two_ranks_with_half_a_head_each() -> None:
    printed = set(torchrun("kernels.sharded_heads", port=29621).splitlines())
    expected = {f"same reduced {vocab}" for vocab in (1, 3, 65, 4097)} | {"same cut otherwise"}
    expected |= {"same scored in parts", "same followed"} | {
        f"same adapted {vocab}" for vocab in (3, 4097)
    }
    for tied, apart in ((False, False), (True, False), (False, True)):
        expected.add(f"same scored tied={tied} apart={apart}")
    assert expected <= printed


def test_a_whole_parameter_is_nobodys_business() -> None:
    layer = nn.Linear(4, 6)
    with gathered(layer):
        assert not shared_out(layer)
    head = LMHead(layer.weight, layer.bias)
    assert head.whole() is head


def test_an_outline_has_the_form_and_no_numbers() -> None:
    head = LMHead(torch.ones(6, 4), torch.ones(6), 0.5).outline()
    assert (head.vocab_size, head.hidden_size, head.scale) == (6, 4, 0.5)
    assert head.weight.is_meta and head.bias is not None and head.bias.is_meta


def test_a_sum_over_the_vocabulary_sees_every_row_once() -> None:
    weight, bias = torch.arange(10.0).reshape(5, 2), torch.arange(5.0)
    adapter = LowRank(torch.ones(1, 2), 10 * torch.arange(5.0).reshape(5, 1))
    seen: list[int] = []

    def part(entries: slice, columns: torch.Tensor) -> torch.Tensor:
        seen.extend(range(entries.start, entries.stop))
        assert torch.equal(columns[:, :2], weight[entries].double())
        assert torch.equal(columns[:, 2], 10 * bias[entries].double())
        return (columns[:, :2].sum(dim=1) * columns[:, 3]).sum()

    head = LMHead.from_rows(weight, [adapter], bias)
    total = sum_over_vocabulary(head, part, chunk=2, dtype=torch.float64)
    assert seen == [0, 1, 2, 3, 4]
    assert float(total) == 1 * 5 + 2 * 9 + 3 * 13 + 4 * 17


def test_merged_columns_are_those_of_the_sum() -> None:
    # One row of the vocabulary: its weight is (1, 2) + 3 * 5 * (1, -1) = (16, -13), its bias 7.
    adapter = LowRank(torch.tensor([[1.0, -1.0]]), torch.tensor([[5.0]]), 3.0)
    head = LMHead.from_rows(torch.tensor([[1.0, 2.0]]), [adapter], torch.tensor([7.0]))
    assert merge_columns(head, torch.tensor([[1.0], [2.0], [5.0], [7.0]])).T.tolist() == [
        [16.0, -13.0, 7.0]
    ]
