"""One name for one thing in every host."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.callbacks.loop import Steps
from onlinesel.strategies import TopLoss
from tests.callbacks.hosts import make_trainer

lightning = pytest.importorskip("onlinesel.callbacks.lightning")

HOSTS = {
    "OnlineSelection": OnlineSelection, "LightningSelection": lightning.LightningSelection,
    "steps": Steps,
}  # fmt: skip
OWN = {  # of one host, and refused by name in the others
    "OnlineSelection": {"mixture", "shadow", "record_text"},
    "LightningSelection": {"order", "accumulate"},
    "steps": {"order", "accumulate", "gradient_factor"},
}  # fmt: skip


def lengths(model: Any, batch: Any) -> torch.Tensor:
    return batch["labels"].ne(-100).sum(1).float()


def call(host: str, tmp_path: Path, **options: Any) -> Any:
    before: tuple[Any, ...] = (TopLoss(),)
    if host == "OnlineSelection":
        before = (make_trainer(tmp_path), TopLoss())
    if host == "steps":
        before = ([{"x": torch.ones(2)}], torch.nn.Linear(1, 1), TopLoss())
    return HOSTS[host](*before, candidates=2, **options)


def test_the_hosts_have_the_same_arguments() -> None:
    named = {
        host: {n for n, p in inspect.signature(kind).parameters.items() if p.kind == p.KEYWORD_ONLY}
        for host, kind in HOSTS.items()
    }
    shared = set.intersection(*named.values())
    assert {host: names - shared for host, names in named.items()} == OWN
    assert "score" in shared and "scorer" not in set.union(*named.values())


@pytest.mark.parametrize("host", HOSTS)
def test_what_other_hosts_have_is_refused_by_name(host: str, tmp_path: Path) -> None:
    others = set.union(*OWN.values()) - OWN[host] - {"gradient_factor"}
    for name in sorted(others):
        with pytest.raises(ValueError, match=f"{host}: {name} must be left out, got 'x'. [A-Zg]"):
            call(host, tmp_path, **{name: "x"})


def test_the_old_name_warns_and_works(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="OnlineSelection: scorer is called score now; the"):
        old = call("OnlineSelection", tmp_path, scorer=lengths)
    assert old._scorer is lengths
    with pytest.raises(ValueError, match="OnlineSelection: score must be given once, got scorer"):
        call("OnlineSelection", tmp_path, scorer=lengths, score=lengths)


def test_losses_of_rows_are_a_score_in_the_trainer_too(tmp_path: Path) -> None:
    trainer, given = make_trainer(tmp_path), []

    def score(model: Any, batch: Any) -> torch.Tensor:
        given.append(lengths(model, batch))
        return given[-1]

    trainer.add_callback(OnlineSelection(trainer, TopLoss(), candidates=2, score=score))
    trainer.train()
    found = trainer.state.log_history[0]["selection/score_kept"]
    assert found == pytest.approx(float(torch.cat(given).topk(2).values.mean()))


def test_the_first_name_of_lightnings_callback_stays() -> None:
    assert lightning.OnlineSelection is lightning.LightningSelection


def test_what_a_method_of_ones_own_needs_is_at_the_door() -> None:
    for name in ("top_rows", "draw_rows", "uniform_draws", "Selection", "Signals", "State"):
        assert name in onlinesel.__all__ and hasattr(onlinesel, name)
