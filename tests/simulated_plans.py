"""Steps that are planned on a device and on the host, in a process of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onlinesel import Selector, Signals
from onlinesel._base.host import Arriving, to_host, upload
from onlinesel.bench._simulated import simulation
from onlinesel.bench._waits import HostWaits
from onlinesel.data.batch import gather_rows, take_rows, trim
from onlinesel.kernels import LMHead, token_scores
from onlinesel.step import StepPlan, StepPlanner
from onlinesel.strategies import TopLoss
from tests.test_batch import make_batch

CASES = [
    (lengths, side, scope, finite)
    for lengths in ([[2, 5, 3, 4]], [[2, 5, 3, 4], [6, 2, 2, 7]], [[3, 3], [9, 9]])
    for side in ("right", "left")
    for scope in ("global", "batch")
    for finite in (True, False)
]


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: moved(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def planned(case: Any, device: torch.device, known: bool) -> tuple[StepPlan, int]:
    """Plan a case with its batches on a device; returns the waits that this took as well."""
    lengths, side, scope, finite = case
    given = [make_batch(ns, side, 1 + 1000 * m) for m, ns in enumerate(lengths)]
    for batch in given:
        batch["labels"][:, : batch["labels"].shape[1] // 2] = -100
        batch["weight"] = torch.arange(batch["labels"].numel()).view_as(batch["labels"]) * 0.5
    ids = [torch.arange(len(ns)) + 10 * m for m, ns in enumerate(lengths)]

    def score(batch: Any, needs: Any, hosted: Any) -> Signals:
        losses = batch["input_ids"].double().sin().sum(dim=1)
        return Signals(loss=losses if finite else losses * torch.nan)

    planner = StepPlanner(Selector(TopLoss()), score, candidates=2, scope=scope, device=device)
    batches = [moved(batch, device) for batch in given]
    if not known:
        ids = [part.to(device) for part in ids]
    if device.type == "cpu":
        return planner.plan(batches, ids, 0), 0
    with HostWaits(device) as seen:
        plan = planner.plan(batches, ids, 0, given=given if known else None)
    return plan, len(seen.waits)


def content(plan: StepPlan) -> Any:
    def plain(value: Any) -> Any:
        return value.cpu().tolist() if isinstance(value, Tensor) else value

    batches = [{name: plain(value) for name, value in batch.items()} for batch in plan.batches]
    columns = [[plain(part) for part in column] for column in (plan.ids, plan.weights, plan.counts)]
    return batches, columns, plan.denominator.item()


def plans() -> list[dict[str, Any]]:
    """Return the content of each case's plan on the host and on the device, and the waits."""
    found = []
    for case in CASES:
        entry = {"host": content(planned(case, torch.device("cpu"), False)[0])}
        with simulation() as device:
            for name, known in (("device", False), ("known", True)):
                plan, waits = planned(case, device, known)
                assert all(b["labels"].device == device for b in plan.batches)
                entry[name], entry[f"{name} waits"] = content(plan), waits
        found.append(entry)
    return found


def copies() -> dict[str, Any]:
    """Return what comes of the copies between host and device, with their waits."""
    g = torch.Generator().manual_seed(0)
    values = [
        torch.randint(0, 9, (3, 2), generator=g), torch.tensor(True), torch.rand(5, generator=g),
        torch.rand(2, generator=g).bfloat16(), torch.empty(0, 4), torch.arange(6).view(2, 3).T,
    ]  # fmt: skip
    hidden, weight = torch.rand(2, 4, 8, generator=g), torch.rand(11, 8, generator=g)
    labels = torch.randint(0, 11, (2, 4), generator=g)
    labels[0, 1:3] = -100
    batch = make_batch([3, 2, 4], "left")
    found: dict[str, Any] = {}
    with simulation() as device:
        away = [value.to(device) for value in values]
        head = LMHead(weight.to(device))
        there = {"hidden": hidden.to(device), "batch": moved(batch, device)}
        calls: dict[str, Any] = {
            "to_host": lambda: to_host([away[0], values[1], *away[2:]]),
            "upload": lambda: [upload(value, device) for value in values],
            "arriving": lambda: Arriving(away[0]).get(),
            "scores": lambda: token_scores(there["hidden"], head, labels, outputs=("nll", "el2n")),
            "taken": lambda: list(take_rows(there["batch"], [2, 0]).values()),
            "joined": lambda: list(gather_rows([there["batch"]] * 2, [(0, 1), (1, 0)]).values()),
            "trimmed": lambda: list(trim(there["batch"]).values()),
        }
        results = {}
        for name, call in calls.items():
            with HostWaits(device) as seen:
                results[name] = call()
            found[f"{name} waits"] = len(seen.waits)
        assert all(part.device.type == "cpu" for part in results["to_host"])
        assert all(part.device == device for part in [*results["upload"], *results["joined"]])
        given = {"to_host": values, "upload": values, "arriving": [values[0]]}
        given["scores"] = list(
            token_scores(hidden, LMHead(weight), labels, outputs=("nll", "el2n"))
        )
        given["taken"] = list(take_rows(batch, [2, 0]).values())
        given["joined"] = list(gather_rows([batch] * 2, [(0, 1), (1, 0)]).values())
        given["trimmed"] = list(trim(batch).values())
        for name, expected in given.items():
            got = [results[name]] if isinstance(results[name], Tensor) else list(results[name])
            pairs = zip(got, expected, strict=True)
            found[name] = all(
                a is b is None
                or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b))
                for a, b in pairs
            )
    return found
