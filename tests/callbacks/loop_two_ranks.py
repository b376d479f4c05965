"""Run by torchrun on two processes: plain loops under DDP and FSDP2; what trained goes to JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

import onlinesel
from onlinesel.callbacks.loop.iterate import _factor_of
from onlinesel.kernels._shards import gathered
from onlinesel.strategies import UDS, InfoBatch, LossReweight, SelectiveBackprop, TopLoss, Uniform
from tests.callbacks.hosts import collate, make_rows
from tests.callbacks.loop_hosts import make_loader, make_model, sgd, token_losses, train
from tests.callbacks.two_ranks import KeepIds, poisoned
from tests.counting import Work
from tests.launching import begin, leave

ACCUMULATE = (1, 2)
CHECKPOINTED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def wrap(engine: str, model: Any, accumulate: int = 1, layers: Any = None) -> Any:
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine.startswith("zero"):
        return deepspeed_engine(int(engine[-1]), model, accumulate)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers if layers is None else layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def deepspeed_engine(stage: int, model: Any, accumulate: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=sgd(model), config=config, dist_init_required=False
    )
    assert engine.zero_optimization_stage() == stage
    if stage == 3:
        assert all(p.numel() == 0 for p in model.parameters())
    return engine


def train_engine(steps: Any, engine: Any, stop: int | None = None) -> Iterator[Any]:
    """Train as DeepSpeed wants it; yields each step when it is done."""
    for step in steps:
        for micro in step:
            engine.backward(micro.loss(token_losses(engine, micro.batch)))
            engine.step()
        yield step
        if stop is not None and steps.step + 1 >= stop:
            break


def zero(folder: Path, stage: int) -> None:
    """A whole step and one of a single micro-batch, which the engine must not wait behind."""
    for name, options in (
        ("subset", {"strategy": TopLoss(), "candidates": 3}),
        ("weights", {"strategy": LossReweight(min_rows=2)}),
    ):
        engine = wrap(f"zero{stage}", make_model(), accumulate=2)
        loader = make_loader(rows=make_rows()[: 12 * options.get("candidates", 1)])
        steps = onlinesel.steps(loader, engine, options.pop("strategy"), accumulate=2, **options)
        for step in train_engine(steps, engine):
            done = {
                "ids": [micro.ids.tolist() for micro in step.micro_batches],
                "weights": [micro.weights.tolist() for micro in step.micro_batches],
            }
            save(folder, f"zero{stage}-{name}-{step.index}", done, engine)


def write(engine: str, model: Any, steps: Any, folder: Path) -> None:
    """Write a checkpoint as the engine does, with the selection inside."""
    if engine.startswith("zero"):
        model.save_checkpoint(str(folder), client_state={"steps": steps.state_dict()})
        return
    state = {"steps": steps.state_dict()}
    if engine == "fsdp2":  # DCP loads into tensors of known size; what the selection keeps grows
        checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    else:
        state["model"] = model.module.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, folder.with_suffix(".pt"))
    dist.barrier()


def read(engine: str, model: Any, steps: Any, folder: Path) -> None:
    if engine.startswith("zero"):
        _, client = model.load_checkpoint(str(folder))
        steps.load_state_dict(client["steps"])
        return
    state = torch.load(folder.with_suffix(".pt"))
    steps.load_state_dict(state["steps"])
    if engine == "fsdp2":
        found = {"model": get_model_state_dict(model)}
        checkpoint.load(found, checkpoint_id=folder)
        set_model_state_dict(model, found["model"])
    else:
        model.module.load_state_dict(state["model"])


def resume_from(folder: Path, engine: str) -> None:
    """Three steps, and three of which the last two follow a checkpoint."""

    def make() -> tuple[Any, Any]:
        model = wrap(engine, make_model())
        return model, onlinesel.steps(make_loader(), model, SelectiveBackprop(), candidates=2)

    def go(model: Any, steps: Any, stop: int) -> list[list[list[int]]]:
        if engine.startswith("zero"):
            trained = train_engine(steps, model, stop)
            return [[micro.ids.tolist() for micro in step.micro_batches] for step in trained]
        return [step["ids"] for step in train(steps, model, sgd(model), stop)]

    model, steps = make()
    ids = go(model, steps, 3)
    save(folder, f"whole-{engine}", ids, model)
    model, steps = make()
    ids = go(model, steps, 1)
    write(engine, model, steps, folder / f"checkpoint-{engine}")
    model, steps = make()
    read(engine, model, steps, folder / f"checkpoint-{engine}")
    save(folder, f"resumed-{engine}", ids + go(model, steps, 3), model)


def whole(model: Any) -> dict[str, torch.Tensor]:
    model = model.module if hasattr(model, "module") else model
    with gathered(model):
        return {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in model.named_parameters()
        }


def scenarios() -> dict[str, dict[str, Any]]:
    """One optimizer step each, but for `ragged`, whose last step has a row for one rank only."""
    subset = {"strategy": TopLoss(), "candidates": 3}
    found: dict[str, dict[str, Any]] = {}
    for n in ACCUMULATE:
        found[f"subset-{n}"] = {**subset, "accumulate": n}
        found[f"weights-{n}"] = {"strategy": LossReweight(min_rows=2), "accumulate": n}
    return found | {
        "observing": {"strategy": InfoBatch(), "accumulate": 2},
        "uds": {"strategy": UDS(), "candidates": 2},
        "rank": {**subset, "scope": "rank", "accumulate": 2},
        "batch": {**subset, "scope": "batch", "accumulate": 2},
        "one-rank-empty": {"strategy": KeepIds((19,)), "candidates": 2},
        "nothing-kept": {"strategy": KeepIds(()), "candidates": 2},
        "one-rank-nan": {**subset, "score": poisoned(1)},
        "all-nan": {**subset, "score": poisoned(None)},
    }


def run(folder: Path, engine: str, name: str, options: dict[str, Any]) -> None:
    model = wrap(engine, make_model())
    steps = onlinesel.steps(make_loader(), model, options.pop("strategy"), **options)
    torch.save(whole(model), folder / "before.pt")
    (done,) = train(steps, model, sgd(model), stop=1)
    save(folder, f"{engine}-{name}", done, model)


def save(folder: Path, name: str, content: Any, model: Any = None) -> None:
    (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(content))
    if model is not None:
        torch.save(whole(model), folder / f"{name}-{dist.get_rank()}.pt")


def ragged(folder: Path) -> None:
    """Nine rows for two ranks of two: the last step has one row, and rank 1 none of its own."""
    model = wrap("ddp", make_model())
    loader = make_loader(rows=make_rows()[:9])
    steps = onlinesel.steps(loader, model, Uniform(), accumulate=2)
    save(folder, "ragged", [len(steps), train(steps, model, sgd(model))], model)


class Uneven(IterableDataset[Any]):
    """A stream that is longer on rank 0."""

    def __iter__(self) -> Any:
        return iter(make_rows()[: 10 if dist.get_rank() == 0 else 5])


def uneven(folder: Path) -> None:
    model = wrap("ddp", make_model())
    loader = DataLoader(Uneven(), batch_size=2, collate_fn=collate)
    steps = onlinesel.steps(loader, model, TopLoss(), candidates=2)
    save(folder, "uneven", train(steps, model, sgd(model)))


def foreign(folder: Path) -> None:
    """Loaders that are left as they are, longer on rank 0; and one that accelerate prepared."""
    from accelerate import Accelerator

    def own() -> Any:
        rows = make_rows()[: 14 if dist.get_rank() == 0 else 10]
        generator = torch.Generator().manual_seed(dist.get_rank())
        sampler = WeightedRandomSampler([1.0] * len(rows), len(rows), generator=generator)
        return make_loader(rows=rows, shuffle=False, sampler=sampler)

    def prepared() -> Any:
        accelerator = Accelerator(cpu=True)
        return accelerator.prepare(make_loader(rows=make_rows()[:20]))

    for name, make in (("sampler", own), ("accelerate", prepared)):

        def run(state: Any = None, stop: int | None = None) -> tuple[list[Any], Any]:
            model = wrap("ddp", make_model())
            steps = onlinesel.steps(make(), model, Uniform(), candidates=2)  # noqa: B023
            if state is not None:
                steps.load_state_dict(state)
            done = [step["ids"] for step in train(steps, model, sgd(model), stop)]
            return done, steps.state_dict()

        torch.manual_seed(7)
        whole, end = run()
        assert (end["data"]["epoch"], end["data"]["position"]) == (1, 0)
        torch.manual_seed(7)
        _, state = run(stop=1)
        torch.manual_seed(8)
        assert state["data"]["position"] == 2  # batches, the same on both ranks
        save(folder, f"foreign-{name}", [whole, run(state)[0]])


def disagree(folder: Path, **changes: Any) -> None:
    model = wrap("ddp", make_model())
    name = next(iter(changes))
    loader = make_loader(rows=make_rows()[: changes.pop("rows", None)])
    try:
        onlinesel.steps(loader, model, **{"strategy": TopLoss(), **changes})
    except ValueError as error:
        save(folder, f"disagree-{name}", str(error))


def resume(folder: Path) -> None:
    """Stop after one step on two ranks; and go on from the one step that one process did."""
    options = {"strategy": SelectiveBackprop(), "candidates": 2, "accumulate": 2}
    for scope in ("global", "rank"):
        model = wrap("ddp", make_model())
        steps = onlinesel.steps(make_loader(), model, **options, scope=scope)
        done = train(steps, model, sgd(model), stop=1)
        state = steps.state_dict()
        save(folder, f"resume-{scope}", done)
        if dist.get_rank() == 0:
            torch.save({"steps": state, "model": whole(model)}, folder / f"resume-{scope}.ckpt")
        again = onlinesel.steps(make_loader(), model, **options, scope=scope)
        again.load_state_dict(state)
        save(folder, f"resume-{scope}-rest", train(again, model, sgd(model)))
    if (folder / "one.ckpt").exists():
        model = wrap("ddp", make_model())
        steps = onlinesel.steps(make_loader(), model, **options)
        steps.load_state_dict(torch.load(folder / "one.ckpt"))
        save(folder, "grown", train(steps, model, sgd(model)))


def cost(folder: Path) -> None:
    """Count what our own code does in a step of two micro-batches with nothing to choose."""
    model, work = wrap("ddp", make_model()), Work()
    rows = make_rows(8 * 8)  # for eight steps of two times two rows on each of two ranks
    steps = onlinesel.steps(make_loader(rows=rows), model, Uniform(), accumulate=2)
    source = steps._source
    plan = work.ours(source.plan)

    def counted(*args: Any, **kwargs: Any) -> Any:
        work.step()
        return plan(*args, **kwargs)

    source.plan = counted  # type: ignore[method-assign]
    for name in ("micro_batches", "finish"):
        setattr(source, name, work.ours(getattr(source, name)))
    train(steps, model, sgd(model))
    save(folder, "cost", work.each())


if __name__ == "__main__":
    begin()
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for engine in ("ddp", "fsdp2"):
        for scenario, values in scenarios().items():
            run(out, engine, scenario, values)
    ragged(out)
    uneven(out)
    foreign(out)
    disagree(out, seed=dist.get_rank())
    disagree(out, strategy=TopLoss(lowest=dist.get_rank() == 1))
    disagree(out, accumulate=1 + dist.get_rank())
    disagree(out, rows=16 - 2 * dist.get_rank())
    resume(out)
    cost(out)
    for number in (1, 2, 3):
        zero(out, number)
    for engine in CHECKPOINTED:
        resume_from(out, engine)
    assert _factor_of(torch.nn.parallel.DistributedDataParallel(make_model())) == 2.0
    leave()
