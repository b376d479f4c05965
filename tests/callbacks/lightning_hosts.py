"""Tiny LightningModules and trainers, what they trained, and the naive reference for a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

import onlinesel
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.step import StepPlan, StepPlanner
from tests.callbacks.hosts import LEARNING_RATE, collate, make_model, make_rows

CLASSES = 4

# Lightning advises about workers and logging intervals.
QUIET_LIGHTNING = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


def classified(count: int = 48, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=g)
    labels = torch.randint(CLASSES, (count,), generator=g).tolist()
    return list(zip(inputs, labels, strict=True))


class Streamed(IterableDataset):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class Batches:
    """An iterable of batches that claims a length."""

    def __init__(self, batches: Any, length: int) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return self.length


class Classifier(LightningModule):
    """A linear classifier of ``(inputs, labels)``; keeps what its steps were given."""

    def __init__(self, weighs: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, CLASSES)
        self.weighs = weighs
        self.batches: list[Any] = []
        self.validated: list[float] = []

    def forward(self, inputs: Any) -> Any:
        return self.net(inputs)

    def losses(self, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        return cross_entropy(self(inputs), labels, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        losses = self.losses(batch)
        return onlinesel.weighted_mean(losses) if self.weighs else losses.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = onlinesel.weighted_mean(self.losses(batch))
        self.log("val_loss", loss)
        self.validated.append(float(loss))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class Manual(Classifier):
    """Optimizes by itself, after every so many batches."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(onlinesel.weighted_mean(self.losses(batch)))
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


class SaveAt(Callback):
    """Save at the end of a batch, before any other callback has heard of it; then stop there."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


class Language(LightningModule):
    """A tiny Llama under the name `model`."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.model = make_model(**config)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return onlinesel.weighted_mean(onlinesel.token_losses(logits, batch["labels"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def make_trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    values = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}
    return Trainer(callbacks=list(callbacks), **values)


def selection(strategy: Any, **options: Any) -> OnlineSelection:
    """A selection for classifiers."""
    return OnlineSelection(strategy, **{"score": onlinesel.ClassificationScorer(), **options})


def loader(rows: Any = None, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(classified() if rows is None else rows, batch_size=batch_size, **options)


def text_loader(rows: Any = None, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    rows = make_rows() if rows is None else rows
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate, **options)


@contextmanager
def planned() -> Iterator[list[StepPlan]]:
    """Collect the plans of the steps that are decided meanwhile."""
    found: list[StepPlan] = []
    original = StepPlanner.plan

    def plan(*args: Any, **kwargs: Any) -> StepPlan:
        found.append(original(*args, **kwargs))
        return found[-1]

    StepPlanner.plan = plan  # type: ignore[method-assign]
    try:
        yield found
    finally:
        StepPlanner.plan = original  # type: ignore[method-assign]


def kept(plan: StepPlan) -> dict[int, float]:
    """Return the weight of every row that trains in a step."""
    pairs = zip(torch.cat(plan.ids).tolist(), torch.cat(plan.weights).tolist(), strict=True)
    return {i: w for i, w in pairs if w > 0}


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def row_losses(module: Classifier, rows: Any, ids: Any) -> torch.Tensor:
    """Return the losses of rows, one by one."""
    singles = [(rows[i][0][None], torch.tensor([rows[i][1]])) for i in ids]
    return torch.cat([module.losses(single) for single in singles])


def naive_steps(rows: Any, steps: list[dict[int, float]]) -> dict[str, torch.Tensor]:
    """Return what a fresh classifier becomes by gradient steps on weighted means of rows."""
    module = Classifier()
    for weights in steps:
        total = torch.tensor(list(weights.values()))
        loss = (row_losses(module, rows, weights) * total).sum() / total.sum()
        gradient = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, part in zip(module.parameters(), gradient, strict=True):
                parameter -= LEARNING_RATE * part
    return state_of(module)


def naive_top(rows: Any, windows: list[range], share: int) -> list[dict[int, float]]:
    """Return the rows of highest loss in each window, by a hand-written loop of its own."""
    module, steps = Classifier(), []
    for window in windows:
        module.load_state_dict(naive_steps(rows, steps))
        losses = row_losses(module, rows, window).tolist()
        best = sorted(window, key=lambda i: -losses[i - window.start])
        steps.append(dict.fromkeys(best[: -(-len(window) // share)], 1.0))
    return steps


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[k], other[k], rtol=1e-5, atol=1e-7) for k in one)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
