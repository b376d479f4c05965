"""What every mixture must do, whatever its method."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onlinesel import mixing
from onlinesel.mixing import Mixture
from onlinesel.types import State
from tests.mixing.contract_table import CASES, DOMAINS, Case

NAN, INF = float("nan"), float("inf")
NUMBERS = (0.5, 1.0, 2.0, 1.5)
SIZES = torch.tensor([700, 20, 200, 80])
LABELS = ["Idea", "Paper", "Formula", "Cost", "When it loses", "If nothing is known"]

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few = settings(max_examples=20)  # for each row of the table


def step_rows(step: int, size: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return domains, losses and reference losses of the rows of a step.

    Domain 3 has a row in every third step only.
    """
    generator = torch.Generator().manual_seed(step)
    domain = torch.randint(DOMAINS - (step % 3 > 0), (size,), generator=generator)
    loss = 1.0 + domain * 0.4 + torch.rand(size, generator=generator)
    return domain, loss, torch.rand(size, generator=generator) + 1.0


def play(mixture: Mixture, state: State, steps: range) -> State:
    for step in steps:
        domain, loss, reference = step_rows(step)
        state = mixture.observe(domain, loss, state, reference_loss=reference)
    return state


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        value.dtype == b[name].dtype and torch.equal(value, b[name]) for name, value in a.items()
    )


def test_the_table_covers_every_mixture() -> None:
    names = set(mixing.__all__) - {"DomainSampler", "Mixture"}
    assert {type(case.build(NUMBERS)).__name__ for case in CASES.values()} == names


@pytest.mark.parametrize("name", sorted(set(mixing.__all__) - {"DomainSampler", "Mixture"}))
def test_the_module_is_a_method_card(name: str) -> None:
    module = __import__(getattr(mixing, name).__module__, fromlist=["__doc__"])
    paragraphs = module.__doc__.split("\n\n")
    assert paragraphs[0].startswith(f"{name}: ")
    labelled = [re.match(r"([A-Z][\w ]*): ", text) for text in paragraphs[1:]]
    found = [match[1] for match in labelled if match]
    assert [label for label in found if not label.startswith("Where this differs")] == LABELS


@every
def test_it_is_a_frozen_dataclass_whose_repr_builds_it_again(case: Case) -> None:
    mixture = case.build(list(NUMBERS))  # a list becomes a tuple
    assert isinstance(mixture, Mixture) and is_dataclass(mixture)
    assert eval(repr(mixture), vars(mixing)) == mixture == case.build(NUMBERS)
    for name in [f.name for f in fields(mixture)] + ["needs"]:
        with pytest.raises(FrozenInstanceError):
            setattr(mixture, name, None)


@every
@few
@given(
    steps=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, DOMAINS - 1),
                st.sampled_from([0.0, 0.3, 2.0, 60.0, 1e4, -5.0, NAN, INF, -INF]),
                st.sampled_from([0.0, 1.0, 3.0, NAN]),
            ),
            max_size=6,
        ),
        max_size=12,
    )
)
def test_proportions_are_positive_and_sum_to_one(
    case: Case, steps: list[list[tuple[int, float, float]]]
) -> None:
    mixture = case.build(NUMBERS)
    state = mixture.init(SIZES)
    for rows in steps:
        domain = torch.tensor([row[0] for row in rows], dtype=torch.int64)
        loss, reference = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
        state = mixture.observe(domain, loss, state, reference_loss=reference)
        shares = mixture.proportions(state)
        assert shares.dtype == torch.float64 and shares.shape == (DOMAINS,)
        assert bool((shares > 0).all()) and shares.sum().item() == pytest.approx(1, abs=1e-12)


@every
def test_losses_move_the_proportions_if_and_only_if_it_adapts(case: Case) -> None:
    mixture = case.build(NUMBERS)
    start = mixture.init(SIZES)
    moved = mixture.proportions(play(mixture, start, range(12)))
    assert torch.equal(moved, mixture.proportions(start)) != case.adapts
    assert bool(mixture.needs) == case.adapts


@every
@few
@given(order=st.permutations(range(DOMAINS)))
def test_the_numbering_of_the_domains_does_not_matter(case: Case, order: list[int]) -> None:
    moved = torch.tensor(order)
    place = moved.argsort()  # the new number of each old domain
    one, other = case.build(NUMBERS), case.build([NUMBERS[i] for i in order])
    state, renumbered = one.init(SIZES), other.init(SIZES[moved])
    for step in range(12):
        domain, loss, reference = step_rows(step)
        state = one.observe(domain, loss, state, reference_loss=reference)
        renumbered = other.observe(place[domain], loss, renumbered, reference_loss=reference)
        torch.testing.assert_close(
            other.proportions(renumbered), one.proportions(state)[moved], rtol=1e-9, atol=1e-12
        )


@every
@few
@given(order=st.permutations(range(12)))
def test_the_order_of_the_rows_does_not_matter(case: Case, order: list[int]) -> None:
    mixture, moved = case.build(NUMBERS), torch.tensor(order)
    state = play(mixture, mixture.init(SIZES), range(4))
    domain, loss, reference = step_rows(6)
    want = mixture.observe(domain, loss, state, reference_loss=reference)
    got = mixture.observe(domain[moved], loss[moved], state, reference_loss=reference[moved])
    assert same(got, want)


@every
@few
@given(
    losses=st.lists(st.floats(0, 8, allow_subnormal=False), min_size=DOMAINS, max_size=DOMAINS),
    rows=st.integers(1, 3),
)
def test_after_equal_histories_a_larger_loss_never_gets_a_smaller_share(
    case: Case, losses: list[float], rows: int
) -> None:
    mixture = case.build([1.0] * DOMAINS)
    state = mixture.init(torch.full((DOMAINS,), 50))
    domain = torch.arange(DOMAINS).repeat(rows)
    reference = torch.ones(len(domain))
    for _ in range(20):
        state = mixture.observe(
            domain, torch.full((len(domain),), 2.0), state, reference_loss=reference
        )
    before = mixture.proportions(state)
    torch.testing.assert_close(before, torch.full_like(before, 1 / DOMAINS))
    loss = torch.tensor(losses)
    state = mixture.observe(domain, loss.repeat(rows), state, reference_loss=reference)
    shares = mixture.proportions(state)
    assert bool((shares[loss.argsort()].diff() >= -1e-15).all())
    if case.adapts and loss.max() > loss.min().clamp(min=1.0) + 0.01:
        assert shares[loss.argmax()] > shares[loss.argmin()] + 1e-9


@every
def test_rows_that_are_not_finite_are_ignored(case: Case) -> None:
    mixture = case.build(NUMBERS)
    state = play(mixture, mixture.init(SIZES), range(4))
    domain, loss, reference = step_rows(7)
    extra = torch.tensor([0, 1, 2, 3])
    bad = torch.tensor([NAN, INF, -INF, NAN])
    got = mixture.observe(
        torch.cat([extra, domain]),
        torch.cat([bad, loss]),
        state,
        reference_loss=torch.cat([torch.ones(4), reference]),
    )
    assert same(got, mixture.observe(domain, loss, state, reference_loss=reference))
    for rows in (slice(0, 4), slice(0, 0)):
        nothing = mixture.observe(extra[rows], bad[rows], state, reference_loss=torch.ones(4)[rows])
        assert same(nothing, state)


@every
def test_it_is_pure_and_its_state_is_a_flat_mapping_of_tensors(case: Case) -> None:
    mixture = case.build(NUMBERS)
    state = mixture.init(SIZES)
    for step in range(8):
        copy = {name: value.clone() for name, value in state.items()}
        rows = step_rows(step)
        held = [value.clone() for value in rows]
        results = []
        for _ in range(2):
            mixture.proportions(state)
            results.append(mixture.observe(*rows[:2], state, reference_loss=rows[2]))
        assert same(*results) and same(state, copy) and all(map(torch.equal, rows, held))
        assert all(isinstance(k, str) and v.is_contiguous() for k, v in results[0].items())
        state = results[0]
    assert torch.equal(SIZES, torch.tensor([700, 20, 200, 80]))
