"""A method that leaves rows out of an epoch: they are not read, and the rest is as without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import onlinesel
from onlinesel import Strategy, When
from onlinesel.strategies import InfoBatch

ROWS = 50


class Digits(Dataset[Any]):
    """Rows of three classes, and which of them were read."""

    def __init__(self, named: bool = False) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, 4, generator=g)
        self.labels = torch.randint(3, (ROWS,), generator=g)
        self.named, self.read = named, list[int]()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.read.append(row)
        name = {"sample_id": 1000 + row} if self.named else {}
        return {"x": self.inputs[row], "y": self.labels[row], **name}


class Run:
    """A plain loop over digits, an epoch at a time."""

    def __init__(self, strategy: Strategy, *, named: bool = False, **loader: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.data = Digits(named)
        options = {"batch_size": 8, "shuffle": True, **loader}
        self.steps = onlinesel.steps(DataLoader(self.data, **options), self.model, strategy, seed=3)

    def epoch(self) -> Iterator[tuple[list[int], list[float], list[float]]]:
        """Train; yields ids, weights and losses of each step."""
        for step in self.steps:
            (micro,) = step
            losses = cross_entropy(self.model(micro.batch["x"]), micro.batch["y"], reduction="none")
            micro.loss(losses).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield micro.ids.tolist(), micro.weights.tolist(), losses.tolist()


def test_rows_that_are_skipped_are_never_read() -> None:
    """Held against a dict of last losses: which rows must be read, and how much each counts."""
    run, last = Run(InfoBatch(prune=0.5)), dict[int, float]()
    skipped = 0
    for epoch in range(5):
        mean = sum(last.values()) / max(len(last), 1)
        learnt = {row for row, loss in last.items() if loss < mean}
        run.data.read.clear()
        trained = list(run.epoch())
        ids = [row for part, _, _ in trained for row in part]
        assert ids == run.data.read and len(set(ids)) == len(ids), "read once, and what trains"
        assert set(range(ROWS)) - set(ids) <= learnt
        assert [len(part) for part, _, _ in trained[:-1]] == [8] * (len(trained) - 1)
        for part, weights, losses in trained:
            assert weights == [2.0 if row in learnt else 1.0 for row in part]
            last |= dict(zip(part, losses, strict=True))
        assert len(trained) == len(run.steps) == -(-len(ids) // 8)
        skipped += ROWS - len(ids)
        assert epoch or not skipped
    assert 0.15 < skipped / (4 * ROWS) < 0.45  # half of those below the mean


@pytest.mark.parametrize("divide_by", ["weights", "rows"])
def test_a_step_divides_as_it_says(divide_by: str) -> None:
    """The release divides a batch by its rows, whatever they weigh."""
    run, seen = Run(InfoBatch(divide_by=divide_by)), set[float]()
    list(run.epoch())
    for step in run.steps:
        (micro,) = step
        losses = cross_entropy(run.model(micro.batch["x"]), micro.batch["y"], reduction="none")
        weights = micro.weights
        divisor = len(weights) if divide_by == "rows" else weights.sum()
        wanted = ((weights * losses).sum() / divisor).item()
        assert micro.loss(losses).item() == pytest.approx(wanted, rel=1e-6)
        seen |= set(weights.tolist())
    assert seen == {1.0, 2.0}


@pytest.mark.parametrize("stop", [3, 9, 14])
@pytest.mark.parametrize("strategy", [InfoBatch(), When(InfoBatch(), start=7, stop=17)])
def test_a_resumed_epoch_has_the_rows_that_were_drawn(strategy: Strategy, stop: int) -> None:
    def go(run: Run, until: int) -> list[Any]:
        found = list[Any]()
        while run.steps.step < until:
            for done in run.epoch():
                found.append(done)
                if run.steps.step + 1 == until:
                    break
            run.steps.state_dict()  # the step at hand has trained
        return found

    whole, first, second = (Run(strategy) for _ in range(3))
    expected = go(whole, 24)
    begun = go(first, stop)
    second.model.load_state_dict(first.model.state_dict())
    second.steps.load_state_dict(first.steps.state_dict())
    assert begun + go(second, 24) == expected
    assert torch.equal(whole.model.weight, second.model.weight)


def test_a_window_that_is_over_reads_everything() -> None:
    run = Run(When(InfoBatch(prune=0.9), stop=8))
    lengths = [sum(len(part) for part, _, _ in run.epoch()) for _ in range(4)]
    assert lengths[0] == ROWS and lengths[1] < ROWS and lengths[2:] == [ROWS, ROWS]


def test_rows_with_ids_of_their_own_are_decided_as_they_come() -> None:
    run, last = Run(InfoBatch(), named=True), dict[int, float]()
    for _ in range(3):
        run.data.read.clear()
        for ids, weights, losses in run.epoch():
            assert min(ids) >= 1000 and set(weights) <= {1.0, 2.0, 0.0}
            last |= dict(zip(ids, losses, strict=True))
        assert sorted(run.data.read) == list(range(ROWS))
    assert len(last) == ROWS


def test_a_sampler_of_ones_own_keeps_its_rows() -> None:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * ROWS, 30)
    run = Run(InfoBatch(), shuffle=False, sampler=sampler)
    for _ in range(3):
        run.data.read.clear()
        list(run.epoch())
        assert len(run.data.read) == 30


class Counted(TorchDispatchMode):
    """Count the operations of torch."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_step_adds_few_operations() -> None:
    """Seconds differ from machine to machine; what is done does not."""

    def plain(model: Any, batch: dict[str, Tensor]) -> None:
        cross_entropy(model(batch["x"]), batch["y"], reduction="none").mean().backward()

    run = Run(InfoBatch())
    list(run.epoch())
    with Counted() as ours:
        count = sum(1 for _ in run.epoch())
    with Counted() as theirs:
        for batch in DataLoader(run.data, batch_size=8):
            plain(run.model, batch)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert ours.operations / count - theirs.operations / 7 < 125
