"""Lightning on two processes trains the rows of one, with its gradient, and nothing hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from onlinesel.strategies import LossReweight, TopLoss, Uniform
from tests.callbacks.hosts import make_model, make_rows, reference_gradient, relative_error
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Classifier,
    SaveAt,
    classified,
    close,
    equal,
    kept,
    loader,
    make_trainer,
    naive_steps,
    naive_top,
    planned,
    selection,
    state_of,
)
from tests.callbacks.lightning_two_ranks import ENGINES, ROWS
from tests.launching import torchrun

pytestmark = [pytest.mark.slow, *QUIET_LIGHTNING]

TWICE = {"accumulate_grad_batches": 2, "max_epochs": 2}
STOPPED = {"middle": 8, "odd": 6}  # two windows of two ranks, or one and a half


def shuffled(batch_size: int = 4) -> Any:
    return loader(classified(ROWS), batch_size, shuffle=True)


def train(strategy: Any, batches: Any, *callbacks: Any, **options: Any) -> Any:
    """Train on this one process; returns what trained in each step, and the trainer."""
    start, module = options.pop("ckpt_path", None), options.pop("module", None) or Classifier()
    callback = selection(strategy, candidates=options.pop("candidates", 2))
    trainer = make_trainer(*callbacks, callback, **options)
    with planned() as plans:
        try:
            trainer.fit(module, batches, ckpt_path=start)
        except KeyError:
            assert callbacks
    return [kept(plan) for plan in plans], trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lightning")
    for name, batches in STOPPED.items():  # two ranks go on from there
        stop = SaveAt(path / f"one-{name}.ckpt", batches)
        train(Uniform(), shuffled(2), stop, candidates=1, **TWICE)
    torchrun("callbacks.lightning_two_ranks", str(path), port=29647)
    return path


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def together(ranks: list[dict[str, Any]]) -> list[dict[int, float]]:
    """Return what trained in each step on both ranks, having seen that no row did on both."""
    found = []
    for steps in zip(*(rank["steps"] for rank in ranks), strict=True):
        rows: dict[int, float] = {}
        for step in steps:
            pairs = zip(sum(step["ids"], []), sum(step["weights"], []), strict=True)
            own = {i: w for i, w in pairs if w > 0}
            assert not set(own) & set(rows)
            rows |= own
        found.append(dict(sorted(rows.items())))
    return found


def windows(size: int) -> list[range]:
    return [range(i, min(i + size, ROWS)) for i in range(0, ROWS, size)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_subset_is_that_of_a_naive_loop(folder: Path, accumulate: int) -> None:
    ranks, rows = read(folder, f"subset-{accumulate}"), classified(ROWS)
    expected = naive_top(rows, windows(12 * accumulate), 3)
    assert together(ranks) == [dict(sorted(step.items())) for step in expected]
    assert all(close(rank["state"], naive_steps(rows, expected)) for rank in ranks)
    assert equal(*(rank["state"] for rank in ranks))
    assert [rank["global_step"] for rank in ranks] == [len(expected)] * 2


@pytest.mark.parametrize("name", ["subset-1", "subset-2", "shuffled"])
def test_ranks_train_equally_many_rows(folder: Path, name: str) -> None:
    counts = [
        [sum(map(len, step["ids"])) for step in rank["steps"][:-1]] for rank in read(folder, name)
    ]
    assert counts[0] == counts[1] and set(counts[0]) == {4 if name == "subset-2" else 2}


@pytest.mark.parametrize("name", ["subset-2", "weights-1", "weights-2", "shuffled"])
def test_two_ranks_are_one_process_of_the_same_global_batch(folder: Path, name: str) -> None:
    strategy = LossReweight(min_rows=2) if "weights" in name else TopLoss()
    options = {"accumulate_grad_batches": 2 if name.endswith("2") else 1}
    batches = loader(classified(ROWS), 4, shuffle=name == "shuffled")
    module, candidates = Classifier(), 1 if "weights" in name else 3
    one, _ = train(strategy, batches, module=module, candidates=candidates, **options)
    ranks = read(folder, name)
    for own, there in zip(one, together(ranks), strict=True):
        assert set(own) == set(there)
        assert [there[i] for i in own] == pytest.approx([own[i] for i in own], rel=1e-4)
    assert close(ranks[0]["state"], state_of(module))


@pytest.mark.parametrize(
    "name",
    ["weights-1", "weights-2", "observing", "manual", "rank", "batch", "one-rank-empty",
     "one-rank-nan"],
)  # fmt: skip
def test_each_step_is_the_weighted_mean_of_what_trained(folder: Path, name: str) -> None:
    ranks = read(folder, name)
    steps = [step for step in together(ranks) if step]
    assert steps
    assert all(close(rank["state"], naive_steps(classified(ROWS), steps)) for rank in ranks)


def test_rows_of_a_failed_rank_are_replaced(folder: Path) -> None:
    """All scores of rank 1 are nan: it trains rows that rank 0 had loaded."""
    first, second = read(folder, "one-rank-nan")
    loaded = set(range(6)) | set(range(12, 18)) | set(range(24, 30)) | set(range(36, 42))
    for step in second["steps"][:-1]:
        assert set(sum(step["ids"], [])) <= loaded and step["weights"] == [[1.0, 1.0]]
    assert not any(w for step in first["steps"] for ws in step["weights"] for w in ws if w != 1)


@pytest.mark.parametrize("name", ["nothing-kept", "all-nan"])
def test_steps_without_rows_move_nothing_and_hang_nobody(folder: Path, name: str) -> None:
    for rank in read(folder, name):
        assert equal(rank["state"], state_of(Classifier())) and len(rank["steps"]) >= 5
        assert all(step["weights"] == [[0.0]] for step in rank["steps"])


LANGUAGES = [
    (engine, name)
    for engine in ENGINES
    for name in ("top", "uds", "weights", "short")
    if engine not in ("zero1", "zero2") or name in ("top", "short")
]


@pytest.mark.parametrize(("engine", "name"), LANGUAGES)
def test_language_models_apply_the_loss_contract(folder: Path, engine: str, name: str) -> None:
    ranks = read(folder, f"{engine}-{name}")
    (rows,) = together(ranks)
    model, normalize = make_model(), LossReweight.normalize if name == "weights" else "tokens"
    before = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    found, _ = reference_gradient(model, make_rows(), list(rows), list(rows.values()), normalize)
    gradient = {f"model.{n}": part for n, part in found.items()}
    assert len(rows) == (4 if name == "short" else 8)
    for rank in ranks:
        assert relative_error(before, rank["state"], gradient) < 1e-6


def test_ranks_read_as_far_as_the_shortest(folder: Path) -> None:
    """Rank 1 has 5 rows in 3 batches, so 2 micro-batches of candidates; rank 0 would have 3."""
    ranks = read(folder, "uneven")
    assert [len(rank["steps"]) for rank in ranks] == [2, 2]
    assert [rank["global_step"] for rank in ranks] == [2, 2]


def test_a_sampler_that_shards_is_left_as_it_is(folder: Path) -> None:
    ranks = read(folder, "sampler")
    expected = naive_top(classified(), [range(0, 8), range(8, 12)], 2)
    assert together(ranks) == [dict(sorted(step.items())) for step in expected]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom", "use_distributed_sampler must be False for a sampler of one's own"),
        ("unsharded", "use_distributed_sampler must be True for a loader with torch's own"),
        ("seeds", "seed must be the same on every rank, got ['0', '1']"),
        ("tensors", "ModelParallelStrategy with 1 replicas on 2 ranks"),
    ],
)
def test_what_ranks_cannot_share_is_refused_on_all(folder: Path, name: str, message: str) -> None:
    for rank in (0, 1):
        text = (folder / f"{name}-{rank}.txt").read_text()
        assert text.startswith("LightningSelection: ") and message in text


# Resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "rank", "fsdp2", "zero2"])
def test_stopping_makes_no_difference(folder: Path, scope: str) -> None:
    runs = {part: read(folder, f"{scope}-{part}") for part in ("whole", "before", "after")}
    for rank in (0, 1):
        whole, before, after = (runs[part][rank] for part in ("whole", "before", "after"))
        assert before["steps"] and after["steps"]
        assert before["steps"] + after["steps"] == whole["steps"]
        assert equal(after["state"], whole["state"])


@pytest.mark.parametrize(("name", "done"), [("middle", 3), ("end", 7)])
def test_one_process_goes_on_where_two_stopped(folder: Path, name: str, done: int) -> None:
    before = together(read(folder, f"two-{name}-before"))
    after, trainer = train(
        Uniform(), shuffled(2), candidates=1, ckpt_path=folder / f"two-{name}.ckpt", **TWICE
    )
    first = 7 if name == "middle" else 0  # 26 rows are left, in windows of 4
    assert len(before) == done and len(after) == first + 13
    assert sorted(i for step in before + after[:first] for i in step) == list(range(ROWS))
    assert sorted(i for step in after[first:] for i in step) == list(range(ROWS))
    assert trainer.global_step == done + first + 13 and trainer.current_epoch == 2


@pytest.mark.parametrize(("name", "batches"), STOPPED.items())
def test_two_processes_go_on_where_one_stopped(folder: Path, name: str, batches: int) -> None:
    order = [list(step) for step in train(Uniform(), shuffled(2), candidates=1)[0]]
    before, ranks = sum(order[:batches], []), read(folder, f"one-{name}-after")
    steps = together(ranks)
    first = -(-(ROWS - len(before)) // 8)
    assert sorted(before + [i for step in steps[:first] for i in step]) == list(range(ROWS))
    assert sorted(i for step in steps[first:] for i in step) == list(range(ROWS))
    assert [rank["global_step"] for rank in ranks] == [batches // 2 + first + 7] * 2
