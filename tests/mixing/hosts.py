"""A host that trains on what a DomainSampler draws, and the way of a state through files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from onlinesel.mixing import DomainSampler
from tests.mixing.contract_table import Case

NUMBERS = (0.5, 1.0, 2.0, 1.5)
ROWS = 60
LABELS = [40, -7, 3, 11]
DATA = torch.tensor([LABELS[0 if i % 5 else 1 + i // 5 % 3] for i in range(ROWS)])
BATCH = 4


class Host:
    """Trains on batches that its loader draws ahead, and observes a loss made of row and step."""

    def __init__(self, case: Case, ahead: int, seed: int = 3, length: int = 52) -> None:
        self.sampler = DomainSampler(DATA, case.build(NUMBERS), seed=seed, length=length)
        self.ahead = ahead
        self.batches: list[list[int]] = []
        self.shares: list[Tensor] = []

    def train(self, epoch: int, first: int = 0, last: int | None = None) -> None:
        """Train the steps of an epoch from ``first`` to before ``last``."""
        self.sampler.epoch = epoch
        waiting: list[list[int]] = []
        loader = batched(iter(self.sampler))
        for step in range(len(self.sampler) // BATCH if last is None else last):
            waiting += islice(loader, 1 + self.ahead - len(waiting))
            batch = waiting.pop(0)
            if step < first:
                continue
            self.batches.append(batch)
            self.shares.append(self.sampler.proportions)
            ids, generator = torch.tensor(batch), torch.Generator().manual_seed(epoch * 99 + step)
            loss = 1 + ids % 5 + torch.rand(BATCH, generator=generator)
            self.sampler.observe(ids, loss, reference_loss=loss - ids % 2)


def batched(rows: Iterator[int]) -> Iterator[list[int]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def travel(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state as JSON and safetensors, and read it back."""
    plain = json.loads(json.dumps({k: v for k, v in state.items() if k != "tensors"}))
    return {**plain, "tensors": load(save(state["tensors"]))}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors, others = a["tensors"], b["tensors"]
    return (
        {k: v for k, v in a.items() if k != "tensors"}
        == {k: v for k, v in b.items() if k != "tensors"}
        and tensors.keys() == others.keys()
        and all(torch.equal(value, others[name]) for name, value in tensors.items())
    )
