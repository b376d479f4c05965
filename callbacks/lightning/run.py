"""What a Lightning run is like: its model, its engine, what it divides by, what it counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from onlinesel.callbacks._shared.versions import check_version
from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.lightning.data import refuse
from onlinesel.parallel.distributed import world_size
from onlinesel.scoring import evaluating

__all__ = [
    "begin_epoch",
    "causal_model",
    "check_run",
    "engine_of",
    "gradient_factor",
    "move_progress",
    "through_strategy",
]

_SCORING = "_onlinesel_scoring"
_STAGES = ("ready", "started", "processed", "completed")


def check_run(trainer: Any, module: Any, accumulate: int | None) -> None:
    """Refuse runs whose gradient would not be the one that is promised."""
    check_version("LightningSelection", "lightning", "lightning")
    automatic = module.automatic_optimization
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    step = inspect.signature(module.training_step).parameters
    wrapped = "dataloader" in vars(trainer.fit_loop._data_source)
    for bad, argument, rule, got, remedy in (
        ("dataloader_iter" in step, "training_step", "one that takes a batch", "dataloader_iter",
         "Write training_step(self, batch, batch_idx): one that fetches its own cannot be given "
         "others."),
        (trainer.reload_dataloaders_every_n_epochs > 0, "reload_dataloaders_every_n_epochs", "0",
         trainer.reload_dataloaders_every_n_epochs,
         "Row numbers would mean other rows after a reload. Fit again with the new data."),
        (automatic and accumulate is not None, "accumulate", "None with automatic optimization",
         accumulate, "Use Trainer(accumulate_grad_batches=...)."),
        (accumulate is not None and (type(accumulate) is not int or accumulate < 1), "accumulate",
         "an integer >= 1", repr(accumulate),
         "Say how many micro-batches an optimizer step has."),
        (not trainer.world_size == replicas == world_size(), "strategy",
         "one that gives every rank rows of its own through torch.distributed",
         f"{type(trainer.strategy).__name__} with {replicas} replicas on {trainer.world_size} "
         f"ranks and a process group of {world_size()}",
         "Use data parallelism alone (DDP, FSDP, DeepSpeed)."),
        (wrapped, "trainer", "without another LightningSelection", "one that has it already",
         "Combine methods with Chain, in one callback."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)


def _has_head(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", None)
    return callable(head) and head() is not None


def causal_model(module: nn.Module) -> nn.Module | None:
    """Return the language model that a module is, or has as the only one of its children."""
    if _has_head(module):
        return module
    found = [child for child in module.children() if _has_head(child)]
    return found[0] if len(found) == 1 else None


def through_strategy(trainer: Any, function: Callable[[Any], Any], model: nn.Module) -> Any:
    """Call a function of the model inside the forward of whatever wraps the module."""
    strategy, module = trainer.strategy, trainer.lightning_module
    with strategy.precision_plugin.val_step_context():
        if strategy.model is module:
            return function(model)
        found: list[Any] = []

        def scoring(_: int) -> None:  # wrappers look into what a forward returns
            found.append(function(model))

        with evaluating(strategy.model), overridden(module, {_SCORING: scoring}):
            strategy._forward_redirection(strategy.model, module, _SCORING, 0)
        return found[0]


def engine_of(trainer: Any) -> Any:
    """Return DeepSpeed's engine, None under any other strategy."""
    model = trainer.strategy.model
    names = {cls.__name__ for cls in type(model).__mro__}
    return model if "DeepSpeedEngine" in names else None


def gradient_factor(trainer: Any, accumulate: int) -> float:
    """Return what a gradient is divided by on its way from ``training_step`` to the optimizer.

    Ranks are averaged. Automatic optimization divides by the accumulation, in a shorter last step
    as well, and DeepSpeed's engine by its own once more.
    """
    factor, engine = world_size(), engine_of(trainer)
    if trainer.lightning_module.automatic_optimization:
        factor *= accumulate
    if engine is not None:
        factor *= engine.gradient_accumulation_steps()
    return float(factor)


def move_progress(progress: Any, behind: int) -> None:
    """Make a trainer that was restored count this many batches as done in its epoch.

    It counts micro-batches of the ranks that there were. Where their number has changed, or the
    checkpoint stands in the middle of a step, which is decided anew, that is not where the rows
    stand.
    """
    delta = behind - _counted(progress.current)
    for count in (progress.current, progress.total):
        for name in _STAGES:
            setattr(count, name, getattr(count, name) + delta)


def begin_epoch(loop: Any) -> None:
    """Make a trainer that was restored at an epoch's end begin the next at its first batch.

    It goes on counting otherwise, where it counts steps and no epochs or knows no length.
    """
    progress = loop.epoch_loop.batch_progress
    delta = -_counted(progress.current)
    for name in _STAGES:
        setattr(progress.current, name, getattr(progress.current, name) + delta)
    progress.is_last_batch = False
    if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
        if loop.epoch_progress.current.completed < loop.epoch_progress.current.processed:
            loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()


def _counted(current: Any) -> int:
    """Return the batches that a trainer will count as done once it has started."""
    # Of one that was saved at the end of a batch, it counts that batch then.
    ended = current.ready == current.started == current.processed == current.completed + 1
    return current.completed + ended
