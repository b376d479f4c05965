"""Run as one of three gloo processes: the collectives of the decision against plain Python."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed as dist

from onlinesel import Signals
from onlinesel.bench._ledgers import aged_ledger
from onlinesel.bench._ranks import Collective, SimulatedRanks
from onlinesel.bench._workload import Rehearsal, Workload
from onlinesel.data.batch import deal
from onlinesel.parallel import distributed
from onlinesel.parallel.agreement import smallest_over_ranks, stack_over_ranks
from onlinesel.parallel.distributed import (
    begin_gather,
    check_agreement,
    exchange_rows,
    gather_signals,
)
from onlinesel.selector import Selector
from onlinesel.step import StepPlanner
from onlinesel.strategies import LossReweight
from tests.launching import begin, leave

RANKS = 3
CHANCE = 4


def row_batch(numbers: list[int], lengths: dict[int, int], left: bool) -> dict[str, Any]:
    """Row k holds the tokens 100 k + 1, 100 k + 2, ... and one value of every kind.

    Of the columns that no name tells about, one follows the width of the tokens; the other is as
    wide by chance.
    """
    width = max(lengths[k] for k in numbers) + 1
    shape = (len(numbers), width)
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.int8),
        "labels": torch.full(shape, -100, dtype=torch.int32),
    }
    for r, k in enumerate(numbers):
        where = slice(width - lengths[k], width) if left else slice(0, lengths[k])
        tokens = 100 * k + 1 + torch.arange(lengths[k])
        batch["input_ids"][r, where] = tokens
        batch["attention_mask"][r, where] = 1
        batch["labels"][r, where] = tokens.int()
    k = torch.tensor(numbers)
    batch["short"] = k.to(torch.int16)
    batch["flag"] = k % 2 == 0
    batch["half"] = k.to(torch.bfloat16)[:, None, None].expand(-1, 9, 2)  # not contiguous
    batch["double"] = k.double()[:, None] / torch.arange(7, 14)
    batch["wave"] = torch.complex(k.float(), -k.float())
    batch["nothing"] = torch.zeros(len(numbers), 0)
    batch["follows"] = batch["input_ids"] / 4
    batch["chance"] = k.float()[:, None].expand(-1, CHANCE)
    square = batch["attention_mask"].bool()[:, None, :, None].expand(-1, -1, -1, width)
    batch["decoder_attention_mask"] = square & square.mT
    batch["texts"] = [f"row {n}" for n in numbers]
    batch["boxes"] = tuple({"box": torch.full((n % 3, 2), float(n))} for n in numbers)
    batch["names"] = numpy.array([f"name {n}" for n in numbers])
    return {**batch, "note": "stays", "scale": torch.tensor(2.0)}


def scene(seed: int, left: bool) -> tuple[list[int], list[int], dict[int, int]]:
    """Return owners, targets and lengths of some rows; some scenes move nothing or everything."""
    draw = random.Random(seed)
    owners = [draw.randrange(RANKS) for _ in range(draw.randrange(3, 14))]
    if seed % 3 == 0:
        targets = [draw.randrange(RANKS) for _ in owners]
    elif seed % 3 == 1:
        targets = deal(torch.tensor(owners), RANKS).tolist()
    else:
        owners = [seed % RANKS] * len(owners)  # one rank gives, one is left out
        targets = [(seed + k % 2) % RANKS for k in range(len(owners))]
    return owners, targets, {k: draw.randrange(1, 6) for k in range(-RANKS, len(owners))}


def exchanged_rows_arrive_whole_and_in_order(me: int) -> None:
    moved = 0
    for seed in range(24):
        left = seed % 2 == 1
        owners, targets, lengths = scene(seed, left)
        mine = [k for k, owner in enumerate(owners) if owner == me]
        # A row of its own, which is not kept, makes sure that no rank is empty.
        parts = [mine[::2] + [me - RANKS], mine[1::2]]
        batches = [row_batch(part, lengths, left) for part in parts if part]
        local = [(k % 2, k // 2) for k in range(len(mine))]
        batch, positions = exchange_rows(
            batches, local, torch.tensor(owners), torch.tensor(targets), pad_id=63
        )
        pairs = enumerate(zip(owners, targets, strict=True))
        coming = [k for k, (o, t) in pairs if t == me and o != me]
        assert positions == sorted(coming, key=lambda k: (owners[k], k)), (seed, positions)
        assert (batch is None) == (not coming)
        moved += len(coming)
        if batch is None:
            continue
        wanted = row_batch(positions, lengths, left)
        assert batch.keys() == wanted.keys() and batch["note"] == "stays"
        for r, k in enumerate(positions):
            alive = batch["attention_mask"][r] == 1
            tokens = (100 * k + 1 + torch.arange(lengths[k])).tolist()
            assert batch["input_ids"][r][alive].tolist() == tokens
            assert batch["labels"][r][alive].tolist() == tokens
            assert bool((batch["input_ids"][r][~alive] % 63 == 0).all())  # 0 before, 63 added
            assert bool((batch["labels"][r][~alive] == -100).all())
            assert torch.equal(batch["follows"][r], batch["input_ids"][r] / 4 * alive)
            seen = batch["decoder_attention_mask"][r, 0].sum(dim=1)  # padding sees itself at most
            assert int((seen == lengths[k]).sum()) == lengths[k] or lengths[k] == 1
            assert set(seen.tolist()) <= {0, 1, lengths[k]}
            assert batch["texts"][r] == f"row {k}" and batch["names"][r] == f"name {k}"
            assert torch.equal(batch["boxes"][r]["box"], wanted["boxes"][r]["box"])
        for name in ("short", "flag", "half", "double", "wave", "nothing", "scale", "chance"):
            assert torch.equal(batch[name], wanted[name]), name
            assert batch[name].dtype == wanted[name].dtype, name
    assert moved >= 7  # none of this is about scenes in which nothing moves


def ranks_of_different_sizes_are_gathered(me: int) -> None:
    sizes = [2, 5, 1]
    first = [sum(sizes[:r]) for r in range(RANKS)]
    everyone = Signals(
        ids=2**60 + torch.arange(8),
        tokens=torch.arange(8) * 3,
        loss=torch.arange(8) / 7,
        embedding=torch.arange(24.0).reshape(8, 3),
    )
    mine = everyone.take(torch.arange(first[me], first[me] + sizes[me]))
    known = Signals(ids=mine.ids, tokens=mine.tokens)
    scores = Signals(loss=mine.loss, embedding=mine.embedding)
    ways: list[Callable[[], tuple[Signals, list[int]]]] = [
        lambda: gather_signals(mine),
        lambda: gather_signals(mine, started=begin_gather(known)),
        lambda: gather_signals(scores, started=begin_gather(known, most=5)),
        lambda: gather_signals(scores, started=begin_gather(known, most=9)),
    ]
    for small in (distributed._SMALL, 0):  # gathered as a sum, and as such
        with mock.patch.object(distributed, "_SMALL", small):
            for way in ways:
                found, counts = way()
                assert counts == sizes and found.present().keys() == everyone.present().keys()
                for name, value in everyone.present().items():
                    assert torch.equal(getattr(found, name), value), name
    found, counts = gather_signals(Signals(loss=mine.loss))
    assert counts == sizes and torch.equal(found.loss, everyone.loss) and found.ids is None
    refused(lambda: begin_gather(known, most=4).wait(), "begin_gather: most must be at least the")


def refused(call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(f"nothing was refused: {message}")


def every_rank_hears_of_a_difference(me: int) -> None:
    same, other = torch.arange(3), torch.arange(3) + (me == 1)
    check_agreement("Planner", same, same.float())
    message = "Planner: ranks must reach the same decision, got digests ["
    refused(lambda: check_agreement("Planner", same, other), message)
    owners, targets = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    strangers: list[dict[str, Any]] = [
        {"extra": torch.zeros(1)}, {"short": torch.zeros(1)}, {"half": torch.zeros(1)},
        {"note": "goes"}, {"texts": ("row",)},
    ]  # fmt: skip
    for strange in strangers:
        batch = row_batch([me], {0: 2, 1: 3, 2: 1}, False)
        batch |= strange if me == 2 else {}
        call = partial(exchange_rows, [batch], [(0, 0)], owners, targets)
        refused(call, "exchange_rows: batches must have the same columns on all ranks, got")
    batch = row_batch([me], {0: 2, 1: 3, 2: 1}, False)
    batch["chance"] = torch.zeros(1, 7 + me)
    call = partial(exchange_rows, [batch], [(0, 0)], owners, targets)
    refused(call, "exchange_rows: rows of 'chance' must have one size, or follow the width")


def numbers_are_compared(me: int) -> None:
    assert smallest_over_ranks(7 - me) == 5
    stacked = stack_over_ranks(torch.tensor([me, 9], dtype=torch.uint8))
    assert stacked.tolist() == [[0, 9], [1, 9], [2, 9]] and stacked.dtype == torch.uint8


def the_simulation_sends_what_ranks_send(me: int) -> None:
    """`onlinesel bench scale` counts what the real path hands to the backend, and decides alike."""
    moves = 0
    for strategy in ("TopLoss", "SelectiveBackprop", "InfoBatch", "UDS"):
        work = Workload(strategy, ranks=RANKS, rows=3, candidates=4, tokens=16, known=500)
        state = aged_ledger([500, 90], dense=False).state if strategy == "InfoBatch" else None
        simulated = SimulatedRanks(RANKS, me)
        sent: list[Collective] = []
        real, alone = (Rehearsal(work, me, state, s) for s in (None, simulated.scoring))
        simulated.prepare_row({name: value[:1] for name, value in alone.batch.items()})
        for step in range(4):
            real.pool(step)
            with noted(sent):
                wanted = real.decide(step)
                if real.selector.strategy.observes:
                    real.observe(wanted)
            simulated.prepare(alone.pool(step), alone.counts)
            with simulated.stand_in():
                found = alone.decide(step)
                if alone.selector.strategy.observes:
                    simulated.prepare(*alone.trained(found))
                    alone.observe(found)
            for name in ("ids", "weights", "counts"):
                pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), (strategy, step, name)
            shapes = [plan.batches[0]["input_ids"].shape for plan in (found, wanted)]
            assert shapes[0] == shapes[1]
        log = [(one.kind, one.sent, one.received) for one in simulated.log]
        assert log == [(one.kind, one.sent, one.received) for one in sent]
        assert len(log) > 12
        moves += [kind for kind, *_ in log].count("all_to_all_single")
    assert moves > 6


@contextmanager
def noted(log: list[Collective]) -> Iterator[None]:
    """Write down what is handed to torch.distributed."""

    def noting(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def noted(out: torch.Tensor, *rest: Any, **options: Any) -> Any:
            source = out if name == "all_reduce" else rest[0]
            log.append(Collective(name, source.nbytes, out.nbytes))
            return call(out, *rest, **options)

        return noted

    names = ("all_reduce", "all_gather_single", "all_to_all_single")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dist, name, noting(name)))
        yield


def all_ranks_score_or_none_does(me: int) -> None:
    """A method that needs more rows than there are costs no forward, and no rank goes alone."""
    for scope, least, scored in (
        ("global", 9, False), ("global", 8, True), ("rank", 6, False), ("rank", 5, True),
        ("batch", 5, False), ("batch", 4, True),
    ):  # fmt: skip
        forwards = []

        def score(batch: Any, needs: Any, _: Any, forwards: list[int] = forwards) -> Signals:
            forwards.append(len(batch["input_ids"]))
            return Signals(loss=batch["input_ids"][:, 0].float())

        parts = [[[1], [1]], [[4], [1]], [[1]]][me]  # 2, 5 and 1 rows
        batches = [row_batch(list(range(n)), dict.fromkeys(range(n), 2), False) for (n,) in parts]
        ids = [torch.arange(n) + 10 * me + 100 * m for m, (n,) in enumerate(parts)]
        planner = StepPlanner(Selector(LossReweight(min_rows=least)), score, scope=scope)
        plan = planner.plan(batches, ids, step=0)
        assert forwards == ([n for (n,) in parts] if scored else []), (scope, least, forwards)
        flat = [w == 1.0 for weights in plan.weights for w in weights.tolist()]
        assert all(flat) or scored, (scope, least)


SCENES = (
    all_ranks_score_or_none_does,
    the_simulation_sends_what_ranks_send,
    exchanged_rows_arrive_whole_and_in_order,
    ranks_of_different_sizes_are_gathered,
    every_rank_hears_of_a_difference,
    numbers_are_compared,
)

if __name__ == "__main__":
    begin()
    store, number = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=RANKS)
    for scenario in SCENES:
        scenario(number)
        print("passed", scenario.__name__, flush=True)
    leave()
