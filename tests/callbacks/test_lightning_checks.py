"""What cannot be exact in Lightning is refused before the first step, with a remedy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.callbacks.loop import steps
from onlinesel.strategies import UDS, RHOLoss, TopLoss, Uniform
from tests.callbacks.hosts import collate, make_model, make_rows
from tests.callbacks.lightning_hosts import (
    QUIET_LIGHTNING,
    Classifier,
    Language,
    Manual,
    Streamed,
    classified,
    loader,
    make_trainer,
    planned,
    selection,
    text_loader,
)

pytestmark = QUIET_LIGHTNING


class Fetching(Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(*next(dataloader_iter)[:2])


class Two(Language):
    """A policy and a reference: which of them is to be scored?"""

    def __init__(self) -> None:
        super().__init__()
        self.reference = make_model()


def refused(
    message: str, callback: Any, module: Any = None, batches: Any = None, **options: Any
) -> None:
    module = Classifier() if module is None else module
    names = set(vars(module)) | {"_hparams"}
    with (
        planned() as plans,
        pytest.raises(ValueError, match=f"^(LightningSelection|CandidateLoader): {message}"),
    ):
        make_trainer(callback, **options).fit(module, loader() if batches is None else batches)
    assert plans == [] and not set(vars(module)) - names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 0}, "candidates must be an integer >= 1, got 0"),
        ({"scope": "node"}, "scope must be one of global, rank, batch, got 'node'"),
        ({"normalize": "mean"}, "normalize must be 'tokens', 'samples', 'rows' or None, got 'm"),
    ],
)
def test_arguments_are_checked_when_it_is_made(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"LightningSelection: {message}"):
        OnlineSelection(TopLoss(), **arguments)


def test_a_class_is_no_strategy() -> None:
    with pytest.raises(TypeError, match="strategy must be a Strategy instance"):
        OnlineSelection(TopLoss)  # type: ignore[arg-type]


def test_settings_of_the_run() -> None:
    ready = selection(TopLoss())
    refused("reload_dataloaders_every_n_epochs must be 0, got 1", ready,
            reload_dataloaders_every_n_epochs=1)  # fmt: skip
    refused("accumulate must be None with automatic optimization, got 2",
            selection(TopLoss(), accumulate=2))  # fmt: skip
    refused("accumulate must be an integer >= 1, got 0",
            selection(TopLoss(), accumulate=0), Manual())  # fmt: skip
    refused("overfit_batches must be 0 for a loader that shuffles, got 2", ready,
            batches=loader(shuffle=True), overfit_batches=2)  # fmt: skip
    with pytest.warns(UserWarning, match="dataloader_iter"):
        refused("training_step must be one that takes a batch, got dataloader_iter", ready,
                Fetching())  # fmt: skip


def test_a_loader_in_order_may_be_overfitted() -> None:
    with planned() as plans:
        make_trainer(selection(Uniform()), overfit_batches=2, max_epochs=2).fit(
            Classifier(), loader()
        )
    assert [plan.ids[0].tolist() for plan in plans] == [[0, 1], [2, 3]] * 2


@pytest.mark.parametrize(
    ("several", "name"),
    [
        (lambda: {"a": loader(), "b": loader()}, "dict"),
        (lambda: [loader(), loader()], "list"),
        (lambda: CombinedLoader([loader()], "min_size"), "CombinedLoader"),
    ],
)
def test_several_loaders(several: Any, name: str) -> None:
    refused(f"train_dataloader must be one loader, got {name}", selection(TopLoss()),
            batches=several())  # fmt: skip


def test_a_method_that_only_drops_asks_for_candidates() -> None:
    refused("candidates must be at least 2 for TopLoss, which only drops", selection(TopLoss()))
    with pytest.raises(ValueError, match="steps: candidates must be at least 2 for TopLoss, which"):
        steps(loader(), torch.nn.Linear(6, 4), TopLoss(), score=lambda *_: torch.ones(2))


def test_models_without_a_scorer() -> None:
    refused(
        "score must be given for a model that is no causal language model, got None with "
        "Classifier. TopLoss needs loss: pass score=",
        OnlineSelection(TopLoss()),
    )
    refused("score must be given .* got None with Two", OnlineSelection(UDS()), Two(),
            text_loader())  # fmt: skip
    refused("reference must be a model or 'adapter', got None", OnlineSelection(RHOLoss()),
            Language(), text_loader())  # fmt: skip
    make_trainer(OnlineSelection(Uniform()), max_steps=1).fit(Classifier(), loader())


def test_batches_that_the_default_scorer_cannot_read() -> None:
    def pairs(features: Any) -> Any:
        batch = collate(features)
        return batch["input_ids"], batch["labels"]

    batches = loader(make_rows(), collate_fn=pairs)
    refused("score must be given for a batch without 'input_ids' and 'labels' of one shape, got "
            "None with 0, 1", selection(TopLoss(), candidates=2, score=None), Language(),
            batches)  # fmt: skip


def test_rows_that_cannot_be_told_apart() -> None:
    def named(features: Any) -> Any:
        return {"x": torch.stack([x for x, _ in features]), "names": {"a", "b"}}

    refused("'names' must be a tensor, an array or a list with one entry per row",
            selection(Uniform()), batches=loader(classified(), collate_fn=named))  # fmt: skip


def test_windows_that_change_under_way() -> None:
    """Without a length the first window is read before the schedule has spoken."""
    with pytest.raises(ValueError, match="accumulate_grad_batches must be the same .* got 2 after"):
        make_trainer(selection(Uniform()), GradientAccumulationScheduler({0: 2})).fit(
            Classifier(), loader(Streamed(classified()))
        )


def test_two_of_them_in_one_trainer() -> None:
    with pytest.raises(RuntimeError, match="Found more than one stateful callback"):
        make_trainer(selection(Uniform()), selection(Uniform()))


def test_losses_of_another_shape() -> None:
    class Summed(Classifier):
        def losses(self, batch: Any) -> torch.Tensor:
            return super().losses(batch).sum()[None]

    with pytest.raises(ValueError, match=r"weighted_mean: losses must be one per row \(2,\)"):
        make_trainer(selection(TopLoss(), candidates=2)).fit(Summed(), loader())


def test_lightning_may_be_missing() -> None:
    code = "import sys\nsys.modules['lightning'] = None\nimport onlinesel.callbacks.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: onlinesel.callbacks.lightning needs lightning: pip install "
        '"onlinesel[lightning]".'
    )
