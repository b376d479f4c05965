"""Plain loops on two processes train the rows of one, with its gradient, and nothing hangs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel.strategies import SelectiveBackprop
from tests.callbacks.hosts import make_model, make_rows, reference_gradient, relative_error
from tests.callbacks.loop_hosts import kept, make_loader, sgd, train
from tests.callbacks.loop_killed import KILLED_IN
from tests.callbacks.loop_two_ranks import CHECKPOINTED, scenarios
from tests.launching import torchrun

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp2")
RESUMED: dict[str, Any] = {"strategy": SelectiveBackprop(), "candidates": 2, "accumulate": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loops")
    model = make_model()
    # Two ranks go on from here: what one process did with the same global batch.
    steps = onlinesel.steps(make_loader(4), model, **RESUMED)
    (path / "one.json").write_text(json.dumps(train(steps, model, sgd(model), stop=1)))
    torch.save(steps.state_dict(), path / "one.ckpt")
    torchrun("callbacks.loop_two_ranks", str(path), port=29641)
    return path


def read(folder: Path, name: str) -> list[Any]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def together(ranks: list[dict[str, Any]]) -> dict[int, float]:
    """Return the rows of all ranks, having seen that none trained on two of them."""
    rows = [kept(step) for step in ranks]
    assert not set(rows[0]) & set(rows[1])
    return rows[0] | rows[1]


EXACT = [name for name in scenarios() if name not in ("nothing-kept", "all-nan")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_apply_the_gradient_of_one(folder: Path, engine: str, name: str) -> None:
    ranks = read(folder, f"{engine}-{name}")
    rows = together(ranks)
    model = make_model()
    before = torch.load(folder / "before.pt")
    normalize = scenarios()[name]["strategy"].normalize
    gradient, loss = reference_gradient(
        model, make_rows(), list(rows), list(rows.values()), normalize
    )
    for rank in (0, 1):
        after = torch.load(folder / f"{engine}-{name}-{rank}.pt")
        assert relative_error(before, after, gradient) < 1e-6
        assert ranks[rank]["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [n for n in EXACT if n.startswith(("subset", "weights", "uds"))])
def test_two_ranks_keep_the_rows_of_one(folder: Path, engine: str, name: str) -> None:
    options = dict(scenarios()[name])
    model = make_model()
    steps = onlinesel.steps(make_loader(4), model, options.pop("strategy"), **options)
    (alone,) = train(steps, model, sgd(model), stop=1)
    assert together(read(folder, f"{engine}-{name}")) == pytest.approx(kept(alone), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["subset-1", "subset-2", "one-rank-nan"])
def test_ranks_train_equally_many_rows(folder: Path, engine: str, name: str) -> None:
    counts = [[len(ids) for ids in step["ids"]] for step in read(folder, f"{engine}-{name}")]
    assert counts[0] == counts[1] == [2] * len(counts[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["nothing-kept", "all-nan"])
def test_a_step_without_rows_moves_nothing(folder: Path, engine: str, name: str) -> None:
    before = torch.load(folder / "before.pt")
    for rank, step in enumerate(read(folder, f"{engine}-{name}")):
        after = torch.load(folder / f"{engine}-{name}-{rank}.pt")
        assert all(torch.equal(before[key], after[key]) for key in before)
        # Where every loss is nan the run has diverged, and says so.
        assert math.isnan(step["loss"]) if name == "all-nan" else step["loss"] == 0.0
        assert step["weights"] == [[0.0]]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["subset", "weights"])
def test_a_deepspeed_engine_applies_each_steps_gradient(
    folder: Path, stage: int, name: str
) -> None:
    """12 rows in steps of 8: the second has one micro-batch where the engine accumulates two."""
    before, model = torch.load(folder / "before.pt"), make_model()
    normalize = "tokens" if name == "subset" else "samples"
    for index in range(2):
        ranks = read(folder, f"zero{stage}-{name}-{index}")
        rows = together(ranks)
        assert len(rows) == (8, 4)[index]
        model.load_state_dict(before)
        gradient, _ = reference_gradient(
            model, make_rows(), list(rows), list(rows.values()), normalize
        )
        after = torch.load(folder / f"zero{stage}-{name}-{index}-0.pt")
        assert relative_error(before, after, gradient) < 5e-6
        before = after


@pytest.mark.parametrize("engine", CHECKPOINTED)
def test_a_checkpoint_of_each_engine_resumes_bit_identically(folder: Path, engine: str) -> None:
    for rank in (0, 1):
        whole, resumed = (read(folder, f"{name}-{engine}")[rank] for name in ("whole", "resumed"))
        assert whole == resumed and len(whole) == 3
        states = [
            torch.load(folder / f"{name}-{engine}-{rank}.pt") for name in ("whole", "resumed")
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_rank_without_a_row_of_its_own_keeps_step(folder: Path) -> None:
    (length, first), (_, second) = read(folder, "ragged")
    assert length == 2 and len(first) == len(second) == 2
    assert [len(ids) for ids in first[0]["ids"]] == [len(i) for i in second[0]["ids"]] == [2, 2]
    trained = [together([a, b]) for a, b in zip(first, second, strict=True)]
    assert sorted(sum(map(list, trained), [])) == list(range(9))
    assert len(trained[1]) == 1 and kept(second[1]) == {}
    states = [torch.load(folder / f"ragged-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_stream_that_is_longer_on_one_rank_ends_with_the_other(folder: Path) -> None:
    """Rank 1 has 5 rows: a step of 4 candidates and one of 1; rank 0 reads as many steps."""
    first, second = read(folder, "uneven")
    assert len(first) == len(second) == 2


@pytest.mark.parametrize("name", ["sampler", "accelerate"])
def test_a_loader_left_as_it_is_resumes_on_two_ranks(folder: Path, name: str) -> None:
    """5 batches in pairs make three steps; the longer rank stops where the other does."""
    for whole, rest in read(folder, f"foreign-{name}"):
        assert len(whole) == 3 and rest == whole[1:]


@pytest.mark.parametrize("what", ["seed", "strategy", "accumulate", "rows"])
def test_ranks_with_different_settings_are_told_at_once(folder: Path, what: str) -> None:
    values = {
        "seed": "0', '1",
        "strategy": "TopLoss.lowest=False.', 'TopLoss.lowest=True.",
        "accumulate": "1', '2",
        "rows": "16', '14",
    }
    for message in read(folder, f"disagree-{what}"):
        assert message.startswith(f"steps: {what} must be the same on every rank, got [")
        assert re.search(values[what], message)


def test_a_resumed_run_on_two_ranks_finishes_the_epoch(folder: Path) -> None:
    for scope in ("global", "rank"):
        done = [read(folder, f"resume-{scope}{part}") for part in ("", "-rest")]
        ids = [i for part in done for step in zip(*part, strict=True) for i in together(list(step))]
        assert len(ids) == len(set(ids)) == 24


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_one_process_goes_on_where_two_had_stopped(folder: Path, scope: str) -> None:
    checkpoint = torch.load(folder / f"resume-{scope}.ckpt")
    model = make_model()
    model.load_state_dict(checkpoint["model"])
    steps = onlinesel.steps(make_loader(4), model, **RESUMED, scope=scope)
    steps.load_state_dict(checkpoint["steps"])
    assert steps.step == 1
    rest = train(steps, model, sgd(model))
    here = [kept(step) for step in rest]
    first = [together(list(s)) for s in zip(*read(folder, f"resume-{scope}"), strict=True)]
    assert sum(len(s) for s in first + here) == len({i for s in first + here for i in s}) == 24
    if scope == "global":  # the same rows in the same steps as the two ranks' own second part
        there = read(folder, "resume-global-rest")
        assert [sorted(s) for s in here] == [
            sorted(together(list(s))) for s in zip(*there, strict=True)
        ]


def test_two_ranks_go_on_where_one_had_stopped(folder: Path) -> None:
    first = [kept(s) for s in json.loads((folder / "one.json").read_text())]
    rest = [together(list(s)) for s in zip(*read(folder, "grown"), strict=True)]
    ids = [i for step in first + rest for i in step]
    assert len(ids) == len(set(ids)) == 24


def test_selection_adds_at_most_two_percent_to_a_step(folder: Path) -> None:
    """Counted as for the Trainer, where the same collectives, calls and operations are 1 %."""
    for found in read(folder, "cost"):
        assert 0 < found["calls"] <= 1500 and 0 < found["operations"] <= 180, found
        assert found["elements"] <= 5000 and 0 < found["collectives"] <= 3, found


def test_a_killed_rank_costs_the_step_that_it_interrupts_and_no_row(tmp_path: Path) -> None:
    torchrun("callbacks.loop_killed", str(tmp_path), port=29642, restarts=1)
    for rank in (0, 1):
        planned: list[dict[int, list[int]]] = []
        trained: list[list[int]] = []
        for attempt in (0, 1):
            lines = (tmp_path / f"log-{attempt}-{rank}.jsonl").read_text().splitlines()
            entries = [json.loads(line) for line in lines]
            planned.append({e["planned"]: e["candidates"] for e in entries if "planned" in e})
            trained.append([e["trained"] for e in entries if "trained" in e])
        assert trained == [[0, 1, 2], [3, 4, 5]]
        assert planned[0][KILLED_IN] == planned[1][KILLED_IN]
        order = [i for a, steps in enumerate(trained) for s in steps for i in planned[a][s]]
        assert sorted(order) == list(range(48))
