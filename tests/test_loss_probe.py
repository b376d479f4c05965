"""A loss is what it does with labels: found out for losses of every make."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from onlinesel.scoring.loss_probe import LossFacts, Probe, ask_loss, differs

VOCABULARY = 11


def token_loss(tokens: Tensor, sure: float, seed: int) -> Tensor:
    """Logits of a model that is more or less sure of the tokens that it sees."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=g)
    return table[tokens] + sure * one_hot(tokens, VOCABULARY)


def make_loss(shifts: bool, divides: bool, rest: float, sure: float, seed: int) -> Any:
    """A loss written out token by token."""

    def loss(inputs: dict[str, Any], items: int) -> Tensor:
        labels, logits = inputs["labels"], token_loss(inputs["input_ids"], sure, seed)
        parts = []
        for row in range(labels.shape[0]):
            for place in range(int(shifts), labels.shape[1]):
                if labels[row, place] != -100:
                    seen = logits[row, place - 1 if shifts else place]
                    parts.append(cross_entropy(seen, labels[row, place]))
        total = torch.stack(parts).sum() if parts else torch.zeros(())
        count = items if divides else len(parts)
        return total / count + rest  # 0 / 0 where nothing is labelled and the loss is a mean

    return loss


@settings(max_examples=80, deadline=None)
@given(
    shifts=st.booleans(),
    divides=st.booleans(),
    rest=st.sampled_from([0.0, 0.0, 0.3, 5.0]),
    sure=st.sampled_from([0.0, 0.0, 12.0]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda ns: max(ns) > 1),
    side=st.sampled_from(["left", "right", "none"]),
    masks=st.sampled_from([1, 2]),
    shifted_too=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_a_loss_does_is_found(
    shifts: bool, divides: bool, rest: float, sure: float, lengths: list[int], side: str,
    masks: int, shifted_too: bool, seed: int,
) -> None:  # fmt: skip
    """Sums and means, shifted and not, of models that are sure or not, in padded batches or not."""
    lengths = [max(lengths)] * len(lengths) if side == "none" else lengths
    width = max(lengths) + masks  # columns that are padding in every row
    batch = {name: torch.zeros(len(lengths), width).long() for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.zeros_like(batch["labels"])
    g = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        batch["input_ids"][row, where] = torch.randint(VOCABULARY, (length,), generator=g)
        batch["attention_mask"][row, where] = 1
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if shifted_too:
        batch["shift_labels"] = torch.zeros_like(batch["labels"])
    facts = ask_loss(make_loss(shifts, divides, rest, sure, seed), Probe.of(batch))
    assert (facts.shifts, facts.divides) == (shifts, divides)
    if divides:
        probe = Probe.of(batch)
        alone = make_loss(shifts, True, 0.0, sure, seed)(probe.one, 1)
        assert not differs(facts.value, float(alone))


def test_a_row_of_one_token_tells_nothing() -> None:
    alone = {"input_ids": torch.ones(1, 1).long(), "labels": torch.ones(1, 1).long()}
    assert not Probe.of(alone).usable
    mask = torch.tensor([[1, 0], [1, 1]])
    assert Probe.of({"labels": mask, "input_ids": mask, "attention_mask": mask}).usable


def test_the_probe_cuts_rows_of_tokens_and_no_others() -> None:
    ids = torch.arange(1, 41).view(1, 40)
    plain = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    assert Probe.of(plain).one["input_ids"].shape == (1, 8)
    assert Probe.of({**plain, "pixels": torch.ones(1, 3, 5)}).one["input_ids"].shape == (1, 40)
    probe = Probe.of(plain)
    assert probe.first["labels"].tolist() == [[0] + [-100] * 7]
    assert probe.one["labels"].tolist() == [[-100, 1] + [-100] * 6]
    assert int(probe.none["labels"].max()) == -100


def test_a_loss_of_nothing_shifts_and_does_not_divide() -> None:
    ids = torch.ones(1, 3).long()
    probe = Probe.of({"input_ids": ids, "labels": ids})
    facts = ask_loss(lambda inputs, items: float("nan"), probe)
    assert facts.shifts and not facts.divides
    assert differs(1.0, 2.0) and not differs(1.0, 1.02)
    assert isinstance(facts, LossFacts)
