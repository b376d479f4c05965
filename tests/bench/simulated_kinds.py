"""What the simulated device tells of each operation, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from onlinesel.bench._simulated import simulation
from onlinesel.bench._waits import HostWaits

SIMULATES = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

Call = Callable[[Tensor, torch.device], Any]


def fill_by_mask(x: Tensor, _: torch.device) -> None:
    x[x > 1] = 0


def put_by_mask(x: Tensor, _: torch.device) -> None:
    x[x > 1] = x[0]


WAITING: dict[str, tuple[Call, list[str]]] = {
    "item": (lambda x, _: x[0].item(), ["item"]),
    "bool": (lambda x, _: bool(x[0] > 0), ["item"]),
    "int": (lambda x, _: int(x[0]), ["item"]),
    "float": (lambda x, _: float(x[0]), ["item"]),
    "tolist": (lambda x, _: x.tolist(), ["copy to the host"]),
    "cpu": (lambda x, _: x.cpu(), ["copy to the host"]),
    "numpy": (lambda x, _: x.cpu().numpy(), ["copy to the host"]),
    "to cpu": (lambda x, _: x.to("cpu"), ["copy to the host"]),
    "copy_ to cpu": (lambda x, _: torch.empty(3).copy_(x), ["copy to the host"]),
    "nonzero": (lambda x, _: x.nonzero(), ["nonzero"]),
    "where of one": (lambda x, _: torch.where(x > 1), ["nonzero"]),
    "masked_select": (lambda x, _: x.masked_select(x > 1), ["masked_select"]),
    "index by a mask": (lambda x, _: x[x > 1], ["index by a mask"]),
    "put by a mask": (put_by_mask, ["index by a mask"]),
    "unique": (lambda x, _: x.unique(), ["unique"]),
    "unique_consecutive": (lambda x, _: x.unique_consecutive(), ["unique"]),
    "repeat_interleave": (lambda x, _: x.repeat_interleave(x.long()), ["repeat_interleave"]),
    "equal": (lambda x, _: torch.equal(x, x), ["equal"]),
    "allclose": (lambda x, _: torch.allclose(x, x), ["equal"]),
    "in": (lambda x, _: 1.0 in x, ["item"]),
    "bincount": (lambda x, _: x.long().bincount(), ["bincount"]),
    "cholesky": (lambda x, _: torch.linalg.cholesky(x.diag() + 1), ["linalg check"]),
    "index by a list": (lambda x, _: x[[0, 2]], ["copy to the device"]),
    "index by numbers of the host": (
        lambda x, _: x[torch.tensor([0, 2])], ["copy to the device"],
    ),
    "to": (lambda _, d: torch.ones(3).to(d), ["copy to the device"]),
    "tensor": (lambda _, d: torch.tensor([1, 2], device=d), ["copy to the device"]),
    "non_blocking from pageable memory": (
        lambda _, d: torch.ones(3).to(d, non_blocking=True), ["copy to the device"],
    ),
    "blocking from pinned memory": (
        lambda _, d: torch.ones(3).pin_memory().to(d), ["copy to the device"],
    ),
}  # fmt: skip

GOING_ON: dict[str, Call] = {
    "arithmetic": lambda x, _: (x * 2 + 1).softmax(0).sort(),
    "made there": lambda _, d: torch.zeros(3, device=d) + torch.arange(3, device=d),
    "index by numbers of the device": lambda x, _: x[x.long().clamp(max=2)],
    "slice": lambda x, _: x[1:],
    "fill by a mask": fill_by_mask,
    "masked_fill and where": lambda x, _: torch.where(x > 1, x, 0.0).masked_fill(x > 2, 1.0),
    "repeat_interleave of a known size": lambda x, _: x.repeat_interleave(
        torch.ones_like(x, dtype=torch.int64), output_size=3
    ),
    "cholesky_ex": lambda x, _: torch.linalg.cholesky_ex(x.diag() + 1),
    "pinned and non_blocking": lambda _, d: torch.ones(3).pin_memory().to(d, non_blocking=True),
    "to where it is": lambda x, d: x.to(d).to(torch.float64),
    "a number of the host": lambda x, _: x / torch.tensor(2.0),
    "a loss and its gradient": lambda x, _: x.clone().requires_grad_().square().sum().backward(),
    "shape": lambda x, _: (x.shape, x.numel(), x.device),
    "nothing to copy": lambda x, _: x[:0].cpu(),
}


def recorded() -> dict[str, list[str]]:
    """Return the kinds of the waits of each operation, by its name."""
    found = {}
    calls = {name: call for name, (call, _) in WAITING.items()} | GOING_ON
    with simulation() as device:
        for name, call in calls.items():
            given = torch.tensor([1.0, 2.0, 3.0]).to(device)
            with HostWaits(device) as seen:
                call(given, device)
            assert all(wait.line.startswith(f"{__name__}:") for wait in seen.waits), seen.waits
            found[name] = [wait.kind for wait in seen.waits]
    return found


def trained() -> list[Any]:
    """Return weights after two steps of AdamW on the host and on the device, and mixed use."""
    results: list[Any] = []
    with simulation() as device:
        for place in (torch.device("cpu"), device):
            torch.manual_seed(0)
            with place:
                model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
                rows = torch.tensor([[0, 1, 2], [3, 4, 0]])
            model.load_state_dict({k: torch.linspace(-1, 1, v.numel()).view(v.shape).to(place)
                                   for k, v in model.state_dict().items()})  # fmt: skip
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(2):
                logits = model(rows).flatten(0, 1)
                torch.nn.functional.cross_entropy(logits, rows.flatten()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.detach().cpu().tolist() for p in model.parameters()])
        try:
            torch.ones(3) + torch.ones(3, device=device)
        except RuntimeError as error:
            results.append(str(error))
    return results
