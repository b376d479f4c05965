"""Whatever a strategy answers, the plan trains exactly those rows, and never an empty batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Selection, Selector, Signals, Strategy
from onlinesel.data.batch import rows_in
from onlinesel.data.rows import FILLER_ID
from onlinesel.parallel.distributed import exchange_rows, gather_signals, sum_over_ranks
from onlinesel.step import StepPlanner
from tests.test_batch import content, make_batch


@dataclass(frozen=True)
class Fixed(Strategy):
    """Weights by row id."""

    table: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        weights = torch.tensor(self.table)[signals.row_ids()]
        return Selection(weights.expand(*self.shape, -1).T if self.shape else weights), state


class TopIds(Strategy):
    """Keep the largest ids."""

    def select(self, signals: Signals, state: Any, *, keep: int, **_: Any) -> Any:
        ids = signals.row_ids()
        return Selection((ids >= ids.sort().values[-keep]).float()), state


def no_scores(batch: Any, needs: Any, hosted: Any) -> Signals:
    raise AssertionError(f"nothing was needed, yet {needs} were scored")


def make_step(lengths: list[list[int]]) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Micro-batches whose rows have the ids 0, 1, 2, ... and tokens of their own."""
    batches = [make_batch(ns, start=1 + 1000 * m) for m, ns in enumerate(lengths)]
    ids, start = [], 0
    for ns in lengths:
        ids.append(torch.arange(start, start + len(ns)))
        start += len(ns)
    return batches, ids


LENGTHS = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=5), min_size=1, max_size=4)


@given(LENGTHS, st.sampled_from(["global", "rank", "batch"]), st.data())
def test_the_plan_trains_exactly_the_rows_with_weight(
    lengths: list[list[int]], scope: str, data: st.DataObject
) -> None:
    flat = sum(lengths, [])
    options = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    table = data.draw(st.lists(options, min_size=len(flat), max_size=len(flat)))
    normalize = data.draw(st.sampled_from(["tokens", "samples"]))
    batches, ids = make_step(lengths)
    planner = StepPlanner(
        Selector(Fixed(tuple(table))), no_scores, scope=scope, normalize=normalize
    )
    plan = planner.plan(batches, ids, step=0)
    assert len(plan.batches) == len(batches)
    trained: dict[int, float] = {}
    for m, batch in enumerate(plan.batches):
        assert batch["input_ids"].shape[0] == len(plan.ids[m]) == len(plan.weights[m]) >= 1
        for r, (i, w) in enumerate(
            zip(plan.ids[m].tolist(), plan.weights[m].tolist(), strict=True)
        ):
            source = next(k for k, known in enumerate(ids) if i in known)
            assert content(batch, r) == content(batches[source], i - int(ids[source][0]))
            if w == 0:
                assert len(plan.weights[m]) == 1 and bool((batch["labels"][r] == -100).all())
            else:
                assert i not in trained
                trained[i] = w
    assert trained == {i: w for i, w in enumerate(table) if w > 0}
    per_row = [n - 1 if normalize == "tokens" else 1 for n in flat]
    total = sum(w * n for w, n in zip(table, per_row, strict=True))
    assert float(plan.denominator) == pytest.approx(total or 1.0)
    # What the host adds up is the contract's numerator: w times the row's sum, or its mean.
    for m in range(len(batches)):
        found = plan.multipliers(m)
        counts = plan.batches[m]["labels"][:, 1:].ne(-100).sum(dim=1)
        factors = torch.ones(len(counts)) if found is None else found
        wanted = plan.weights[m] / (counts.clamp(min=1) if normalize == "samples" else 1)
        assert torch.allclose(factors * (counts > 0), wanted * (counts > 0))


@given(LENGTHS, st.integers(1, 5))
def test_keep_is_one_in_so_many_candidates_and_at_least_one(
    lengths: list[list[int]], candidates: int
) -> None:
    @dataclass(frozen=True)
    class Count(Strategy):
        def select(self, signals: Signals, state: Any, *, keep: int, **_: Any) -> Any:
            asked.append((keep, signals.size))
            return Selection((torch.arange(signals.size) < keep).float()), state

    asked: list[tuple[int, int]] = []
    planner = StepPlanner(Selector(Count()), no_scores, candidates=candidates)
    planner.plan(*make_step(lengths), step=0)
    ((keep, size),) = asked
    assert size == sum(map(len, lengths)) and (keep - 1) * candidates < size <= keep * candidates


def test_an_unchanged_step_is_handed_through_untouched() -> None:
    batches, ids = make_step([[3, 2], [4]])
    plan = StepPlanner(Selector(Fixed((1.0, 1.0, 1.0))), no_scores).plan(batches, ids, step=0)
    for ours, theirs in zip(plan.batches, batches, strict=True):
        assert all(ours[key] is theirs[key] for key in theirs)


def test_the_filler_is_a_row_that_is_finite() -> None:
    class Needy(Fixed):
        needs = ("loss",)

    def score(batch: Any, needs: Any, hosted: Any) -> Signals:
        return Signals(loss=torch.tensor([float("nan"), 2.0]))

    batches, ids = make_step([[3, 4]])
    plan = StepPlanner(Selector(Needy((0.0, 0.0))), score).plan(batches, ids, step=0)
    assert content(plan.batches[0], 0) == content(batches[0], 1)


def test_designed_errors() -> None:
    batches, ids = make_step([[3, 4]])
    tokens = StepPlanner(Selector(Fixed((1.0, 1.0), shape=(5,))), no_scores)
    with pytest.raises(ValueError, match=r"StepPlanner: weights must be one per row, got .*\(2, 5"):
        tokens.plan(batches, ids, step=0)
    plain = StepPlanner(Selector(Fixed((1.0, 1.0))), no_scores)
    with pytest.raises(ValueError, match="StepPlanner: ids must have one entry per row .2., got 1"):
        plain.plan(batches, [ids[0][:1]], step=0)


def test_without_a_process_group_collectives_are_the_identity() -> None:
    signals = Signals(loss=torch.tensor([1.0, 2.0]))
    gathered, counts = gather_signals(signals)
    assert torch.equal(gathered.loss, signals.loss) and counts == [2]
    assert float(sum_over_ranks(torch.tensor(3.0))) == 3.0
    batches, _ = make_step([[3]])
    here = torch.tensor([0])
    assert exchange_rows(batches, [(0, 0)], here, here) == (None, [])
    with pytest.raises(ValueError, match="exchange_rows: targets must be 0 without a process"):
        exchange_rows(batches, [(0, 0)], here, here + 1)


def test_fillers_never_compete_nor_train() -> None:
    """The rows of a cell that got none: in their rank's step, but in nobody's decision."""
    batches, ids = make_step([[3, 4, 5], [6]])
    ids[1] = torch.tensor([FILLER_ID])
    for scope, decided in (("global", 1), ("rank", 1), ("batch", 1)):
        planner = StepPlanner(
            Selector(TopIds()), no_scores, candidates=2, scope=scope, normalize="samples"
        )
        plan = planner.plan(batches, ids, step=0)
        assert len(plan.decisions) == decided
        assert plan.decisions[0][0].row_ids().tolist() == [0, 1, 2]  # keep is 2 of 3, not of 4
        trained = [i for m, part in enumerate(plan.ids) for i in part[plan.weights[m] > 0].tolist()]
        assert sorted(trained) == [1, 2] and float(plan.denominator) == 2.0
        assert len(plan.batches) == 2 and all(rows_in(batch) >= 1 for batch in plan.batches)
    alone = StepPlanner(Selector(TopIds()), no_scores, scope="rank")
    plan = alone.plan(batches[1:], ids[1:], step=0)
    assert plan.decisions == [] and plan.weights[0].tolist() == [0.0]
    assert bool((plan.batches[0]["labels"] == -100).all()) and float(plan.denominator) == 1.0


def test_groups_are_signals_like_any_other() -> None:
    batches, ids = make_step([[3, 4], [5]])
    groups = [torch.tensor([7, 8]), torch.tensor([7])]
    plan = StepPlanner(Selector(Fixed((1.0, 1.0, 1.0))), no_scores).plan(batches, ids, 0, groups)
    signals, _ = plan.decisions[0]
    assert signals.group is not None and signals.group.tolist() == [7, 8, 7]


def test_rows_that_are_whole_items_count_one_each_and_keep_their_labels() -> None:
    batches = [{"x": torch.rand(3, 2), "labels": torch.tensor([0, 1, 2])}]
    planner = StepPlanner(Selector(Fixed((2.0, 0.0, 1.0))), no_scores, count=lambda batch: None)
    plan = planner.plan(batches, [torch.arange(3)], step=0)
    assert float(plan.denominator) == 3.0 and plan.counts == [None]
    assert plan.batches[0]["labels"].tolist() == [0, 2]
    losses = torch.tensor([5.0, 8.0])
    assert plan.weighing(0)(losses).item() == pytest.approx((2 * 5 + 8) / 3)
    assert plan.weighing(0, factor=4.0)(losses).item() == pytest.approx(4 * (2 * 5 + 8) / 3)
    nothing = StepPlanner(Selector(Fixed((0.0,) * 3)), no_scores, count=lambda batch: None)
    filler = nothing.plan(batches, [torch.arange(3)], step=0)
    assert filler.batches[0]["labels"].tolist() == [0] and filler.weights[0].tolist() == [0.0]
