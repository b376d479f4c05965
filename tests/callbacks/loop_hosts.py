"""Loops of one's own around the tiny models of `hosts`, and what they trained."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

import onlinesel
from onlinesel.callbacks.loop import Steps
from tests.callbacks.hosts import LEARNING_RATE, collate, make_model, make_rows, parameters


def make_loader(batch_size: int = 2, rows: Any = None, **options: Any) -> DataLoader[Any]:
    options = {"shuffle": True, **options}
    dataset = make_rows() if rows is None else rows
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, **options)


def token_losses(model: Any, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return onlinesel.token_losses(logits, batch["labels"])


def train(
    steps: Steps, model: Any, optimizer: Any, stop: int | None = None
) -> list[dict[str, Any]]:
    """Train until the epoch or `stop` ends; returns ids, weights and loss of every step."""
    done = []
    for step in steps:
        for micro in step:
            micro.loss(token_losses(model, micro.batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        done.append(
            {
                "ids": [micro.ids.tolist() for micro in step],
                "weights": [micro.weights.tolist() for micro in step],
                "loss": step.mean_loss(),
            }
        )
        if stop is not None and steps.step + 1 >= stop:
            break
    return done


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def kept(step: dict[str, Any]) -> dict[int, float]:
    """Return the weight of every row that trained in a step."""
    pairs = zip(sum(step["ids"], []), sum(step["weights"], []), strict=True)
    return {i: w for i, w in pairs if w > 0}


__all__ = ["kept", "make_loader", "make_model", "parameters", "sgd", "token_losses", "train"]
