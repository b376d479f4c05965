"""Run by torchrun on two processes: one step of each scenario; what trained goes to JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onlinesel import Selection, Signals, Strategy
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.kernels._shards import gathered, whole
from onlinesel.scoring import CausalLMScorer
from onlinesel.strategies import InfoBatch, LossReweight, TopLoss, Uniform
from tests.callbacks.costs import uniform_run
from tests.callbacks.hosts import (
    attach,
    make_model,
    make_rows,
    make_sft_trainer,
    make_trainer,
)
from tests.launching import begin, leave


@dataclass(frozen=True)
class KeepIds(Strategy):
    """Keep the rows of a list, whatever `keep` asks for."""

    wanted: tuple[int, ...] = ()

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(torch.isin(signals.row_ids(), torch.tensor(self.wanted)).float()), state


@dataclass(frozen=True)
class Disagree(Strategy):
    """Decides by rank, as a processor of another make might."""

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        return Selection(torch.ones(signals.size) + dist.get_rank()), state


def poisoned(bad_rank: int | None) -> Any:
    """Return a scorer whose losses are nan on one rank (on all for None)."""
    scorer = CausalLMScorer(("loss",))

    def score(model: Any, batch: Any) -> Signals:
        signals = scorer(model, batch)
        if bad_rank is None or dist.get_rank() == bad_rank:
            return Signals(loss=torch.full_like(signals.loss, float("nan")), tokens=signals.tokens)
        return signals

    return score


def scenarios() -> dict[str, dict[str, Any]]:
    subset = {"strategy": TopLoss(), "candidates": 3}
    weights = {"strategy": LossReweight(min_rows=2)}
    accumulate = {"trainer": {"gradient_accumulation_steps": 3}}
    return {
        "subset": subset,
        "subset-accumulate": {**subset, **accumulate},
        "subset-samples": {**subset, "normalize": "samples"},
        "subset-sft": {**subset, **accumulate, "host": make_sft_trainer},
        "subset-lora": {**subset, "lora": True},
        "subset-rank": {**subset, **accumulate, "scope": "rank"},
        "subset-batch": {**subset, **accumulate, "scope": "batch"},
        "subset-local-count": {**subset, "trainer": {"average_tokens_across_devices": False}},
        "weights": weights,
        "weights-accumulate": {**weights, **accumulate},
        "weights-tokens-sft": {**weights, "normalize": "tokens", "host": make_sft_trainer},
        "weights-rank": {**weights, "scope": "rank"},
        "observing": {"strategy": InfoBatch(), **accumulate},
        "one-rank-empty": {"strategy": KeepIds((44,)), **accumulate, "candidates": 2},
        "nothing-kept": {"strategy": KeepIds(()), "candidates": 2},
        "one-rank-nan": {**subset, "score": poisoned(1)},
        "all-nan": {**subset, "score": poisoned(None)},
        "uniform": {"strategy": Uniform()},
    }


def run(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """Train a step; what trained and the weights before and after go to files."""
    host, shard = options.pop("host", make_trainer), options.pop("shard", None)
    model = make_model(lora=options.pop("lora", False))
    torch.save(model.state_dict(), folder / f"{name}-before.pt")
    model = model if shard is None else shard(model)
    trainer = host(folder, model=model, **options.pop("trainer", {}))
    callback: OnlineSelection = attach(trainer, options.pop("strategy"), **options)
    planned: dict[str, Any] = {}
    build = callback._plan

    def spying(device: Any) -> Any:
        planner = build(device)
        original = type(planner).plan

        def plan(*args: Any, **kwargs: Any) -> Any:
            result = original(planner, *args, **kwargs)
            planned.update(
                ids=[i.tolist() for i in result.ids],
                weights=[w.tolist() for w in result.weights],
                normalize=result.normalize,
                denominator=float(result.denominator),
            )
            return result

        planner.plan = plan
        return planner

    callback._plan = spying  # type: ignore[method-assign]
    trainer.train()
    planned["loss"] = trainer.state.log_history[0]["loss"]
    rank = dist.get_rank()
    (folder / f"{name}-{rank}.json").write_text(json.dumps(planned))
    with gathered(model):
        after = {name: whole(value) for name, value in model.state_dict().items()}
        torch.save(after, folder / f"{name}-after-{rank}.pt")
    return trainer


def plain(folder: Path) -> None:
    """The run that `uniform` must equal."""
    trainer = make_trainer(folder)
    trainer.train()
    torch.save(trainer.model.state_dict(), folder / f"plain-after-{dist.get_rank()}.pt")


def disagree(folder: Path) -> None:
    """Every rank must hear of it, and none may wait for another."""
    trainer = make_trainer(folder)
    attach(trainer, Disagree())
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"disagree-{dist.get_rank()}.txt").write_text(str(error))


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seed": ({}, {"seed": 1}),
    "strategy": ({"strategy": TopLoss()}, {"strategy": TopLoss(lowest=True)}),
    "candidates": ({"candidates": 2}, {"candidates": 3}),
    "candidates of which one is wrong": ({"candidates": 2}, {"candidates": 0}),
    "scope": ({}, {"scope": "rank"}),
    "normalize": ({"normalize": "tokens"}, {"normalize": "samples"}),
    "ids": ({}, {"ids": "hash"}),
    "train_dataset": ({}, {"rows": make_rows(40)}),
    "nothing": ({"strategy": Uniform()}, {"strategy": Uniform()}),
}
"""What the two ranks are given."""


def different(folder: Path) -> None:
    """Ranks that were set up differently hear of it when the callback is made, and go on."""
    heard = {}
    for name, both in DIFFERENT.items():
        options = dict(both[dist.get_rank()])
        rows = options.pop("rows", None)
        trainer = make_trainer(folder, rows=rows)
        before = dict(trainer.__dict__)
        try:
            OnlineSelection(trainer, options.pop("strategy", TopLoss()), **options)
        except ValueError as error:
            heard[name] = str(error)
            assert trainer.__dict__ == before
    (folder / f"different-{dist.get_rank()}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    begin()
    out = Path(sys.argv[1])
    plain(out)
    disagree(out)
    different(out)
    (out / f"cost-{dist.get_rank()}.json").write_text(json.dumps(uniform_run(out)))
    for scenario, values in scenarios().items():
        run(out, scenario, values)
    leave()
