"""The alignment against a table, the draws against their law, and TARS by hand."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.rl.preference import (
    TARS,
    PreferenceTerms,
    PreferenceTokens,
    differing_tokens,
    draw_positions,
)

PAD, END, VOCABULARY = 0, 1, 32
NAN = float("nan")
TEXTS = st.lists(st.integers(0, 3), max_size=12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(prompt: list[int], chosen: list[int], rejected: list[int], **values: Any) -> Any:
    """One pair, padded by two tokens more than it needs."""
    width = len(prompt) + max(len(chosen), len(rejected)) + 2
    ids = torch.full((2, width), PAD)
    mask = torch.zeros(2, width, dtype=torch.bool)
    for row, text in enumerate((chosen, rejected)):
        whole = [*prompt, *text]
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, len(prompt) : len(whole)] = True
    found = {}
    for name, (first, second) in values.items():
        found[name] = torch.zeros(2, width)
        for row, text in enumerate((first, second)):
            found[name][row, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
    return PreferenceTokens(ids, mask, found, torch.tensor([PAD, END]), VOCABULARY)


def many(rows: int, width: int, relevance: torch.Tensor | None = None) -> PreferenceTokens:
    """Answers without a prompt, of ordinary tokens, the last of which ends them."""
    ids = torch.arange(2, 2 + width).expand(rows, width).clone()
    ids[:, -1] = END
    values = {} if relevance is None else {"relevance": relevance.expand(rows, width)}
    mask = torch.ones(rows, width, dtype=torch.bool)
    return PreferenceTokens(ids, mask, values, torch.tensor([PAD, END]), VOCABULARY)


# Alignment ----------------------------------------------------------------------------------


def longest(first: list[int], second: list[int]) -> int:
    """Length of a longest common subsequence, by the table."""
    row = [0] * (len(second) + 1)
    for a in first:
        before = row
        row = [0]
        for j, b in enumerate(second):
            row.append(before[j] + 1 if a == b else max(before[j + 1], row[j]))
    return row[-1]


@given(first=TEXTS, second=TEXTS)
def test_what_does_not_differ_is_a_longest_common_subsequence(
    first: list[int], second: list[int]
) -> None:
    marks = differing_tokens(first, second)
    common = [
        [token for token, differs in zip(text, mark.tolist(), strict=True) if not differs]
        for text, mark in zip((first, second), marks, strict=True)
    ]
    assert common[0] == common[1]
    assert len(common[0]) == longest(first, second)


@given(first=TEXTS, second=TEXTS, run=st.integers(1, 4))
def test_longer_runs_only_take_matches_away(first: list[int], second: list[int], run: int) -> None:
    every, some = differing_tokens(first, second), differing_tokens(first, second, min_run=run)
    for all_matches, long_matches in zip(every, some, strict=True):
        assert bool((long_matches | ~all_matches).all())
    assert int((~some[0]).sum()) == int((~some[1]).sum())


@given(text=TEXTS)
def test_equal_texts_do_not_differ(text: list[int]) -> None:
    for mark in differing_tokens(text, list(text), min_run=9):
        assert mark.tolist() == [False] * len(text)


def test_short_runs_differ_unless_both_texts_begin_or_end_with_them() -> None:
    first, second = [9, 5, 6, 20, 21, 7, 8], [9, 20, 21, 30, 31, 32, 8]
    for run, wanted in ((1, [0, 1, 1, 0, 0, 1, 0]), (2, [0, 1, 1, 0, 0, 1, 0]),
                        (3, [0, 1, 1, 1, 1, 1, 0])):  # fmt: skip
        assert differing_tokens(first, second, min_run=run)[0].int().tolist() == wanted
    assert differing_tokens(first, second, min_run=3)[1].int().tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_a_run_must_go_on_in_both_texts() -> None:
    """5 6 stand together in the first text only: no run of two."""
    marks = differing_tokens([2, 5, 6, 3], [4, 5, 7, 6, 8], min_run=2)
    assert [bool(mark.all()) for mark in marks] == [True, True]


# Draws --------------------------------------------------------------------------------------


def test_draws_follow_the_law_of_drawing_one_after_the_other() -> None:
    weights, count, rows = [0.1, 0.2, 0.7, 1.0], 2, 20_000
    wanted = [0.0] * 4
    for order in permutations(range(4), count):
        left, probability = sum(weights), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        for i in order:
            wanted[i] += probability
    table = torch.tensor(weights).expand(rows, 4)
    drawn = draw_positions(table, torch.full((rows,), count), generator=generator())
    assert bool((drawn.sum(dim=1) == count).all())
    assert drawn.double().mean(dim=0).tolist() == pytest.approx(wanted, abs=0.01)


def test_positions_without_weight_are_never_drawn() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 1e-30], [0.0, 0.0, 0.0, 0.0]])
    drawn = draw_positions(weights, torch.tensor([3, 1]), generator=generator())
    assert drawn.int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]


# TARS ---------------------------------------------------------------------------------------


def test_differing_tokens_weigh_more() -> None:
    """The prompt, which both rows share, and the padding are no part of the alignment."""
    tokens = batch([5, 6, 7], [8, 9, 10, 11, 20, END], [21, 8, 9, 10, 11, END])
    terms = TARS(differing=2.5).weigh(tokens, generator=generator())
    assert terms.inputs is None
    weights = [row[mask].tolist() for row, mask in zip(terms.weights, tokens.mask, strict=True)]
    assert weights == [[1, 1, 1, 1, 2.5, 1], [2.5, 1, 1, 1, 1, 1]]
    assert bool((terms.weights[~tokens.mask] == 1).all())


def test_pairs_are_aligned_with_their_own_partner() -> None:
    ids = torch.tensor([[3, 4], [5, 6], [3, 7], [5, 6]])  # chosen 0, chosen 1, rejected 0, 1
    mask = torch.ones(4, 2, dtype=torch.bool)
    tokens = PreferenceTokens(ids, mask, {}, torch.tensor([PAD]), VOCABULARY)
    weights = TARS().weigh(tokens, generator=generator()).weights
    assert weights.tolist() == [[1, 4], [1, 1], [1, 4], [1, 1]]


@given(share=st.floats(0.01, 0.99), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_share_of_ordinary_tokens_is_hidden(share: float, width: int, seed: int) -> None:
    tokens = many(4, width)
    terms = TARS(differing=1.0, share=share).weigh(tokens, generator=generator(seed))
    hidden = terms.weights == 0
    assert hidden.sum(dim=1).tolist() == [int(share * (width - 1) + 1e-6)] * 4
    assert not bool(hidden[:, -1].any())  # the end is spared
    assert bool((terms.weights[~hidden] == 1).all())


def test_every_exact_share_is_met() -> None:
    """0.29 * 100 is below 29 in floating point."""
    hidden = TARS(share=0.29).weigh(many(2, 101), generator=generator()).weights == 0
    assert hidden.sum(dim=1).tolist() == [29, 29]


def test_prompt_and_padding_are_never_hidden() -> None:
    tokens = batch([5, 6, 7, 8], [9, 10, END], [11, 12, 13, END])
    for seed in range(20):
        hidden = TARS(share=0.9).weigh(tokens, generator=generator(seed)).weights == 0
        assert not bool((hidden & ~tokens.mask).any())
        assert hidden.sum(dim=1).tolist() == [1, 2]


def test_tokens_are_hidden_in_proportion_to_their_irrelevance() -> None:
    relevance = torch.tensor([1.0, NAN, 0.75, 0.0, 0.0])
    tokens = many(20_000, 5, relevance)
    method = TARS(differing=1.0, share=0.25, relevance="relevance")
    terms = method.weigh(tokens, generator=generator())
    rates = (terms.weights == 0).double().mean(dim=0).tolist()
    assert rates[:2] == [0.0, 0.0] and rates[4] == 0.0  # the end is special
    assert rates[2:4] == pytest.approx([0.2, 0.8], abs=0.01)


def test_the_reference_hides_what_it_expects() -> None:
    chances = torch.tensor([0.1, 0.4, 0.5])
    tokens = many(20_000, 4)
    log_probs = torch.cat([chances.log(), torch.zeros(1)]).expand(20_000, 4)
    told = PreferenceTokens(
        tokens.ids, tokens.mask, {"reference": log_probs}, tokens.special, VOCABULARY
    )
    method = TARS(differing=1.0, share=0.34, relevance="reference")
    assert method.needs == ("reference",)
    rates = (method.weigh(told, generator=generator()).weights == 0).double().mean(dim=0)
    assert rates.tolist() == pytest.approx([0.1, 0.4, 0.5, 0.0], abs=0.01)


def test_hidden_tokens_that_differ_weigh_nothing() -> None:
    tokens = batch([5], [8, 9, END], [10, 11, END])
    weights = TARS(share=0.5).weigh(tokens, generator=generator()).weights
    assert [sorted(row[mask].tolist()) for row, mask in zip(weights, tokens.mask, strict=True)] == [
        [0, 1, 4]
    ] * 2


def test_hidden_tokens_are_replaced_and_only_those() -> None:
    tokens = many(6, 11)
    before = tokens.ids.clone()
    terms = TARS(share=0.5, replace_with=31).weigh(tokens, generator=generator())
    assert terms.inputs is not None and torch.equal(tokens.ids, before)
    hidden = terms.weights == 0
    assert hidden.sum(dim=1).tolist() == [5] * 6
    assert torch.equal(terms.inputs, torch.where(hidden, 31, before))


def test_random_replacements_are_ordinary_tokens() -> None:
    tokens = many(2_000, 11)
    method = TARS(share=0.5, replace_with="random")
    terms = method.weigh(tokens, generator=generator())
    assert terms.inputs is not None
    hidden = terms.weights == 0
    assert torch.equal(terms.inputs[~hidden], tokens.ids[~hidden])
    drawn = terms.inputs[hidden].bincount(minlength=VOCABULARY)
    assert drawn[:2].tolist() == [0, 0] and drawn.shape[0] == VOCABULARY
    rate = drawn[2:].double() / drawn.sum()
    assert rate.tolist() == pytest.approx([1 / 30] * 30, abs=0.01)


def test_the_generator_is_the_only_chance() -> None:
    tokens, method = many(3, 30), TARS(share=0.3, replace_with="random")
    one, two = generator(7), generator(7)
    first, second = method.weigh(tokens, generator=one), method.weigh(tokens, generator=two)
    assert torch.equal(first.weights, second.weights)
    assert first.inputs is not None and second.inputs is not None
    assert torch.equal(first.inputs, second.inputs)
    assert not torch.equal(method.weigh(tokens, generator=one).weights, first.weights)
    before = one.get_state()
    TARS().weigh(tokens, generator=one)
    assert torch.equal(one.get_state(), before)  # and it is left alone where nothing is drawn


def test_short_answers_and_relevant_ones_keep_every_token() -> None:
    weights = TARS(share=0.1).weigh(many(2, 10), generator=generator()).weights
    assert bool((weights == 1).all())
    tokens = many(2, 10, torch.ones(10))
    weights = TARS(share=0.9, relevance="relevance").weigh(tokens, generator=generator()).weights
    assert bool((weights == 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"differing": -1.0}, r"differing must be at least 0 and finite, got -1\.0\. Use 4\.0"),
        ({"differing": NAN}, "differing must be at least 0 and finite, got nan"),
        ({"min_run": 0}, r"min_run must be at least 1, got 0\. Use 3"),
        ({"share": 1.0}, r"share must be in \[0, 1\), got 1\.0\. Use 0\.1"),
        ({"share": -0.1}, r"share must be in \[0, 1\), got -0\.1"),
        ({"share": 0.1, "relevance": "policy"}, r"relevance must be None, .*, got 'policy'\. The"),
        ({"relevance": "clip"}, r"share must be positive with relevance, got 0\.0\. Relevance"),
        ({"replace_with": 5}, r"share must be positive with replace_with, got 0\.0\. Use"),
        ({"share": 0.1, "replace_with": -1}, "replace_with must be None, .*, got -1. Give the"),
        ({"share": 0.1, "replace_with": "mask"}, "replace_with must be None, .*, got 'mask'"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^TARS: " + message):
        TARS(**arguments)


def test_errors_on_use() -> None:
    method = TARS(share=0.5, relevance="clip")
    told = batch([5], [8, 9], [10, 11], clip=([0.5, 1.5], [0.0, 0.0]))
    with pytest.raises(ValueError, match=r"^TARS: clip must be in \[0, 1\] .*, got 1\.5\. Scale"):
        method.weigh(told, generator=generator())
    with pytest.raises(ValueError, match=r"^TARS: values must hold 'clip', got \[\]\. Name it in"):
        method.weigh(many(2, 4), generator=generator())
    with pytest.raises(ValueError, match="^TARS: replace_with must be an id below 32, got 32. Giv"):
        TARS(share=0.5, replace_with=32).weigh(many(2, 4), generator=generator())
    for bad in (-1.0, NAN):
        with pytest.raises(ValueError, match="^PreferenceTerms: weights must be finite and >= 0"):
            PreferenceTerms(torch.tensor([[1.0, bad]]))
