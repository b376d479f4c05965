"""Run by torchrun on two processes: Lightning under DDP and FSDP2; what trained goes to files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset

import onlinesel
from onlinesel.callbacks.lightning import OnlineSelection
from onlinesel.kernels._shards import gathered
from onlinesel.strategies import UDS, InfoBatch, LossReweight, SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.hosts import make_rows
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
from tests.launching import begin, leave

ROWS = 50
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


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
    with gathered(module):
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


class Sharded(Language):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class ZeroOnCPU(DeepSpeedStrategy):
    """Lightning's own strategy, without its check that there is a GPU."""

    def __init__(self, stage: int) -> None:
        config = {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        super().__init__(config=config, process_group_backend="gloo")

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # the engine wants an index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy_of(engine: str) -> Any:
    if engine.startswith("zero"):
        return ZeroOnCPU(int(engine[-1]))
    return fsdp2() if engine == "fsdp2" else DDPStrategy(process_group_backend="gloo")


def module_of(engine: str) -> Language:
    return Sharded() if engine == "fsdp2" else Language()


def check_engine(engine: str, trainer: Any) -> None:
    """The engine is what it is called, and has taken apart what it says."""
    parameters = list(trainer.lightning_module.parameters())
    assert all(isinstance(p, DTensor) for p in parameters) == (engine == "fsdp2")
    if engine.startswith("zero"):
        assert trainer.strategy.model.zero_optimization_stage() == int(engine[-1])
        assert all(p.numel() == 0 for p in parameters) == (engine == "zero3")


def languages() -> None:
    """One step of a language model under each engine; `short` has one micro-batch for two."""
    methods = {"top": TopLoss(), "uds": UDS(), "weights": LossReweight(), "short": TopLoss()}
    for engine in ENGINES:
        for name, strategy in methods.items():
            if engine in ("zero1", "zero2") and name in ("uds", "weights"):
                continue
            candidates = 1 if name == "weights" else 2
            rows = make_rows()[: 4 * candidates * (1 if name == "short" else 2)]
            callback = OnlineSelection(strategy, candidates=candidates)
            options = {"strategy": strategy_of(engine), "accumulate_grad_batches": 2}
            name = f"{engine}-{name}"
            trainer = fit(name, module_of(engine), text_loader(rows), callback, **options)
            check_engine(engine, trainer)


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


def resuming_engines() -> None:
    """Engines that restore a checkpoint after the trainer has set everything up."""
    for engine in ("fsdp2", "zero2"):
        path = FOLDER / f"{engine}.ckpt"
        for part in ("whole", "before", "after"):
            callback = OnlineSelection(SelectiveBackprop(), candidates=2)
            others = [SaveAt(path, 2)] if part == "before" else []
            start = path if part == "after" else None
            options = {"strategy": strategy_of(engine), "accumulate_grad_batches": 2}
            batches = text_loader(shuffle=True)
            name = f"{engine}-{part}"
            fit(name, module_of(engine), batches, callback, *others, **options, ckpt_path=start)
            dist.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    begin()
    FOLDER = Path(sys.argv[1])
    for scenario, values in scenarios().items():
        run(scenario, values)
    languages()
    loaders()
    resuming()
    resuming_engines()
    leave()
