from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.drpo import DRPO, drpo_advantages
from onlinesel.rl.types import Rollouts

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "drpo.json").read_text("utf-8"))
NAN = float("nan")

each_case = pytest.mark.parametrize("case", GOLDEN)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden_advantages(case: str, scores: Tensor) -> Tensor:
    """Return the advantages of a golden case in float64, groups of four, flat."""
    given = GOLDEN[case]["inputs"]
    rewards = float64(given["rewards"]).view(-1, 4)
    share = float64(GOLDEN[case]["lengths"]).view(-1, 4) / given["max_response_length"]
    arguments = (rewards == 1, rewards == 0, share, scores.view(-1, 4))
    return drpo_advantages(*arguments, lam=given["lam"], tau=given["tau"]).flatten()


@each_case
def test_golden_vectors(case: str) -> None:
    golden = GOLDEN[case]
    given = golden["inputs"]
    found = golden_advantages(case, float64(golden["scores"]))
    wanted = float64(golden["equivalent_advantages"])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    # Through the class, in float32.
    outcome = torch.tensor(given["rewards"]).view(-1, 4)
    rollouts = Rollouts(
        rewards=outcome,
        outcome=outcome,
        lengths=torch.tensor(golden["lengths"]).long().view(-1, 4),
        scores=torch.tensor(golden["scores"]).view(-1, 4),
        longest=given["max_response_length"],
    )
    through = DRPO(lam=given["lam"], tau=given["tau"]).compute(rollouts)
    assert through.dtype == torch.float32
    torch.testing.assert_close(through.flatten().double(), wanted, rtol=2e-5, atol=0)


@each_case
def test_the_golden_gradient_and_loss(case: str) -> None:
    golden = GOLDEN[case]
    given = golden["inputs"]
    logp = float64(given["new_logp"]).requires_grad_()
    mask = float64(given["mask"])
    scores = (logp * mask).sum(dim=1) / mask.sum(dim=1)
    advantages = golden_advantages(case, scores.detach())
    loss = -(advantages * scores).sum() / golden["n_groups_in_denominator"]
    (gradient,) = torch.autograd.grad(loss, logp)
    wanted = float64(golden["grad_discriminative"])
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-18)


def test_the_constraint_is_zero_in_the_first_update() -> None:
    # With the policy that sampled, old - new is 0 everywhere, and so is max(0 - delta, 0).
    golden = GOLDEN["default"]["inputs"]
    kl = float64(golden["old_logp"]) - float64(golden["old_logp"])
    assert max(kl.mean().item() - golden["delta"], 0.0) == 0.0
    assert GOLDEN["default"]["penalty_coefficient"] > 0  # in a later one it is not


def make(outcome: list[float], lengths: list[int], scores: list[float]) -> Rollouts:
    rewards = torch.tensor([outcome])
    return Rollouts(
        torch.nan_to_num(rewards), rewards, torch.tensor([lengths]), torch.tensor([scores]), 10
    )


def test_by_hand() -> None:
    rollouts = make([1.0, 0.0, 1.0, 0.0], [2, 9, 4, 9], [-1.0, -2.0, -1.0, -4.0])
    found = DRPO(lam=0.5, tau=2.0).compute(rollouts)[0].tolist()
    # exp(-0.2 / 0.5) : exp(-0.4 / 0.5) and exp(-1) : exp(-2).
    right, wrong = 1 / (1 + 2.718281828**-0.4), 1 / (1 + 2.718281828**-1)
    assert found == pytest.approx([right, -wrong, 1 - right, wrong - 1], rel=1e-6)


def test_a_flipped_sign_would_lengthen_answers_or_train_the_wrong_ones() -> None:
    rollouts = make([1.0, 1.0, 0.0, 0.0], [2, 8, 5, 5], [-1.0, -1.0, -1.0, -3.0])
    short, long, likely, unlikely = DRPO(lam=0.3, tau=1.0).compute(rollouts)[0].tolist()
    assert short > 2 * long > 0 > unlikely > likely


def test_the_limits_are_uniform() -> None:
    rollouts = make([1.0, 1.0, 0.0, 0.0], [2, 8, 5, 5], [-1.0, -1.0, -1.0, -3.0])
    found = DRPO(lam=float("inf"), tau=float("inf")).compute(rollouts)
    assert found.tolist() == [[0.5, 0.5, -0.5, -0.5]]


def test_groups_of_one_kind_get_zero() -> None:
    for outcome in ([1.0, 1.0], [0.0, 0.0], [1.0, NAN], [NAN, NAN]):
        assert DRPO().compute(make(outcome, [2, 3], [-1.0, -1.0])).tolist() == [[0.0, 0.0]]


def test_rows_that_cannot_count_get_zero_and_no_share() -> None:
    base = make([1.0, 1.0, 0.0, 0.0], [2, 3, 4, 5], [-1.0, -1.0, -2.0, -3.0])
    alone = DRPO().compute(make([1.0, 0.0], [2, 5], [-1.0, -3.0]))[0]
    assert alone.tolist() == [1.0, -1.0]
    gap = torch.tensor([[False, True, True, False]])
    spoilt = [
        replace(base, lengths=base.lengths.masked_fill(gap, 0)),
        replace(base, rewards=base.rewards.masked_fill(gap, NAN)),
        replace(base, outcome=base.outcome.masked_fill(gap, NAN)),
    ]
    if base.scores is not None:
        spoilt += [replace(base, scores=base.scores.masked_fill(gap, x)) for x in (NAN, -1e400)]
    assert len(spoilt) == 5
    for rollouts in spoilt:
        assert DRPO().compute(rollouts).tolist() == [[1.0, 0.0, 0.0, -1.0]]


row = st.tuples(
    st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 10), st.floats(-30.0, 0.0, width=32)
)
group = st.lists(row, min_size=5, max_size=5)


@given(groups=st.lists(group, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_properties(groups: Any, seed: int) -> None:
    outcome, lengths, scores = (
        torch.tensor([[entry[i] for entry in g] for g in groups]) for i in range(3)
    )
    rollouts = Rollouts(outcome, outcome, lengths, scores, longest=10)
    found = DRPO().compute(rollouts)
    assert bool(torch.isfinite(found).all())
    assert bool((found[outcome == 1] >= 0).all()) and bool((found[outcome == 0] <= 0).all())
    counts = lengths > 0
    mixed = (counts & (outcome == 1)).any(dim=1) & (counts & (outcome == 0)).any(dim=1)
    for part, sign in ((found.clamp(min=0), 1.0), (found.clamp(max=0), -1.0)):
        torch.testing.assert_close(part.sum(dim=1), sign * mixed.float(), rtol=1e-5, atol=0)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    permuted = Rollouts(outcome[order], outcome[order], lengths[order], scores[order], 10)
    assert torch.equal(found[order], DRPO().compute(permuted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 0.0}, r"lam must be positive, got 0\.0\. Use 0\.1"),
        ({"tau": -1.0}, r"tau must be positive, got -1\.0\. Use 10\.0"),
        ({"lam": NAN}, r"lam must be positive, got nan\. Use 0\.1"),
    ],
)
def test_errors_of_the_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match="^DRPO: " + message):
        DRPO(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, r"rollouts must hold scores, got None\. Fill them"),
        ({"longest": 0}, r"longest must be at least 1, got 0\. Say how many"),
        ({"outcome": torch.tensor([[1.0, 0.5]])}, r"outcome must be 0 or 1, got 0\.5\. Name the"),
    ],
)
def test_errors_of_the_rollouts(change: dict[str, Any], message: str) -> None:
    rollouts = replace(make([1.0, 0.0], [2, 3], [-1.0, -1.0]), **change)
    with pytest.raises(ValueError, match="^DRPO: " + message):
        DRPO().compute(rollouts)


def test_what_the_host_must_know() -> None:
    assert DRPO.needs_scores and DRPO.per_sequence
