"""Choose rows in a loop of your own, on one process or on several.

    python examples/plain_loop.py
    torchrun --nproc_per_node 2 examples/plain_loop.py

A small network learns in which quadrant points lie, from labels of which a third are wrong. After
a warm-up, training on the smaller half of the losses leaves most of the wrong ones out.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import onlinesel
from onlinesel import ClassificationScorer, Strategy, When
from onlinesel.strategies import TopLoss, Uniform


def make_points(rows: int, wrong: float, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Return points and the quadrants that they are said to lie in."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows, 2, generator=generator)
    labels = (points[:, 0] > 0).long() * 2 + (points[:, 1] > 0).long()
    noise = torch.rand(rows, generator=generator) < wrong
    return list(zip(points, ((labels + noise) % 4).tolist(), strict=True))


def train(method: Strategy) -> float:
    """Train one epoch; returns the accuracy on points with the right labels."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
    core = model = torch.nn.Sequential(*layers)
    if dist.is_initialized():
        model = DistributedDataParallel(core)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(make_points(8192, wrong=1 / 3, seed=0), batch_size=16, shuffle=True)
    options = {"candidates": 2, "accumulate": 2, "score": ClassificationScorer()}
    for step in onlinesel.steps(loader, model, method, **options):
        for micro in step:
            points, labels = micro.batch
            micro.loss(cross_entropy(model(points), labels, reduction="none")).backward()
        optimizer.step()
        optimizer.zero_grad()
    points, labels = next(iter(DataLoader(make_points(4000, wrong=0.0, seed=1), batch_size=4000)))
    return (core(points).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    small = When(TopLoss(lowest=True), start=32, otherwise=Uniform())
    print(f"accuracy: uniform {train(Uniform()):.3f}, small losses {train(small):.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()
