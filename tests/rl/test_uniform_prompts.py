from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.prompts import PromptPool
from onlinesel.rl.uniform_prompts import GRESO, UniformPrompts
from onlinesel.types import State
from tests.counting import Operations


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def walk(prompts: int, count: int, calls: int, seed: int = 0) -> list[int]:
    pool = PromptPool(UniformPrompts(), prompts, trials=8, seed=seed)
    return torch.cat([pool.propose(count) for _ in range(calls)]).tolist()


def streaks(*visits: tuple[int, int]) -> list[int]:
    """Return the streak of one problem after each of its visits."""
    state, found = GRESO().init(1), []
    for successes, trials in visits:
        state = GRESO().observe(torch.tensor([0]), counts(successes), counts(trials), state)
        found.append(int(state["streak"]))
    return found


def with_streaks(values: list[int], p: tuple[float, float] = (0.5, 0.5)) -> State:
    """Return the state of a walk that is about to begin, after some visits."""
    state = GRESO().init(len(values))
    return {**state, "streak": torch.tensor(values), "p": torch.tensor(p)}


@given(prompts=st.integers(1, 12), count=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_problem_comes_once_an_epoch(prompts: int, count: int, seed: int) -> None:
    count = min(count, prompts)
    found = walk(prompts, count, calls=4 * prompts, seed=seed)
    # Also where a batch holds the end of one epoch and the beginning of the next: after every
    # call, no problem is more than one visit ahead of another.
    for end in range(count, len(found) + 1, count):
        visits = torch.bincount(torch.tensor(found[:end]), minlength=prompts)
        assert int(visits.max() - visits.min()) <= 1


def test_epochs_are_shuffled_anew() -> None:
    found = walk(50, 50, calls=2)
    assert found[:50] != found[50:] and sorted(found[:50]) == sorted(found[50:])
    assert found[:50] != sorted(found[:50])
    firsts = torch.tensor([walk(4, 1, calls=1, seed=s)[0] for s in range(400)])
    assert (torch.bincount(firsts, minlength=4) - 100).abs().max() < 45


def test_what_is_taken_is_put_off_and_not_lost() -> None:
    plain = walk(20, 4, calls=5)
    pool = PromptPool(UniformPrompts(), 20, trials=8)
    blocked = torch.tensor(plain[:3])
    found = pool.propose(4, taken=blocked).tolist()
    assert found == plain[3:7]  # in the order of the walk
    found += pool.propose(4).tolist()
    assert found[4:] == plain[:3] + plain[7:8]  # they are next
    found += torch.cat([pool.propose(4) for _ in range(3)]).tolist()
    assert sorted(found) == list(range(20))


def test_a_walk_goes_around_until_it_finds_what_is_free() -> None:
    pool = PromptPool(UniformPrompts(), 1000, trials=8)
    taken = torch.arange(999)
    for _ in range(5):
        assert pool.propose(3, taken=taken).tolist() == [999]


@pytest.mark.parametrize("sampler", [UniformPrompts(), GRESO()])
def test_a_walk_past_many_taken_problems_is_not_quadratic(sampler: Any) -> None:
    """Of a hundred times as many problems each is read as often as before, in not even twice as
    many operations. Two problems at a time would be 50,000 times the operations."""
    found = []
    for size in (1000, 100_000):
        pool, taken = PromptPool(sampler, size, trials=8), torch.arange(size - 2)
        for _ in range(3):
            seen: Counter[str] = Counter()
            with Operations(seen):
                assert len(pool.propose(2, taken=taken)) == 2
            found.append((seen["operations"], seen["elements"] / size))
    for few, many in zip(found[:3], found[3:], strict=True):
        assert many[0] < 2 * few[0] and many[1] < 2 * few[1], found


def test_streaks_by_hand() -> None:
    assert streaks((8, 8), (8, 8), (4, 4)) == [1, 2, 3]
    assert streaks((0, 8), (0, 2), (0, 8)) == [-1, -2, -3]
    # Ended by a mixed visit, or begun anew by the other kind; one completion of 8 is mixed.
    assert streaks((8, 8), (8, 8), (7, 8), (8, 8)) == [1, 2, 0, 1]
    assert streaks((8, 8), (0, 8), (0, 8), (8, 8)) == [1, -1, -2, 1]
    assert streaks((0, 8), (1, 8), (0, 8)) == [-1, 0, -1]


def test_a_problem_that_comes_twice_is_one_visit() -> None:
    state = {**GRESO().init(3), "streak": torch.tensor([2, -1, 3])}
    ids = torch.tensor([0, 1, 0, 2, 1, 2])
    found = GRESO().observe(ids, counts(8, 0, 8, 8, 0, 0), torch.full((6,), 8.0).double(), state)
    assert found["streak"].tolist() == [3, -2, 0]
    # One of two problems is easy and none is hard, not one of three.
    state = {**GRESO(zero_variance=0.9).init(2), "epoch": torch.tensor(2)}
    found = GRESO(zero_variance=0.9).observe(
        torch.tensor([0, 1, 1]), counts(8, 4, 4), counts(8, 8, 8), state
    )
    assert found["p"].tolist() == pytest.approx([0.49, 0.51])  # 1/2 is above 0.3


@pytest.mark.parametrize(
    ("streak", "p", "kept"),
    [
        (0, (0.5, 0.5), 1.0), (0, (0.05, 0.05), 1.0),
        (1, (0.5, 0.9), 0.5), (3, (0.5, 0.9), 0.125), (2, (0.8, 0.1), 0.64),
        (-1, (0.9, 0.5), 0.5), (-3, (0.9, 0.5), 0.125), (-2, (0.1, 0.8), 0.64),
        (9, (0.5, 0.5), 0.01), (-50, (0.5, 0.5), 0.01),
    ],
)  # fmt: skip
def test_how_often_a_problem_is_skipped(streak: int, p: tuple[float, float], kept: float) -> None:
    size = 20000
    state = with_streaks([streak] * size, p)
    skipped = GRESO().skips(torch.arange(size), state, generator())
    share = 1 - skipped.double().mean().item()
    assert share == pytest.approx(kept, abs=4 * (kept * (1 - kept) / size) ** 0.5 + 1e-12)


def test_the_walk_skips_and_moves_on() -> None:
    # Half of the problems have been right six times in a row: they come 64 times more rarely.
    state = with_streaks([6] * 500 + [0] * 500)
    free = torch.ones(1000, dtype=torch.bool)
    ids, after = GRESO().propose(400, state, free=free, trials=8, generator=generator())
    assert 1 <= int((ids < 500).sum()) <= 20  # of some 400 that are passed: 6 on average
    assert int(after["epoch"]) == 1 and 700 <= int(after["cursor"]) <= 900
    # What was skipped has had its turn.
    more, after = GRESO().propose(300, after, free=free, trials=8, generator=generator(1))
    old, new = set(ids.tolist()), set(more.tolist())
    assert int(after["epoch"]) == 2 and len(new) == 300
    assert len(new - old) >= 90 and len(new & old) <= 210


def test_two_epochs_are_walked_before_skips_are_overruled() -> None:
    # Some 100 of 200 are kept in the first epoch and 50 in the second.
    state, free = with_streaks([1] * 200), torch.ones(200, dtype=torch.bool)
    for count, epoch in ((60, 1), (130, 2), (190, 2)):
        ids, after = GRESO().propose(count, state, free=free, trials=8, generator=generator())
        assert int(after["epoch"]) == epoch and len(ids.unique()) == count


def test_a_batch_is_full_even_if_everything_is_skipped() -> None:
    state = with_streaks([-20] * 50)
    free = torch.arange(50) != 7
    ids, _ = GRESO().propose(30, state, free=free, trials=8, generator=generator())
    assert len(ids.unique()) == 30 and 7 not in ids.tolist()


def observed(epoch: int, easy: int, hard: int, mixed: int, **settings: float) -> list[float]:
    size, sampler = easy + hard + mixed, GRESO(**settings)
    state = {**sampler.init(size), "epoch": torch.tensor(epoch)}
    successes = counts(*([8] * easy + [0] * hard + [3] * mixed))
    trials = torch.full((size,), 8.0, dtype=torch.float64)
    return sampler.observe(torch.arange(size), successes, trials, state)["p"].tolist()


def test_probabilities_move_towards_their_targets() -> None:
    # Targets: 1/12 easy, 2/12 hard. From there on, fewer are kept; below it more are.
    assert observed(2, easy=2, hard=1, mixed=9) == pytest.approx([0.49, 0.51])
    assert observed(2, easy=0, hard=3, mixed=9) == pytest.approx([0.51, 0.49])
    assert observed(2, easy=1, hard=2, mixed=9) == pytest.approx([0.49, 0.49])
    assert observed(2, easy=0, hard=0, mixed=12) == pytest.approx([0.51, 0.51])
    assert observed(5, easy=6, hard=6, mixed=0) == pytest.approx([0.49, 0.49])
    settings = {"zero_variance": 0.9, "change": 0.2}  # targets 0.3 and 0.6
    assert observed(2, easy=2, hard=5, mixed=3, **settings) == pytest.approx([0.7, 0.7])
    assert observed(2, easy=4, hard=5, mixed=1, **settings) == pytest.approx([0.3, 0.7])
    assert observed(2, easy=3, hard=6, mixed=1, **settings) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("zero_variance", [0.25, 0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("groups", [4, 6, 12, 20, 30])
def test_a_share_that_is_the_target_on_paper_lowers_the_probability(
    zero_variance: float, groups: int
) -> None:
    """As the paper's code has it, and whatever the divisions round to."""
    for i, part in enumerate((Fraction(1, 3), Fraction(2, 3))):
        target = part * Fraction(str(zero_variance))
        for count in range(groups + 1):
            easy, hard = (count, 0) if i == 0 else (0, count)
            found = observed(2, easy, hard, groups - count, zero_variance=zero_variance)[i]
            wanted = 0.49 if Fraction(count, groups) >= target else 0.51
            assert found == pytest.approx(wanted)


def test_uniform_prompts_count_nothing_and_take_any_reward() -> None:
    pool = PromptPool(UniformPrompts(), 3, trials=4)
    pool.observe(torch.tensor([0, 2]), torch.tensor([-2.5, 7.0]), torch.tensor([4, 4]), step=3)
    table = pool.table()
    assert [row["visits"] for row in table] == [1, 0, 1] and table[2]["last"] == 3
    with pytest.raises(ValueError, match="PromptPool: successes must be between 0 and trials"):
        PromptPool(GRESO(), 3, trials=4).observe(*(torch.tensor([v]) for v in (0, -2.5, 4)))


def test_probabilities_stay_within_bounds_and_move_from_the_second_epoch() -> None:
    assert observed(1, easy=6, hard=6, mixed=0) == observed(0, 6, 6, 0) == [0.5, 0.5]
    assert observed(2, 6, 6, 0, change=0.9) == pytest.approx([0.05, 0.05])
    assert observed(2, 0, 0, 6, change=0.9) == pytest.approx([0.95, 0.95])
    pool = PromptPool(GRESO(), 10, trials=8)
    values = []
    for _ in range(8):
        ids = pool.propose(5)
        pool.observe(ids, torch.zeros(5), torch.full((5,), 8))
        values.append(pool.metrics()["keep_hard"])
    assert values[:2] == [0.5, 0.5] and values[2] == pytest.approx(0.49)
    assert values == sorted(values, reverse=True) and values[-1] < 0.46


def test_observing_leaves_the_walk_where_it_is() -> None:
    state = with_streaks([0] * 6)
    _, state = GRESO().propose(
        2, state, free=torch.ones(6, dtype=torch.bool), trials=8, generator=generator()
    )
    after = GRESO().observe(torch.tensor([1]), counts(8), counts(8), state)
    for name in ("order", "cursor", "epoch"):
        assert torch.equal(after[name], state[name])


def test_it_rolls_out_fewer_problems_without_spread() -> None:
    def mixed_share(sampler: Any) -> float:
        pool, mixed, visits = PromptPool(sampler, 100, trials=8), 0, 0
        for step in range(120):
            ids = pool.propose(10)
            # A third never solved, a third always.
            right = torch.where(ids % 3 == 0, 0, torch.where(ids % 3 == 1, 8, 4))
            pool.observe(ids, right, torch.full((10,), 8), step=step)
            if step >= 60:
                mixed, visits = mixed + int((right == 4).sum()), visits + 10
        return mixed / visits

    assert mixed_share(UniformPrompts()) == pytest.approx(0.33, abs=0.01)
    assert mixed_share(GRESO()) > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero_variance": 0.0}, r"zero_variance must be between 0 and 1, got 0\.0\. Leave it"),
        ({"zero_variance": 1.0}, r"zero_variance must be between 0 and 1, got 1\.0\. Leave it"),
        ({"change": -0.1}, r"change must be between 0 and 1, got -0\.1\. Leave it out"),
        ({"change": float("nan")}, r"change must be between 0 and 1, got nan\. Leave it out"),
    ],
)
def test_errors(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match="^GRESO: " + message):
        GRESO(**arguments)
