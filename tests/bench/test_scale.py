"""`onlinesel bench scale`: the model by hand, and that the tool measures, draws and writes it.

That it counts what real ranks send is a scene of tests/three_ranks.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from onlinesel import Ledger
from onlinesel.bench import bench_scale, main
from onlinesel.bench._ledgers import aged_ledger, turnover
from onlinesel.bench._network import Network
from onlinesel.bench._ranks import SimulatedRanks
from onlinesel.bench._report import table
from onlinesel.bench._workload import Rehearsal, Workload
from onlinesel.bench.scale import busiest, extrapolated, measure, step_seconds
from onlinesel.ledger import runs as _runs

PLAIN = Network(
    gpus=8, alpha_intra=1.0, alpha_inter=10.0, beta_intra=4.0, beta_inter=2.0, start=100.0
)


def test_collectives_by_hand() -> None:
    # 32 ranks on 4 nodes: the ring has 31 hops, 3 of them between nodes; the tree goes 7 hops
    # inside and 2 between nodes, up and down.
    assert PLAIN.all_gather(32, 6.0) == 100 + 28 * 1 + 3 * 10 + 31 * 6 / 2
    assert PLAIN.all_reduce(32, 6.0) == 100 + 2 * (7 + 2 * 10 + 6 / 2)
    assert PLAIN.all_to_all(32, 5, 6.0) == 100 + 5 * 10 + 6 / 2
    # A single node knows only its own links.
    assert PLAIN.all_gather(4, 8.0) == 100 + 3 * 1 + 3 * 8 / 4
    assert PLAIN.all_reduce(4, 8.0) == 100 + 2 * (3 + 8 / 4)
    assert PLAIN.all_to_all(4, 2, 8.0) == 100 + 2 + 8 / 4
    tree = replace(PLAIN, gather="tree")
    assert tree.all_gather(32, 6.0) == 100 + 3 * 1 + 2 * 10 + 31 * 6 / 2
    for alone in (PLAIN.all_gather(1, 9.0), PLAIN.all_reduce(1, 9.0), PLAIN.all_to_all(9, 0, 0.0)):
        assert alone == 0.0
    with pytest.raises(ValueError, match="Network: gather must be 'ring' or 'tree', got 'mesh'."):
        Network(gather="mesh")


def test_the_time_of_a_step_by_hand() -> None:
    assert step_seconds(2, 10, parameters=5.0, flops=1200.0, utilisation=0.5) == 1.0


def test_the_busiest_rank_by_hand() -> None:
    # Rank 0 sends 3 rows to 2 ranks; rank 2 gets 4 rows from 2.
    holders = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    targets = torch.tensor([1, 2, 2, 2, 2, 1, 2])
    assert busiest(holders, targets, 3) == (2, 4)
    assert busiest(targets, targets, 3) == (0, 0)


def test_turnover_counts_what_a_ledger_rewrites() -> None:
    """The sizes that are followed on paper are those of a ledger that is really updated."""
    known, rows = 400, 10
    ledger = Ledger(("loss",)).update(torch.arange(known), torch.zeros(known))
    with mock.patch.object(_runs, "SMALL", 1):
        aged = turnover(known, rows)
        order = torch.randperm(known, generator=torch.Generator().manual_seed(0))
        history = []
        for ids in order.split(rows):
            ledger = ledger.update(ids, torch.ones(rows))
            history.append(ledger.to_state()["ledger.sizes"].tolist())
            if len(history[-1]) == 1:
                break
    assert len(history) == aged.steps and history[aged.steps // 2] == aged.sizes
    # By hand: new rows become a run of 20, 30, ... 60, which is over an eighth of the 400.
    assert aged.steps == 6 and aged.rewritten == (20 + 30 + 40 + 50 + 60 + 400) / 6


def test_an_aged_ledger_is_one() -> None:
    for dense in (True, False):
        aged = aged_ledger([1000, 100, 10], dense)
        ledger = Ledger.from_state(aged.state)
        assert len(ledger) == 1000 and ledger.columns == ("loss", "visits")
        assert ledger.table["visits"].bincount().tolist() == [0, 900, 90, 10]
        assert float(ledger.mean) == pytest.approx(float(ledger.table["loss"].double().mean()))
        assert aged.merged_rows == 1000 and aged.merge > 0
        assert 16 * 1110 <= aged.nbytes < 16 * 1110 + 3000


def test_more_is_continued_along_the_logarithm() -> None:
    def point(known: int, plan: float) -> dict[str, Any]:
        seconds = {"plan": plan, "select": 0.0, "observe": 1.0, "merge": 7.0, "network": 0.5}
        return {
            "known": known, "ranks": 4, "rows": 10, "seconds": seconds,
            "seconds_per_rewritten_row": 0.1,
        }  # fmt: skip

    found = extrapolated([point(10**4, 2.0), point(10**6, 3.0)], 10**7, step_time=100.0)
    rewritten = turnover(10**7, 30).rewritten
    assert found["seconds"]["plan"] == pytest.approx(3.5) and found["seconds"]["observe"] == 1.0
    assert found["seconds"]["merge"] == pytest.approx(0.1 * rewritten) and found["extrapolated"]
    assert found["total"] == pytest.approx(3.5 + 1.0 + 0.5 + 0.1 * rewritten)
    assert found["share"] == pytest.approx(found["total"] / 100)


def test_a_step_is_measured_as_one_of_many_ranks() -> None:
    work = Workload("TopLoss", ranks=64, rows=2, candidates=3, tokens=8, known=1000)
    found = measure(work, PLAIN, steps=2)
    kinds = [one["kind"] for one in found["collectives"]]
    # Sizes, ids, scores; agreement; width of the rows and the rows themselves.
    assert kinds == ["all_reduce"] * 5 + ["all_to_all_single"]
    hidden = [one["hidden"] for one in found["collectives"]]
    assert hidden == [False, True, False, False, False, False]
    # 8 bytes for the number of rows, then 6 rows of ids and tokens, or of a loss, from each rank.
    assert [one["sent"] for one in found["collectives"][1:3]] == [64 * (8 + 96), 64 * (8 + 24)]
    trees = sum(PLAIN.all_reduce(64, sent) for sent in (8, 64 * 32, 16, 24))
    assert found["seconds"]["network"] > trees and found["moved_rows"] > 0
    assert found["seconds"]["plan"] > found["seconds"]["select"] > 0


def test_all_candidates_compete_and_ranks_train_equally_many() -> None:
    work = Workload("TopLoss", ranks=16, rows=2, candidates=4, tokens=8, known=1000)
    ranks = SimulatedRanks(16, 5)
    rehearsal = Rehearsal(work, 5)
    ranks.prepare_row({name: value[:1] for name, value in rehearsal.batch.items()})
    pool = rehearsal.pool(3)
    ranks.prepare(pool, rehearsal.counts)
    with ranks.stand_in():
        plan = rehearsal.decide(3)
    ((seen, selection),) = plan.decisions
    assert torch.equal(seen.row_ids(), pool.row_ids()) and len(set(pool.row_ids().tolist())) == 128
    assert selection.rows.tolist() == pool.loss.topk(32).indices.sort().values.tolist()
    assert [len(ids) for ids in plan.ids] == [2]


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    work = Workload(ranks=4, rows=2, tokens=8, known=3000)
    return bench_scale(
        ranks=[1, 4], candidates=[1, 2], ids=[2000, 20_000], work=work, extrapolate=10**5, steps=1
    )


def test_each_number_is_varied_alone(small: dict[str, Any]) -> None:
    names = ("strategy", "ranks", "candidates", "known", "dense")
    points = {n: [[p[k] for k in names] for p in small[f"against_{n}"]] for n in ("ranks", "ids")}
    assert points["ranks"][:2] == [["TopLoss", 1, 4, None, True], ["TopLoss", 4, 4, None, True]]
    assert points["ranks"][4:] == [["InfoBatch", n, 4, 3000, True] for n in (1, 4)]
    assert points["ids"] == [
        ["InfoBatch", 4, 4, n, dense] for dense in (True, False) for n in (2000, 20_000, 100_000)
    ]
    assert [p["candidates"] for p in small["against_candidates"]] == [1, 2, 1, 2]
    for point in small["against_ranks"] + small["against_ids"]:
        parts = {k: v for k, v in point["seconds"].items() if k != "select"}
        assert point["total"] == pytest.approx(sum(parts.values()))
        assert point["share"] == pytest.approx(point["total"] / small["step_seconds"])


def test_the_table_marks_what_was_not_measured(small: dict[str, Any]) -> None:
    lines = table(small).splitlines()
    assert [line for line in lines if "1e5 *" in line and line.startswith("InfoBatch")]
    assert "* extrapolated from the two largest ledgers that were measured" in lines
    assert any("bytes/id" in line for line in lines)


def test_the_command_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, drawing = tmp_path / "scale.json", tmp_path / "scale.png"
    words = "scale --ranks 1,2 --candidates 2 --ids 1e3,2e3 --rows 1 --tokens 4 --steps 1"
    words += " --extrapolate 1e4 --step-seconds 0.5 --alpha-inter 3e-6"
    assert main([*words.split(), "--json", str(path), "--figure", str(drawing)]) == 0
    result = json.loads(path.read_text())
    assert result["step_seconds"] == 0.5 and result["network"]["alpha_inter"] == 3e-6
    assert result["command"].startswith(
        "python -m onlinesel.bench scale --ranks 1,2 --candidates 2"
    )
    assert all(result[name] for name in ("date", "processor", "torch", "threads", "against_ids"))
    assert drawing.read_bytes()[:4] == b"\x89PNG"
    assert "Against ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["Best"]}, "bench_scale: strategies must be of TopLoss, .*, got 'Best'. Name"),
        ({"ranks": [0]}, "bench_scale: ranks must be at least 1, got 0. Pass a positive integer"),
        ({"steps": 0}, "bench_scale: steps must be at least 1, got 0. Pass a positive integer"),
        (
            {"ids": [5], "ranks": [4], "methods": ["InfoBatch"]},
            r"bench_scale: ids must be at least the candidates of a step \(16\), got 5. Take a la",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_scale(**{"candidates": [1], "steps": 1, **arguments})
