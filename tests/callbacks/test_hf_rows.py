"""What belongs to a row reaches the loss with it in every host, whatever its collator makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import onlinesel
from onlinesel.callbacks.lightning import OnlineSelection as LightningSelection
from onlinesel.strategies import TopLoss, Uniform
from tests.callbacks.hosts import (
    arguments,
    attach,
    collate,
    make_model,
    make_rows,
    make_trainer,
)
from tests.callbacks.lightning_hosts import QUIET_LIGHTNING, Classifier
from tests.callbacks.lightning_hosts import make_trainer as make_lightning

ROWS = make_rows()
SCORE = onlinesel.ClassificationScorer()


def weight_of(tokens: Any) -> float:
    """A weight that follows from the row's own tokens, so that a wrong pair shows."""
    return 1.0 + sum(t for t in tokens if t) % 7


def as_lists(weights: list[float]) -> dict[str, Any]:
    return {"weight": weights, "text": [f"w {w}" for w in weights]}


def as_array(weights: list[float]) -> dict[str, Any]:
    return {"weight": np.array(weights), "table": np.array([[w] * 13 for w in weights])}


def nested(weights: list[float]) -> dict[str, Any]:
    return {
        "meta": {"weight": [torch.tensor(w) for w in weights], "dicts": [{"w": w} for w in weights]}
    }


KINDS = {"lists": as_lists, "array": as_array, "nested": nested}


def weights_in(batch: Any) -> list[float]:
    found = batch["weight"] if "weight" in batch else batch["meta"]["weight"]
    return [float(w) for w in found]


def weighing_collator(kind: str) -> Any:
    def collator(features: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(features)
        return batch | KINDS[kind]([weight_of(f["input_ids"]) for f in features])

    return collator


class Weighing(Trainer):
    """Multiplies each row's loss by the weight that came with it."""

    paired: list[bool]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = weights_in(inputs)
        tokens = inputs["input_ids"].tolist()
        self.paired += [w == weight_of(t) for w, t in zip(weights, tokens, strict=True)]
        for name in ("weight", "meta", "text", "table"):
            inputs.pop(name, None)
        labels = inputs.pop("labels")
        losses = onlinesel.token_losses(model(**inputs).logits, labels)
        return (losses * torch.tensor(weights)[:, None]).sum() / num_items_in_batch


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_weight_of_ones_own_stays_with_its_row(
    tmp_path: Path, kind: str, accumulate: int
) -> None:
    changes = {"gradient_accumulation_steps": accumulate, "remove_unused_columns": False}
    trainer = Weighing(
        make_model(), TrainingArguments(**arguments(tmp_path, **changes, max_steps=2)),
        train_dataset=ROWS, data_collator=weighing_collator(kind),
    )  # fmt: skip
    trainer.paired = []
    attach(trainer, TopLoss(), candidates=4)
    trainer.train()
    assert len(trainer.paired) >= 2 * 2 * accumulate and all(trainer.paired)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_in_a_plain_loop(kind: str) -> None:
    model, paired = make_model(), []
    loader: DataLoader[Any] = DataLoader(
        ROWS, batch_size=2, shuffle=True, collate_fn=weighing_collator(kind)
    )
    for step in onlinesel.steps(loader, model, TopLoss(), candidates=4, accumulate=2):
        for micro in step:
            weights, tokens = weights_in(micro.batch), micro.batch["input_ids"]
            paired += [w == weight_of(t) for w, t in zip(weights, tokens.tolist(), strict=True)]
            logits = model(input_ids=tokens).logits
            micro.loss(onlinesel.token_losses(logits, micro.batch["labels"])).backward()
    assert len(paired) == 12 and all(paired)


class Named(Classifier):
    """A classifier whose rows have names."""

    def losses(self, batch: Any) -> Tensor:
        assert batch["name"] == [str(x.sum().item()) for x in batch["inputs"]]
        logits = self(batch["inputs"])
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.filterwarnings(*[mark.args[0] for mark in QUIET_LIGHTNING])
def test_in_lightning() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=g)
    rows = [{"inputs": x, "labels": i % 4, "name": str(x.sum().item())}
            for i, x in enumerate(inputs)]  # fmt: skip
    score = onlinesel.ClassificationScorer(lambda m, b: (m(b["inputs"]), b["labels"]))
    selection = LightningSelection(TopLoss(), candidates=2, score=score)
    module = Named()
    make_lightning(selection, accumulate_grad_batches=2).fit(
        module, DataLoader(rows, batch_size=4, shuffle=True)
    )
    assert selection.step == 2 and len(module.batches) == 4
    assert sum(len(batch["name"]) for batch in module.batches) == 16


def sorting(features: list[Any]) -> Any:
    """Longest rows first, as people sort for packed recurrent networks."""
    return collate(sorted(features, key=lambda f: -len(f["input_ids"])))


def test_a_collator_that_sorts_its_rows_is_refused(tmp_path: Path) -> None:
    """Ids belong to rows by their place, and would be those of other rows."""
    trainer = make_trainer(tmp_path, collator=sorting)
    attach(trainer, TopLoss(), candidates=4)
    with pytest.raises(ValueError, match="collator must keep the order of the rows, got 'input_i"):
        trainer.train()
    loader: DataLoader[Any] = DataLoader(ROWS, batch_size=4, collate_fn=sorting)
    with pytest.raises(ValueError, match="CandidateLoader: collator must keep the order"):
        next(iter(onlinesel.steps(loader, make_model(), TopLoss(), candidates=2)))
    pairs: DataLoader[Any] = DataLoader(
        [(torch.ones(2) * i, i) for i in range(8)], batch_size=4,
        collate_fn=lambda rows: (torch.stack([x for x, _ in rows]), torch.tensor([3, 2, 1, 0])),
    )  # fmt: skip
    with pytest.raises(ValueError, match="collator must keep the order of the rows, got '1'"):
        next(iter(onlinesel.steps(pairs, make_model(), Uniform(), score=SCORE)))
