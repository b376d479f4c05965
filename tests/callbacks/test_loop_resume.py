"""A plain loop that stops and goes on is the one that never stopped, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel import PerGroup, Strategy
from onlinesel.mixing import ODM, DomainSampler
from onlinesel.strategies import RS2, SelectiveBackprop, TopLoss
from tests.callbacks.loop_hosts import make_loader, make_model, train
from tests.strategies.contract_table import CASES


def cases() -> dict[str, tuple[Strategy, dict[str, Any]]]:
    """Every strategy of the contract table, and scopes and orders that carry a state."""
    found: dict[str, tuple[Strategy, dict[str, Any]]] = {}
    for name, case in CASES.items():
        options: dict[str, Any] = {"candidates": 2} if case.chooses else {}
        strategy = RS2(fraction=0.75) if name == "RS2" else case.build()
        if "reference_loss" in strategy.needs:
            options["reference"] = make_model()
        found[name] = (strategy, options)
    mixed = {"candidates": 2, "order": True}
    return found | {
        "batch": (SelectiveBackprop(), {"candidates": 2, "scope": "batch"}),
        "mixture": (SelectiveBackprop(), mixed),
        "mixture-quota": (PerGroup(TopLoss()), mixed),
        "foreign": (SelectiveBackprop(), {"candidates": 2, "foreign": True}),
    }


def start(name: str) -> tuple[Any, Any, Any]:
    strategy, options = cases()[name]
    options = dict(options)
    if options.pop("order", False):
        domains = torch.arange(48) % 3
        options["order"] = DomainSampler(domains, ODM(), seed=1)
    loader = make_loader()
    if options.pop("foreign", False):
        weights = torch.utils.data.WeightedRandomSampler([1.0] * 48, 48)
        loader = make_loader(shuffle=False, sampler=weights)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return onlinesel.steps(loader, model, strategy, accumulate=2, **options), model, optimizer


@pytest.mark.parametrize("name", sorted(cases()))
def test_resume_in_mid_epoch_is_bit_identical(tmp_path: Path, name: str) -> None:
    """Two epochs, stopped in the second after two of its steps."""
    torch.manual_seed(0)
    steps, model, optimizer = start(name)
    first = train(steps, model, optimizer)
    second = train(steps, model, optimizer)
    torch.manual_seed(0)
    steps, again, optimizer = start(name)
    assert train(steps, again, optimizer) == first
    stopped = train(steps, again, optimizer, stop=len(first) + 2)
    torch.save(
        {"steps": steps.state_dict(), "model": again.state_dict(), "opt": optimizer.state_dict()},
        tmp_path / "state.pt",
    )
    saved = torch.load(tmp_path / "state.pt")  # weights_only: plain values and tensors
    steps, resumed, optimizer = start(name)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["opt"])
    steps.load_state_dict(saved["steps"])
    assert steps.epoch == 1 and steps.step == len(first) + 2
    rest = train(steps, resumed, optimizer)
    assert stopped + rest == second and rest
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
