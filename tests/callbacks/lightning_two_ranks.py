"""Run by torchrun on two processes: Lightning under DDP and FSDP2; what trained goes to files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset

import onlinesel
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.strategies import UDS, InfoBatch, LossReweight, SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.lightning_hosts import (
    Classifier,
    Language,
    Manual,
    SaveAt,
    classified,
    loader,
    make_trainer,
    planned,
    text_loader,
)
from tests.callbacks.two_ranks import KeepIds

ROWS = 50


def failing(bad_rank: int | None) -> Any:
    """Return a score function whose losses are nan on one rank (on all for None)."""

    def score(module: Any, batch: Any) -> torch.Tensor:
        losses = module.losses(batch)
        bad = bad_rank is None or dist.get_rank() == bad_rank
        return torch.full_like(losses, torch.nan) if bad else losses

    return score


def scenarios() -> dict[str, dict[str, Any]]:
    """Whole epochs of classifiers; 50 rows fill no whole number of windows."""
    subset = {"strategy": TopLoss(), "candidates": 3}
    found: dict[str, dict[str, Any]] = {}
    for n in (1, 2):
        twice = {"trainer": {"accumulate_grad_batches": n}}
        found[f"subset-{n}"] = {**subset, **twice}
        found[f"weights-{n}"] = {"strategy": LossReweight(min_rows=2), **twice}
    return found | {
        "shuffled": {**subset, "shuffle": True},
        "observing": {"strategy": InfoBatch(), "trainer": {"accumulate_grad_batches": 2}},
        "manual": {**subset, "module": Manual},
        "rank": {**subset, "scope": "rank", "trainer": {"accumulate_grad_batches": 2}},
        "batch": {**subset, "scope": "batch", "trainer": {"accumulate_grad_batches": 2}},
        "one-rank-empty": {"strategy": KeepIds((3, 19, 40)), "candidates": 2},
        "nothing-kept": {"strategy": KeepIds(()), "candidates": 2},
        "one-rank-nan": {**subset, "score": failing(1)},
        "all-nan": {**subset, "score": failing(None)},
    }


def trainer_of(*callbacks: Any, **options: Any) -> Any:
    ddp = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    return make_trainer(*callbacks, **{**ddp, **options})


def whole(module: Any) -> dict[str, torch.Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in module.named_parameters()
    }


def fit(name: str, module: Any, batches: Any, callback: Any, *others: Any, **options: Any) -> Any:
    """Train; the ids and weights of each step and what came out go to a file of this rank."""
    start = options.pop("ckpt_path", None)
    trainer = trainer_of(*others, callback, **options)
    with planned() as plans:
        try:
            trainer.fit(module, batches, ckpt_path=start)
        except KeyError:
            assert others
    steps = [
        {
            "ids": [i.tolist() for i in plan.ids],
            "weights": [w.tolist() for w in plan.weights],
            "denominator": float(plan.denominator),
        }
        for plan in plans
    ]
    content = {"steps": steps, "state": whole(module), "global_step": trainer.global_step}
    torch.save(content, FOLDER / f"{name}-{dist.get_rank()}.pt")
    return trainer


def run(name: str, options: dict[str, Any]) -> None:
    module = options.pop("module", Classifier)()
    batches = loader(classified(ROWS), shuffle=options.pop("shuffle", False))
    trainer = options.pop("trainer", {})
    options.setdefault("score", onlinesel.ClassificationScorer())
    fit(name, module, batches, OnlineSelection(options.pop("strategy"), **options), **trainer)


def fsdp2(tensors: int = 1) -> Any:
    return ModelParallelStrategy(
        data_parallel_size=2 // tensors, tensor_parallel_size=tensors, process_group_backend="gloo"
    )


def languages() -> None:
    """One step of a language model under each engine."""

    class Sharded(Language):
        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    for name, strategy in (("top", TopLoss()), ("uds", UDS()), ("weights", LossReweight())):
        for engine, make in (("ddp", Language), ("fsdp2", Sharded)):
            module = make()
            callback = OnlineSelection(strategy, candidates=1 if name == "weights" else 2)
            options = {"strategy": fsdp2()} if engine == "fsdp2" else {}
            options |= {"accumulate_grad_batches": 2, "max_steps": 1}
            fit(f"{engine}-{name}", module, text_loader(), callback, **options)
            sharded = [isinstance(p, DTensor) for p in module.parameters()]
            assert all(sharded) if engine == "fsdp2" else not any(sharded)


class Uneven(IterableDataset):
    """A stream that is longer on rank 0."""

    def __iter__(self) -> Any:
        return iter(classified()[: 10 if dist.get_rank() == 0 else 5])


class Shard(torch.utils.data.Sampler[int]):
    """Every second row."""

    def __iter__(self) -> Any:
        return iter(range(dist.get_rank(), 12, 2))

    def __len__(self) -> int:
        return 6


def loaders() -> None:
    """Loaders that are left as they are, and those that cannot be."""
    top = {"candidates": 2, "score": onlinesel.ClassificationScorer()}
    fit("uneven", Classifier(), loader(Uneven()), OnlineSelection(TopLoss(), **top))
    sharded, alone = loader(sampler=Shard()), {"use_distributed_sampler": False}
    fit("sampler", Classifier(), sharded, OnlineSelection(TopLoss(), **top), **alone)
    for name, batches, seed, options in (
        ("custom", sharded, 0, {}),
        ("unsharded", loader(), 0, alone),
        ("seeds", loader(), dist.get_rank(), {}),
        ("tensors", loader(), 0, {"strategy": fsdp2(tensors=2)}),
    ):
        try:
            callback = OnlineSelection(TopLoss(), seed=seed, **top)
            trainer_of(callback, **options).fit(Classifier(), batches)
        except ValueError as error:
            (FOLDER / f"{name}-{dist.get_rank()}.txt").write_text(str(error))


def resuming() -> None:
    """Runs that stop and go on: on as many ranks, and on more than there were."""

    def callback(scope: str = "global") -> Any:
        score = onlinesel.ClassificationScorer()
        return OnlineSelection(SelectiveBackprop(), candidates=2, scope=scope, score=score)

    def batches() -> Any:
        return loader(classified(ROWS), shuffle=True)

    twice = {"accumulate_grad_batches": 2, "max_epochs": 2}
    for scope in ("global", "rank"):
        path = FOLDER / f"{scope}.ckpt"
        fit(f"{scope}-whole", Classifier(), batches(), callback(scope), **twice)
        fit(f"{scope}-before", Classifier(), batches(), callback(scope), SaveAt(path, 4), **twice)
        dist.barrier()
        fit(f"{scope}-after", Classifier(), batches(), callback(scope), **twice, ckpt_path=path)
    score = onlinesel.ClassificationScorer()
    for name, stop in (("middle", 6), ("end", 13)):  # one process goes on from there
        saving = SaveAt(FOLDER / f"two-{name}.ckpt", stop)
        uniform = OnlineSelection(Uniform(), score=score)
        fit(f"two-{name}-before", Classifier(), batches(), uniform, saving, **twice)
    for name in ("middle", "odd"):
        start, uniform = FOLDER / f"one-{name}.ckpt", OnlineSelection(Uniform(), score=score)
        fit(f"one-{name}-after", Classifier(), batches(), uniform, **twice, ckpt_path=start)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    for scenario, values in scenarios().items():
        run(scenario, values)
    languages()
    loaders()
    resuming()
    dist.destroy_process_group()
