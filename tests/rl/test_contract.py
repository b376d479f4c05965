"""What every gate, choice of rollouts and prompt sampler must do, whatever its method."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

import onlinesel.rl
from onlinesel import Selector, Signals, Strategy
from onlinesel.rl.prompts import PromptPool, PromptSampler
from onlinesel.rl.types import Advantages, TokenWeights
from tests.rl.contract_table import (
    CASES,
    PROMPTS,
    TRIALS,
    Case,
    make_features,
    make_pool,
    of_kind,
)

NAN = float("nan")
few = settings(max_examples=20)  # for each row of the table
MODULES = [
    importlib.import_module(f"onlinesel.rl.{found.name}")
    for found in pkgutil.iter_modules(onlinesel.rl.__path__)
]


every = of_kind("gate", "rollouts", "prompts", "advantages", "tokens")
gates = of_kind("gate")
deciding = of_kind("gate", "rollouts")
samplers = of_kind("prompts")


def test_the_table_covers_every_part() -> None:
    built = {type(case.build()) for case in CASES.values()}
    found = {
        value
        for module in MODULES
        for name in getattr(module, "__all__", ())
        if inspect.isclass(value := getattr(module, name))
        and issubclass(value, (Strategy, PromptSampler, Advantages, TokenWeights))
        and not inspect.isabstract(value)
    }
    assert found == built


@every
def test_it_is_a_frozen_dataclass_whose_repr_builds_it_again(case: Case) -> None:
    part = case.build()
    assert is_dataclass(part)
    names = {name: value for module in MODULES for name, value in vars(module).items()}
    assert eval(repr(part), names) == part
    for name in [field.name for field in fields(part)] + ["other"]:
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)


# Gates and choices of rollouts --------------------------------------------------------------

outcomes = st.sampled_from([0.0, 1.0, NAN])
batches = st.lists(st.lists(outcomes, min_size=2, max_size=6), min_size=1, max_size=6)


def signals(batch: list[list[float]], order: Tensor | None = None) -> Signals:
    """Return the completions of some groups, row by row or in another order."""
    sizes = torch.tensor([len(group) for group in batch])
    made = Signals(
        ids=torch.arange(int(sizes.sum())),
        reward=torch.tensor([value for group in batch for value in group]),
        group=torch.arange(len(batch)).repeat_interleave(sizes),
    )
    return made if order is None else made.take(order)


def decide(case: Case, given: Signals, step: int = 0) -> Tensor:
    """Return the weights that the part itself gives, before a Selector looks at them."""
    generator = torch.Generator().manual_seed(0)
    return case.build().select(given, {}, keep=1, step=step, generator=generator)[0].weights


@deciding
@few
@given(batch=batches, step=st.integers(0, 200))
def test_it_is_a_pure_function(case: Case, batch: list[list[float]], step: int) -> None:
    part, given = case.build(), signals(batch)
    state, generator = {"other": torch.ones(2)}, torch.Generator().manual_seed(0)
    before = generator.get_state()
    copies = {name: value.clone() for name, value in given.present().items()}
    first, after = part.select(given, state, keep=1, step=step, generator=generator)
    second, _ = part.select(given, state, keep=7, step=step, generator=generator)
    assert torch.equal(first.weights, second.weights)
    assert first.weights.dtype == torch.float32 and first.weights.shape == given.reward.shape
    assert after is state and torch.equal(state["other"], torch.ones(2)) and part.init() == {}
    assert torch.equal(generator.get_state(), before)
    for name, value in given.present().items():
        torch.testing.assert_close(value, copies[name], rtol=0, atol=0, equal_nan=True)


@gates
@few
@given(batch=batches, step=st.integers(0, 200))
def test_whole_groups_have_weight_or_none_does(
    case: Case, batch: list[list[float]], step: int
) -> None:
    weights = decide(case, signals(batch), step)
    for group, part in zip(batch, weights.split([len(g) for g in batch]), strict=True):
        assert part.tolist() in ([0.0] * len(group), [1.0] * len(group))
        if len({value for value in group if value == value}) < 2:
            assert part.tolist() == [0.0] * len(group)


@deciding
@few
@given(batch=batches, step=st.integers(0, 200), seed=st.integers(0, 99))
def test_order_and_names_do_not_matter(
    case: Case, batch: list[list[float]], step: int, seed: int
) -> None:
    given, generator = signals(batch), torch.Generator().manual_seed(seed)
    weights = decide(case, given, step)
    order = torch.randperm(given.size, generator=generator)
    assert torch.equal(decide(case, given.take(order), step), weights[order])
    names = torch.randperm(len(batch), generator=generator) * 7 - 2**40
    renamed = Signals(ids=given.ids, reward=given.reward, group=names[given.group])
    assert torch.equal(decide(case, renamed, step), weights)


@deciding
@few
@given(batch=batches, step=st.integers(0, 200))
def test_other_groups_do_not_matter(case: Case, batch: list[list[float]], step: int) -> None:
    together = decide(case, signals(batch), step).split([len(group) for group in batch])
    for group, part in zip(batch, together, strict=True):
        assert torch.equal(decide(case, signals([group]), step), part)


@gates
@few
@given(batch=batches, step=st.integers(0, 200))
def test_completions_without_a_reward_do_not_matter(
    case: Case, batch: list[list[float]], step: int
) -> None:
    given = signals(batch)
    known = ~torch.isnan(given.reward)
    weights = decide(case, given, step)
    if bool(known.any()):
        assert torch.equal(decide(case, given.take(known), step), weights[known])
    for value in given.group[~known].unique():
        mine = given.group == value
        assert bool(known[mine].any()) or not bool(weights[mine].any())
    # A Selector takes their own weight off.
    through = Selector(case.build()).select(given, step=step).weights
    assert torch.equal(through, torch.where(known, weights, 0.0))


@gates
@pytest.mark.parametrize("size", [1, 2, 3, 8, 10, 16])
def test_what_is_said_to_be_possible_is_what_passes(case: Case, size: int) -> None:
    batch = [[1.0] * k + [0.0] * (size - k) for k in range(size + 1)]
    passes = decide(case, signals(batch), step=10_000).view(size + 1, size)[:, 0]
    assert case.build().possible(size) == passes.nonzero().flatten().tolist()


@deciding
@pytest.mark.parametrize("missing", ["reward", "group"])
def test_a_missing_signal_is_named(case: Case, missing: str) -> None:
    assert case.build().needs == ("reward", "group")
    given = {"reward": torch.ones(4), "group": torch.zeros(4, dtype=torch.int64)}
    del given[missing]
    owner = type(case.build()).__name__
    with pytest.raises(ValueError, match=f"^{owner}: signals must hold '{missing}'"):
        decide(case, Signals(**given))


# Prompt samplers ----------------------------------------------------------------------------


def answers(ids: Tensor, step: int) -> Tensor:
    """Return the successes of some problems, which are easy where the first feature is large."""
    rate = torch.sigmoid(3 * make_features()[ids, 0]).double()
    draws = torch.rand(len(ids), TRIALS, generator=torch.Generator().manual_seed(step))
    return (draws < rate[:, None]).sum(dim=1)


def play(pool: PromptPool, steps: range, count: int = 4) -> list[list[int]]:
    """Propose and observe for some steps; return the proposals."""
    found = []
    for step in steps:
        ids = pool.propose(count, taken=torch.tensor([step % PROMPTS]))
        found.append(ids.tolist())
        pool.observe(ids, answers(ids, step), torch.full((len(ids),), TRIALS), step=step)
    return found


def warm(case: Case, seed: int = 0, steps: int = 9) -> PromptPool:
    """Return a pool after more than an epoch."""
    pool = make_pool(case, seed)
    play(pool, range(steps))
    return pool


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        value.dtype == b[name].dtype and torch.equal(value, b[name]) for name, value in a.items()
    )


@samplers
@few
@given(data=st.data())
def test_proposals_are_distinct_free_and_as_many_as_there_are(
    case: Case, data: st.DataObject
) -> None:
    prompts = data.draw(st.integers(1, PROMPTS))
    pool = make_pool(case, data.draw(st.integers(0, 9)), prompts)
    for step in range(6):
        taken = data.draw(st.lists(st.integers(0, prompts - 1), max_size=2 * prompts))
        count = data.draw(st.integers(0, prompts + 2))
        ids = pool.propose(count, taken=torch.tensor(taken, dtype=torch.int64))
        assert ids.dtype == torch.int64 and ids.dim() == 1
        assert len(ids) == min(count, prompts - len(set(taken)))
        chosen = set(ids.tolist())
        assert len(chosen) == len(ids) and not chosen & set(taken)
        assert chosen <= set(range(prompts))
        # Hopeless for some of them, so that what is skipped and scored differs.
        pool.observe(ids, torch.where(ids % 3 == 0, 0, step), torch.full_like(ids, TRIALS))


@samplers
def test_all_are_free_unless_taken(case: Case) -> None:
    pool = warm(case)
    assert sorted(pool.propose(PROMPTS).tolist()) == list(range(PROMPTS))
    nothing = pool.propose(3, taken=torch.arange(PROMPTS))
    assert nothing.shape == (0,) and nothing.dtype == torch.int64
    # An empty list becomes a float tensor, and a problem without a number takes none.
    assert len(pool.propose(PROMPTS, taken=torch.tensor([]))) == PROMPTS
    assert len(pool.propose(PROMPTS, taken=torch.tensor([-1]))) == PROMPTS


@samplers
def test_equal_seeds_and_observations_keep_ranks_in_step(case: Case) -> None:
    first, second = make_pool(case, seed=3), make_pool(case, seed=3)
    assert play(first, range(20)) == play(second, range(20))
    assert same(first.state_dict(), second.state_dict())
    assert play(first, range(20)) != play(make_pool(case, seed=4), range(20))


@samplers
@pytest.mark.parametrize("saved_at", [0, 1, 9])
def test_a_resumed_run_equals_one_that_was_never_stopped(case: Case, saved_at: int) -> None:
    whole, stopped = make_pool(case, seed=5), make_pool(case, seed=5)
    expected = play(whole, range(20))
    play(stopped, range(saved_at))
    written = save(stopped.state_dict())
    play(stopped, range(saved_at, saved_at + 3))  # what comes after the checkpoint is lost
    built = PromptPool(case.build(), PROMPTS, trials=TRIALS, seed=99, state=load(written))
    loaded = make_pool(case, seed=98)
    play(loaded, range(2))
    loaded.load_state_dict(load(written))
    for pool in (built, loaded):
        assert play(pool, range(saved_at, 20)) == expected[saved_at:]
        assert same(pool.state_dict(), whole.state_dict())
        assert pool.metrics() == whole.metrics() and pool.table() == whole.table()


@samplers
def test_a_state_that_was_handed_out_or_in_stays_as_it_is(case: Case) -> None:
    pool = warm(case)
    out = pool.state_dict()
    copy = {name: value.clone() for name, value in out.items()}
    play(pool, range(9, 20))
    assert same(out, copy) and not same(out, pool.state_dict())
    pool.load_state_dict(out)
    play(pool, range(9, 20))
    assert same(out, copy)


@samplers
def test_the_sampler_itself_is_pure(case: Case) -> None:
    sampler, features = case.build(), make_features()
    state: dict[str, Any] = sampler.init(PROMPTS, features)
    kept = features.clone()
    for step in range(5):
        copy = {name: value.clone() for name, value in state.items()}
        free = torch.arange(PROMPTS) % 2 == step % 2
        free_copy, results = free.clone(), []
        for _ in range(2):
            generator = torch.Generator().manual_seed(step)
            ids, after = sampler.propose(5, state, free=free, trials=TRIALS, generator=generator)
            successes, trials = answers(ids, step).double(), torch.full((5,), 8.0).double()
            given = [value.clone() for value in (ids, successes, trials)]
            results.append(sampler.observe(ids, successes, trials, after))
            sampler.metrics(after)
            sampler.predict(after)
            assert all(map(torch.equal, given, (ids, successes, trials)))
        assert same(*results) and same(state, copy) and torch.equal(free, free_copy)
        assert all(isinstance(v, Tensor) and v.is_contiguous() for v in results[0].values())
        state = results[0]
    assert torch.equal(features, kept)


@samplers
def test_problems_without_a_number_or_a_reward_are_ignored(case: Case) -> None:
    clean, noisy = warm(case), warm(case)
    for step in range(3):
        ids = torch.tensor([4, 11, 2, 29])
        successes, trials = answers(ids, step), torch.full((4,), TRIALS)
        clean.observe(ids, successes, trials, step=step)
        noisy.observe(
            torch.tensor([-1, 4, 11, 7, 2, -1, 29]),
            torch.cat([torch.tensor([8]), successes[:2], torch.tensor([0]), successes[2:3],
                       torch.tensor([0]), successes[3:]]),
            torch.tensor([8, 8, 8, 0, 8, 0, 8]),
            step=step,
        )  # fmt: skip
        before = noisy.state_dict()
        noisy.observe(torch.tensor([-1, 3]), torch.tensor([2, 0]), torch.tensor([8, 0]), step=9)
        none = torch.tensor([], dtype=torch.int64)
        noisy.observe(none, none, none)
        assert same(before, noisy.state_dict())
    assert same(clean.state_dict(), noisy.state_dict())


@samplers
def test_the_order_of_observed_groups_does_not_matter(case: Case) -> None:
    one, other = warm(case), warm(case)
    # A problem may come twice.
    ids, order = torch.tensor([4, 11, 2, 29, 11]), torch.tensor([4, 2, 0, 1, 3])
    successes, trials = torch.tensor([8, 0, 3, 5, 8]), torch.tensor([8, 8, 6, 8, 8])
    one.observe(ids, successes, trials, step=1)
    other.observe(ids[order], successes[order], trials[order], step=1)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@samplers
@few
@given(history=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8)), max_size=60))
def test_readouts_are_finite_whatever_is_observed(
    case: Case, history: list[tuple[int, int]]
) -> None:
    pool = make_pool(case, prompts=5)
    for start in range(0, len(history), 3):
        ids, successes = torch.tensor(history[start : start + 3]).unbind(dim=1)
        pool.observe(ids, successes, torch.full_like(ids, TRIALS), step=start)
        pool.propose(2)
    metrics, table = pool.metrics(), pool.table()
    assert all(isinstance(v, float) and math.isfinite(v) for v in metrics.values())
    assert metrics["prompts_seen"] == pytest.approx(len({i for i, _ in history}) / 5)
    assert [row["visits"] for row in table] == [
        sum(i == number for i, _ in history) for number in range(5)
    ]
    for row in table:
        assert (row["last"] is None) == (row["visits"] == 0)
        if case.believes:
            assert 0 <= row["rate"] <= 1 and 0 <= row["std"] <= 0.5
        else:
            assert row["rate"] is None and row["std"] is None


@samplers
def test_a_sampler_that_believes_learns_what_it_is_shown(case: Case) -> None:
    pool = make_pool(case)
    for step in range(30):
        ids = torch.arange(PROMPTS)
        pool.observe(ids, answers(ids, step), torch.full((PROMPTS,), TRIALS))
    if case.believes:
        rate = torch.sigmoid(3 * make_features()[:, 0])
        believed = torch.tensor([row["rate"] for row in pool.table()])
        assert (believed - rate).abs().mean() < 0.12
        low, high = (rate < 0.1).nonzero().flatten(), (rate > 0.9).nonzero().flatten()
        assert believed[low].max() < believed[high].min()
