"""What every definition of advantages and every weighing of tokens must do, whatever its method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.types import Rollouts, TokenSignals
from tests.rl.contract_table import Case, of_kind

NAN = float("nan")
few = settings(max_examples=20)  # for each row of the table
FIELDS = ("rewards", "outcome", "lengths", "scores")

advantages = of_kind("advantages")
weighing = of_kind("tokens")


def make_rollouts(seed: int, groups: int = 3, size: int = 5) -> Rollouts:
    """Return completions of which some have no reward, no outcome or no token."""
    generator = torch.Generator().manual_seed(seed)

    def some(share: float) -> Tensor:
        return torch.rand(groups, size, generator=generator) < share

    outcome = some(0.5).float()
    outcome[0] = float(seed % 2)  # a group without spread
    return Rollouts(
        rewards=torch.where(some(0.2), NAN, outcome + 0.25 * some(0.3)),
        outcome=torch.where(some(0.1), NAN, outcome),
        lengths=torch.randint(0, 9, (groups, size), generator=generator),
        scores=-torch.rand(groups, size, generator=generator),
        longest=9,
    )


def take(rollouts: Rollouts, rows: Tensor, columns: Tensor | None = None) -> Rollouts:
    """Return some groups, or these completions of all groups."""
    chosen = {}
    for name in FIELDS:
        value = getattr(rollouts, name)[rows]
        chosen[name] = value if columns is None else value[:, columns]
    return replace(rollouts, **chosen)


@advantages
@few
@given(seed=st.integers(0, 10_000))
def test_advantages_are_finite_and_zero_without_a_reward(case: Case, seed: int) -> None:
    rollouts = make_rollouts(seed)
    copies = {name: getattr(rollouts, name).clone() for name in FIELDS}
    found = case.build().compute(rollouts)
    assert found.shape == (3, 5) and found.dtype == torch.float32 and not found.requires_grad
    assert bool(torch.isfinite(found).all())
    assert bool((found[torch.isnan(rollouts.rewards)] == 0).all())
    assert torch.equal(case.build().compute(rollouts), found)
    for name, value in copies.items():
        torch.testing.assert_close(getattr(rollouts, name), value, rtol=0, atol=0, equal_nan=True)


@advantages
@few
@given(seed=st.integers(0, 10_000), order=st.permutations(range(5)))
def test_neither_other_groups_nor_the_order_matters(
    case: Case, seed: int, order: list[int]
) -> None:
    rollouts, part = make_rollouts(seed), case.build()
    found = part.compute(rollouts)
    for i in range(3):
        alone = part.compute(take(rollouts, torch.tensor([i])))
        torch.testing.assert_close(alone[0], found[i], rtol=1e-5, atol=1e-6)
    groups, columns = torch.tensor([2, 0, 1]), torch.tensor(order)
    moved = part.compute(take(rollouts, groups, columns))
    torch.testing.assert_close(moved, found[groups][:, columns], rtol=1e-5, atol=1e-6)


@advantages
def test_right_answers_are_above_wrong_ones(case: Case) -> None:
    outcome = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    rollouts = Rollouts(
        outcome, outcome, torch.tensor([[3, 3, 5, 5]]), scores=-torch.ones(1, 4), longest=8
    )
    found = case.build().compute(rollouts)[0]
    assert found[[0, 3]].min() > 0 > found[[1, 2]].max()
    for value in (torch.zeros_like(outcome), torch.ones_like(outcome)):
        same = replace(rollouts, rewards=value, outcome=value)
        assert case.build().compute(same).tolist() == [[0.0] * 4]


def make_tokens(case: Case, seed: int, rows: int = 4, width: int = 6) -> TokenSignals:
    """Return tokens after an update, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(rows, width, generator=generator) * 3
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    return TokenSignals(
        entropy=entropy,
        ratio=torch.rand(rows, width, generator=generator) + 0.5,
        advantages=torch.randn(rows, 1, generator=generator).expand(rows, width).clone(),
        mask=mask,
        statistics=case.build().statistics(entropy[mask]),
        clip=(0.2, 0.28),
    )


@weighing
@few
@given(seed=st.integers(0, 10_000))
def test_terms_are_finite_whatever_stands_in_the_padding(case: Case, seed: int) -> None:
    tokens, part = make_tokens(case, seed), case.build()
    found = part.weigh(tokens)
    noise = {
        name: torch.where(tokens.mask, getattr(tokens, name), value)
        for name, value in (("entropy", NAN), ("ratio", 50.0))
    }
    again = part.weigh(replace(tokens, **noise))
    for name in ("advantages", "clip_low", "clip_high"):
        value = getattr(found, name)
        assert value.shape == (4, 6) and bool(torch.isfinite(value[tokens.mask]).all())
        assert not value.requires_grad
        assert torch.equal(getattr(again, name)[tokens.mask], value[tokens.mask])
    assert found.clip_low.min() > 0 and found.clip_high.min() > 0
    # No token turns against the sign of its completion.
    assert bool((found.advantages * tokens.advantages)[tokens.mask].min() >= 0)


@weighing
@few
@given(seed=st.integers(0, 10_000))
def test_how_a_batch_is_cut_into_micro_batches_does_not_matter(case: Case, seed: int) -> None:
    tokens, part = make_tokens(case, seed), case.build()
    whole = part.weigh(tokens)
    for rows in (slice(0, 1), slice(1, 4)):
        names = ("entropy", "ratio", "advantages", "mask")
        some = replace(tokens, **{name: getattr(tokens, name)[rows] for name in names})
        for name in ("advantages", "clip_low", "clip_high"):
            assert torch.equal(getattr(part.weigh(some), name), getattr(whole, name)[rows])


@weighing
def test_statistics_do_not_depend_on_the_order_and_may_be_of_nothing(case: Case) -> None:
    entropy, part = torch.rand(50, generator=torch.Generator().manual_seed(0)), case.build()
    one, other = part.statistics(entropy), part.statistics(entropy.flip(0))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)
    nothing = part.statistics(entropy[:0])
    assert nothing.keys() == one.keys()
    tokens = replace(make_tokens(case, 0), statistics=nothing)
    assert bool(torch.isfinite(part.weigh(tokens).advantages[tokens.mask]).all())


@pytest.mark.parametrize("name", FIELDS)
def test_the_helper_makes_what_it_says(name: str) -> None:
    made = [getattr(make_rollouts(seed), name) for seed in range(9)]
    assert all(value.shape == (3, 5) for value in made)
    if name in ("rewards", "outcome"):
        assert any(bool(torch.isnan(value).any()) for value in made)
    if name == "lengths":
        assert min(int(value.min()) for value in made) == 0
