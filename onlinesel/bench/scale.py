"""What the decision of a step costs for many ranks, many candidates and large ledgers.

The code that decides is run as it is, as one rank of up to thousands: everything that a rank does
between the scores of its own candidates and the rows that it trains, and after the step. What the
ranks send each other is not sent but modelled, from the collectives that this code asks for
(:mod:`onlinesel.bench._network`). The time of the scoring forward is not part of it: that is the
method's own cost, and does not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._ledgers import AgedLedger, aged_ledger, turnover
from onlinesel.bench._network import Network
from onlinesel.bench._ranks import Collective, SimulatedRanks
from onlinesel.bench._report import figure, table
from onlinesel.bench._settings import (
    clock,
    command,
    listed,
    machine,
    numbers,
    threads_set,
)
from onlinesel.bench._workload import STRATEGIES, Rehearsal, Workload
from onlinesel.step import StepPlan

__all__ = ["add_arguments", "bench_scale", "figure", "run"]

RANKS = (1, 8, 64, 256, 1024)
CANDIDATES = (1, 2, 4, 8, 16)
IDS = (10**6, 10**7, 10**8)


def step_seconds(
    rows: int,
    tokens: int,
    parameters: float = 7e9,
    flops: float = 989e12,
    utilisation: float = 0.4,
) -> float:
    """Return the seconds of a training step: ``6 N T`` operations on each GPU.

    Args:
        rows: Rows that a GPU trains.
        tokens: Length of a row.
        parameters: ``N`` of the model; by default 7 billion.
        flops: Operations a second that the GPU could do; by default an H100's in bfloat16.
        utilisation: Share of them that training reaches.

    Example:
        >>> round(step_seconds(4, 2048), 2)
        0.87
    """
    return 6 * parameters * rows * tokens / (flops * utilisation)


def _timed(times: list[float], call: Callable[[], Any]) -> Any:
    """Call, and note the time that it took."""
    start = clock()
    result = call()
    times.append(clock() - start)
    return result


def _seconds(
    network: Network, log: Sequence[Collective], rehearsal: Rehearsal, plan: StepPlan
) -> float:
    """Return the modelled time of a step's collectives, the busiest rank's where they differ.

    What travels while the model scores costs no time: scoring takes far longer.
    """
    ranks, total = rehearsal.work.ranks, 0.0
    for one in log:
        if one.hidden:
            continue
        if one.kind == "all_gather_single":
            total += network.all_gather(ranks, one.sent)
        elif one.kind == "all_reduce":
            total += network.all_reduce(ranks, one.sent)
        else:
            messages, rows = busiest(*rehearsal.moves(plan), ranks)
            total += network.all_to_all(ranks, messages, rows * rehearsal.row_bytes)
    return total


def busiest(holders: Tensor, targets: Tensor, ranks: int) -> tuple[int, int]:
    """Return the most ranks that one exchanges rows with, and the most rows that one sends or gets.

    Args:
        holders: ``(K,)`` rank that holds each row.
        targets: ``(K,)`` rank that shall have it.
        ranks: Number of ranks.

    Example:
        >>> import torch
        >>> busiest(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 1]), 3)
        (2, 3)
    """
    moves = holders != targets
    pairs = torch.unique(torch.stack([holders[moves], targets[moves]]), dim=1)
    most = [
        int(torch.bincount(side, minlength=ranks).max())
        for side in (*pairs, holders[moves], targets[moves])
    ]
    return max(most[:2]), max(most[2:])


def measure(
    work: Workload, network: Network, steps: int, ledger: AgedLedger | None = None
) -> dict[str, Any]:
    """Take steps as the middle one of the ranks.

    Args:
        work: What is decided.
        network: Model of the collectives.
        steps: Steps that are timed, after one that warms up. All do the same work on other rows,
            so the fastest tells what it costs; what else the machine does only adds to it.
        ledger: What the strategy remembers at the beginning.

    Returns:
        Processor seconds of a step by part, modelled seconds of the network, the collectives of
        the last step, and the mean number of rows that change rank.
    """
    if steps < 1:
        raise ValueError(
            f"bench_scale: steps must be at least 1, got {steps}. Pass a positive integer."
        )
    rank = work.ranks // 2
    ranks = SimulatedRanks(work.ranks, rank)
    rehearsal = Rehearsal(work, rank, None if ledger is None else ledger.state, ranks.scoring)
    ranks.prepare_row({name: value[:1] for name, value in rehearsal.batch.items()})
    taken: dict[str, list[float]] = {"plan": [], "select": [], "describe": [], "observe": []}
    sent, moved = [], []
    for step in range(steps + 1):
        ranks.clear()
        ranks.prepare(rehearsal.pool(step), rehearsal.counts)
        with ranks.stand_in() if work.ranks > 1 else nullcontext():
            plan = _timed(taken["plan"], partial(rehearsal.decide, step))
            taken["select"].append(rehearsal.selector.seconds)
            _timed(taken["describe"], rehearsal.selector.metrics)
            if rehearsal.selector.strategy.observes:
                ranks.prepare(*rehearsal.trained(plan))
                _timed(taken["observe"], partial(rehearsal.observe, plan))
        sent.append(_seconds(network, ranks.log, rehearsal, plan))
        holders, targets = rehearsal.moves(plan)
        moved.append(int((holders != targets).sum()))
    seconds = {name: min(t[1:]) if t else 0.0 for name, t in taken.items()}
    return {
        "seconds": {**seconds, "merge": 0.0, "network": statistics.mean(sent[1:])},
        "collectives": [asdict(collective) for collective in ranks.log],
        "moved_rows": statistics.mean(moved[1:]),
    }


def _point(work: Workload, network: Network, steps: int, step_time: float) -> dict[str, Any]:
    """Measure one workload; a ledger is aged first, and what merging it costs is added."""
    facts: dict[str, Any] = {"known": None}
    ledger = aged = None
    if work.strategy == "InfoBatch":
        # About a quarter of the rows are skipped.
        aged = turnover(work.known, max(work.ranks * work.size * 3 // 4, 1))
        ledger = aged_ledger(aged.sizes, work.dense)
        facts = {"known": work.known, "dense": work.dense, "runs": aged.sizes}
        facts["bytes_per_id"] = ledger.nbytes / work.known
    found = measure(work, network, steps, ledger)
    if ledger is not None and aged is not None:
        each = ledger.merge / max(ledger.merged_rows, 1)
        found["seconds"]["merge"] = aged.rewritten * each
        facts |= {"seconds_per_rewritten_row": each, "rewritten_rows": aged.rewritten}
        facts |= {"steps_between": aged.steps, "worst_seconds": work.known * each}
    return _summed({**asdict(work), **facts, **found}, step_time)


def _summed(point: dict[str, Any], step_time: float) -> dict[str, Any]:
    seconds = point["seconds"]
    total = sum(value for name, value in seconds.items() if name != "select")
    return {**point, "total": total, "share": total / step_time}


def extrapolated(points: Sequence[dict[str, Any]], known: int, step_time: float) -> dict[str, Any]:
    """Continue the two largest ledgers that were measured to a larger one.

    A search halves what is left, so the time of the parts grows by the same amount for every
    factor of ten; rows that merging rewrites are counted, not continued.

    Args:
        points: Results for ledgers of different sizes, ascending; at least two.
        known: Ids of the ledger asked for.
        step_time: Seconds of a training step.
    """
    before, last = points[-2:]
    ahead = math.log(known / last["known"]) / math.log(last["known"] / before["known"])
    seconds = {
        name: value + max(value - before["seconds"][name], 0.0) * ahead
        for name, value in last["seconds"].items()
    }
    aged = turnover(known, max(last["ranks"] * last["rows"] * 3 // 4, 1))
    each = last["seconds_per_rewritten_row"]
    seconds["merge"] = aged.rewritten * each
    facts = {"known": known, "runs": aged.sizes, "rewritten_rows": aged.rewritten}
    facts |= {"steps_between": aged.steps, "worst_seconds": known * each, "extrapolated": True}
    return _summed({**last, **facts, "seconds": seconds}, step_time)


def bench_scale(
    *,
    ranks: Sequence[int] = RANKS,
    candidates: Sequence[int] = CANDIDATES,
    ids: Sequence[int] = IDS,
    methods: Sequence[str] = STRATEGIES[:3],
    work: Workload | None = None,
    network: Network | None = None,
    extrapolate: int | None = 10**9,
    step_time: float | None = None,
    steps: int = 15,
    threads: int | None = 1,
) -> dict[str, Any]:
    """Measure the decision against ranks, candidates and the size of the ledger.

    Each of the three is varied alone; the others stay at those of ``work``, with the most ranks.

    Args:
        ranks: Numbers of ranks.
        candidates: Numbers of candidates for every trained row, of methods that drop rows.
        ids: Rows of the dataset, for the methods that remember each.
        methods: Strategies.
        work: Rows, tokens, candidates and ids where they are not varied.
        network: Model of the collectives.
        extrapolate: Continue the results against ``ids`` to this many; None for not.
        step_time: Seconds of a training step; by default those of a model of 7 billion parameters
            (:func:`step_seconds`).
        steps: Timed steps of each measurement.
        threads: Threads of torch, or None to leave them.

    Returns:
        Settings, and results in seconds of a step, ready for JSON.

    Raises:
        ValueError: A number below 1, an unknown strategy, or a dataset smaller than a step.

    Example:
        >>> result = bench_scale(
        ...     ranks=[1, 4], candidates=[2], ids=[1000], methods=["TopLoss"], steps=1
        ... )
        >>> [point["ranks"] for point in result["against_ranks"]]
        [1, 4]
    """
    work, network = work or Workload(), network or Network()
    if step_time is None:
        step_time = step_seconds(work.rows, work.tokens)
    with threads_set(threads):
        result: dict[str, Any] = {"what": "the decision of one optimizer step", **machine()}
        result |= {"network": asdict(network), "step_seconds": step_time, "steps": steps}
        result |= {"rows": work.rows, "tokens": work.tokens}
        measured = partial(_point, network=network, steps=steps, step_time=step_time)
        for name, sweep in _sweeps(work, ranks, candidates, ids, methods).items():
            result[name] = list(map(measured, sweep))
    if extrapolate is not None and len(ids) > 1:
        points = result["against_ids"]
        for part in (points[: len(ids)], points[len(ids) :]):
            points += [extrapolated(part, extrapolate, step_time)] if part else []
        points.sort(key=lambda point: not point["dense"])
    return result


def _sweeps(
    work: Workload,
    ranks: Sequence[int],
    candidates: Sequence[int],
    ids: Sequence[int],
    methods: Sequence[str],
) -> dict[str, list[Workload]]:
    """Return the workloads in which one number is varied."""
    most = replace(work, ranks=max(ranks))
    drop = [replace(most, strategy=name) for name in methods if name != "InfoBatch"]
    keep = [replace(most, strategy=name) for name in methods if name == "InfoBatch"]
    return {
        "against_ranks": [replace(work, strategy=m, ranks=n) for m in methods for n in ranks],
        "against_candidates": [replace(base, candidates=n) for base in drop for n in candidates],
        "against_ids": [
            replace(base, known=n, dense=dense)
            for base in keep
            for dense in (True, False)
            for n in ids
        ],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench scale``."""
    add, network, work = parser.add_argument, Network(), Workload()
    add("--ranks", type=numbers, default=listed(RANKS), help="numbers of ranks")
    add("--candidates", type=numbers, default=listed(CANDIDATES), help="per trained row")
    add("--ids", type=numbers, default=listed(IDS), help="rows of the dataset (1e8 needs 6 GB)")
    add("--methods", default=listed(STRATEGIES[:3]), help=f"of {', '.join(STRATEGIES)}")
    add("--rows", type=int, default=work.rows, help="rows that a rank trains in a step")
    add("--tokens", type=int, default=work.tokens, help="length of a row")
    add("--extrapolate", type=float, default=1e9, help="continue --ids to so many; 0 for not")
    add("--steps", type=int, default=15, help="timed steps of each measurement")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--step-seconds", type=float, help="time of a training step (default: 6 N T operations)")
    add("--parameters", type=float, default=7e9, help="N, for the time of a step")
    add("--flops", type=float, default=989e12, help="operations a second of a GPU")
    add("--utilisation", type=float, default=0.4, help="share of them that training reaches")
    add("--gpus", type=int, default=network.gpus, help="GPUs of a node")
    add("--gather", choices=("ring", "tree"), default=network.gather, help="way to gather")
    for name, text in (
        ("alpha-intra", "seconds of a hop within a node"),
        ("alpha-inter", "seconds of a hop between nodes"),
        ("beta-intra", "bytes a second within a node"),
        ("beta-inter", "bytes a second between nodes"),
        ("start", "seconds that every collective costs before its first hop"),
    ):
        add(f"--{name}", type=float, default=vars(network)[name.replace("-", "_")], help=text)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    network = Network(
        args.gpus, args.alpha_intra, args.alpha_inter, args.beta_intra, args.beta_inter,
        args.start, args.gather,
    )  # fmt: skip
    step_time = args.step_seconds or step_seconds(
        args.rows, args.tokens, args.parameters, args.flops, args.utilisation
    )
    result = bench_scale(
        ranks=args.ranks, candidates=args.candidates, ids=args.ids,
        methods=args.methods.split(","), network=network, step_time=step_time,
        work=Workload(rows=args.rows, tokens=args.tokens), steps=args.steps, threads=args.threads,
        extrapolate=int(args.extrapolate) or None,
    )  # fmt: skip
    return {"command": command("scale", args), **result}, table(result)
