"""A run that goes on with another number of processes neither repeats nor loses a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from onlinesel import Selector
from onlinesel.callbacks.hf.order import ContinuedOrder
from onlinesel.callbacks.hf.state import resume_run
from onlinesel.ledger import Ledger
from onlinesel.mixing import DomainSampler
from onlinesel.strategies import SelectiveBackprop, TopLoss
from tests.callbacks import elastic
from tests.callbacks.hosts import attach, choices, make_rows, make_trainer
from tests.launching import torchrun

WAYS = {"2-to-1": (2, 1), "1-to-2": (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic")
    for name in elastic.cases():
        elastic.train(path / f"{name}-from-1", name, 1)
    torchrun("callbacks.elastic", str(path), port=29623)
    for name in elastic.cases():
        checkpoint = path / f"{name}-from-2" / f"checkpoint-{elastic.STOP[2]}"
        elastic.train(path / f"{name}-2-to-1", name, 1, resume=checkpoint)
    return path


def windows(folder: Path) -> list[list[int]]:
    """The ids that were loaded in each step, over all processes and in ascending order."""
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("ids-*.json"))]
    if len(ranks) == 2 and ranks[0] == ranks[1]:  # both saw the candidates of both
        ranks = ranks[:1]
    return [sorted(sum(parts, [])) for parts in zip(*ranks, strict=True)]


BEHIND = {
    ("ragged", 2): 49,  # an epoch of 49 rows takes four steps of 16 rows, the last one of 8
    ("ragged", 1): 49 + 8,  # or seven of 8
    ("drop-last", 2): 50 + 16,  # the last two of 50 rows are left out
    ("drop-last", 1): 50 + 16,
    ("plan", 2): 48,  # an epoch of 24 rows takes two steps
}
"""Place in the stream of epochs at the stop, where it is not 64, by the processes until then."""


def orders(name: str) -> list[list[int]]:
    """The first epochs, worked out without accelerate."""
    strategy, options, changes = elastic.cases()[name]
    count = changes.get("rows", 48)
    if name == "sequential":
        return [list(range(count)) for _ in range(8)]
    if name == "plan":
        return [strategy.epoch_plan(count, epoch=e, seed=0).tolist() for e in range(8)]
    if name == "mixture":
        domains = torch.tensor([row["domain"] for row in elastic.rows()])
        sampler, epochs = DomainSampler(domains, options["mixture"], seed=0), []
        for sampler.epoch in range(8):
            epochs.append(list(sampler))
        return epochs
    shuffles = (torch.Generator().manual_seed(epoch) for epoch in range(8))
    return [torch.randperm(count, generator=g).tolist() for g in shuffles]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", elastic.cases())
def test_the_next_rows_are_those_after_the_last(folder: Path, name: str, way: str) -> None:
    before, after = WAYS[way]
    whole = sum(orders(name), [])
    place = BEHIND.get((name, before), 64)
    loaded = windows(folder / f"{name}-{way}")
    assert len(loaded) == elastic.END[after] - elastic.STOP[before]
    for k, ids in enumerate(loaded):
        assert ids == sorted(whole[place:][: len(ids)]), k
        place += len(ids)
    # A step of what the trainer counts as an epoch's end is shorter where an epoch does not divide.
    assert sum(map(len, loaded)) == 80 or name in ("ragged", "drop-last", "plan")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_row_of_an_epoch_is_loaded_once(folder: Path, way: str) -> None:
    """Three epochs in two runs: by counting, without knowing any order."""
    before, _ = WAYS[way]
    parts = windows(folder / f"global-from-{before}") + windows(folder / f"global-{way}")
    ids = sum(parts, [])
    assert len(ids) == 3 * 48 and sorted(ids[:48]) == list(range(48))
    for epoch in range(3):
        assert sorted(ids[48 * epoch :][:48]) == list(range(48))


@pytest.mark.slow
def test_a_continued_run_resumes_bit_for_bit(folder: Path) -> None:
    """Its own checkpoints stand in the stream, not where the trainer's count would put them."""
    whole = windows(folder / "global-2-to-1")
    checkpoint = folder / "global-2-to-1" / "checkpoint-8"
    facts = json.loads((checkpoint / "selection.json").read_text())["data"]
    assert facts["streamed"] and facts["place"] == 64 + 4 * 8
    again = elastic.train(folder / "global-again", "global", 1, resume=checkpoint)
    assert windows(folder / "global-again") == whole[4:]
    state = torch.load(folder / "global-2-to-1" / "state-0.pt")
    other = torch.load(folder / "global-again" / "state-0.pt")
    assert torch.equal(state["tensors"]["generator"], other["tensors"]["generator"])
    final = folder / "global-2-to-1" / f"checkpoint-{elastic.END[1]}" / "model.safetensors"
    for key, value in load_file(final).items():
        assert torch.equal(again.model.state_dict()[key], value), key


def tensors(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"state-{rank}.pt")["tensors"]


def resumed(checkpoint: Path, selector: Selector, rank: int | None, ranks: int) -> Selector:
    facts = json.loads((checkpoint / "selection-rank0.json").read_text())
    settings = {name: facts[name] for name in ("strategy", "scope", "seed")}
    resume_run(str(checkpoint), selector, None, settings, rank, ranks)
    return selector


@pytest.mark.slow
def test_memory_and_generator_follow_the_old_ranks(folder: Path) -> None:
    """Rank r of four takes the memory of rank r mod 2; its generator only if there was a rank r."""
    checkpoint = folder / "rank-from-2" / f"checkpoint-{elastic.STOP[2]}"
    old = [tensors(folder / "rank-from-2", rank) for rank in (0, 1)]
    assert not torch.equal(old[0]["state.history"], old[1]["state.history"])
    assert not torch.equal(old[0]["generator"], old[1]["generator"])
    for rank, ranks in ((None, 1), (0, 4), (1, 4), (2, 4), (3, 4)):
        selector, me = Selector(SelectiveBackprop(), seed=100), rank or 0
        fresh = selector.state_dict()["tensors"]["generator"]
        resumed(checkpoint, selector, rank, ranks)
        new = selector.state_dict()["tensors"]
        assert torch.equal(new["state.history"], old[me % 2]["state.history"])
        assert torch.equal(new["generator"], old[me]["generator"] if me < 2 else fresh)
        assert selector.step == elastic.STOP[2]


@pytest.mark.slow
def test_what_is_remembered_by_id_is_united(folder: Path) -> None:
    """Each of two ranks knew the losses of its own rows; one process knows all of them."""
    checkpoint = folder / "ledger-from-2" / f"checkpoint-{elastic.STOP[2]}"
    strategy, ids = elastic.cases()["ledger"][0], torch.arange(48)
    one = resumed(checkpoint, Selector(strategy, seed=0), None, 1)
    states = [*(tensors(folder / "ledger-from-2", rank) for rank in (0, 1))]
    states.append(one.state_dict()["tensors"])
    ledgers = [
        Ledger.from_state({k.removeprefix("state."): v for k, v in state.items()})
        for state in states
    ]
    first, second, united = (ledger.lookup(ids, "loss") for ledger in ledgers)
    known = [torch.isfinite(losses) for losses in (first, second, united)]
    assert 0 < int(known[0].sum()) < 48 and torch.equal(known[2], known[0] | known[1])
    alone = known[0] & ~known[1]
    assert bool(alone.any()) and torch.equal(united[alone], first[alone])


@pytest.mark.slow
def test_a_rank_whose_state_is_missing_is_noticed(folder: Path) -> None:
    checkpoint = folder / "rank-from-2" / f"checkpoint-{elastic.STOP[2]}"
    for suffix in ("json", "safetensors"):
        (checkpoint / f"selection-rank1.{suffix}").rename(checkpoint / f"kept.{suffix}")
    try:
        with pytest.raises(ValueError, match="checkpoint must hold selection-rank1.json and"):
            resumed(checkpoint, Selector(SelectiveBackprop()), None, 1)
    finally:
        for suffix in ("json", "safetensors"):
            (checkpoint / f"kept.{suffix}").rename(checkpoint / f"selection-rank1.{suffix}")


@given(
    rows=st.integers(1, 30),
    old=st.tuples(st.integers(1, 7), st.integers(0, 60)),
    new=st.tuples(st.integers(1, 7), st.integers(1, 3)),
)
def test_the_stream_goes_on_whatever_the_trainer_skips(
    rows: int, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """Read as the trainer does: skip the batches it thinks it has had, then epoch after epoch."""
    (portion, step), (size, accumulate) = old, new
    behind, whole = portion * step, [1000 * e + i for e in range(200) for i in range(rows)]
    batches = -(-rows // size)
    epoch, steps = divmod(step, -(-batches // accumulate))
    skipped, asked = steps * accumulate * size, set()

    def order(number: int) -> Any:
        asked.add(number)
        return iter([1000 * number + i for i in range(rows)])

    stream = ContinuedOrder(
        order, rows, behind=behind, length=batches * size,
        origin=behind - epoch * batches * size - skipped,
    )  # fmt: skip
    read = []
    for stream.epoch in range(epoch, epoch + 3):
        read += list(stream)
        assert len(list(stream)) == len(stream) == batches * size
    assert read[skipped:] == whole[behind:][: len(read) - skipped]
    assert min(asked, default=behind // rows) >= behind // rows  # never back to an old epoch


def stopped(folder: Path, **changes: Any) -> Path:
    """Return a checkpoint after three steps of four candidates, in an epoch of twelve steps."""
    trainer = make_trainer(folder, max_steps=3, save_strategy="steps", save_steps=3, **changes)
    attach(trainer, TopLoss(), candidates=2)
    trainer.train()
    return folder / "checkpoint-3"


def go_on(folder: Path, checkpoint: Path, **changes: Any) -> list[list[int]]:
    changes = {"max_steps": 5, **changes}
    trainer = make_trainer(folder, **changes)
    attach(trainer, TopLoss(), candidates=2, record=folder / "record")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return [choice["ids"] for choice in choices(folder / "record")]


@pytest.mark.parametrize(
    "changes", [{"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_another_batch_size_goes_on_in_the_same_order(tmp_path: Path, changes: Any) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    loaded = go_on(tmp_path / "other", stopped(tmp_path), **changes)
    size = 4 * 3 // 2 if "per_device_train_batch_size" in changes else 8
    assert sum(loaded, []) == order[12:][: 2 * size]


def test_the_order_is_that_of_the_first_run_whatever_seed_comes_after(tmp_path: Path) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    changes = {"per_device_train_batch_size": 3, "data_seed": 9}
    assert sum(go_on(tmp_path / "other", stopped(tmp_path), **changes), []) == order[12:24]


def test_the_same_batch_in_other_pieces_is_the_trainers_own_business(tmp_path: Path) -> None:
    """Nothing is put in its way: the trainer's own skipping is exact."""
    trainer = make_trainer(tmp_path / "other", max_steps=5)
    callback = attach(trainer, TopLoss(), candidates=2)
    trainer.train(resume_from_checkpoint=str(stopped(tmp_path)))
    assert callback._data._sampler is None and callback._data._epoch == 0


@pytest.mark.filterwarnings("ignore:OnlineSelection. train_dataset holds other rows")
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 3},
            "order of the rows must be a function of seed and epoch .* got LengthGroupedSampler",
        ),
        (
            {},
            {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 3},
            "got SeedableRandomSampler and SequentialSampler",
        ),
        (
            {"rows": IterableDataset.from_generator(lambda: iter(make_rows()))},
            {
                "rows": IterableDataset.from_generator(lambda: iter(make_rows())),
                "per_device_train_batch_size": 3,
            },
            "got a stream and a stream. Resume with the processes, batch size and accumulation",
        ),
        (
            {},
            {"rows": make_rows(40), "per_device_train_batch_size": 3},
            r"train_dataset must be the checkpoint's .*'rows': 48.*got .*'rows': 40",
        ),
    ],
    ids=["lengths", "another order", "a stream", "another dataset"],
)
def test_what_cannot_go_on_exactly_is_refused(
    tmp_path: Path, before: Any, after: Any, message: str
) -> None:
    checkpoint = stopped(tmp_path, **before)
    with pytest.raises(ValueError, match=f"OnlineSelection: .*{message}"):
        go_on(tmp_path / "other", checkpoint, **after)
    # The way out that the message names: the data begin anew.
    loaded = go_on(tmp_path / "another", checkpoint, ignore_data_skip=True, **after)
    assert len(loaded) == 2


def test_a_checkpoint_without_a_place_needs_as_many_processes(tmp_path: Path) -> None:
    """Those written before the place was noted: exact on their own number of processes only."""
    checkpoint = stopped(tmp_path)
    file = checkpoint / "selection.json"
    facts = json.loads(file.read_text())
    del facts["data"]
    file.write_text(json.dumps(facts))
    assert len(go_on(tmp_path / "other", checkpoint)) == 2
    file.write_text(json.dumps({**facts, "world_size": 3}))
    with pytest.raises(ValueError, match=r"from 3 process\(es\) on 1 .*, got no place in the data"):
        go_on(tmp_path / "another", checkpoint)
