"""Refusing, before the first step, what OnlineSelection could not do exactly."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from torch import nn

from onlinesel.callbacks._shared.hosts import is_other_trl, right_callback
from onlinesel.callbacks._shared.precision import warn_slow_bfloat16
from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks._shared.versions import check_version
from onlinesel.callbacks.hf.loss import may_shift
from onlinesel.data.datasets import check_size
from onlinesel.parallel.agreement import check_scorer, check_settings
from onlinesel.parallel.distributed import world_size
from onlinesel.scoring import CausalLMScorer
from onlinesel.types import Strategy

__all__ = ["check_loader", "check_ranks", "check_trainer", "is_sft", "refuse"]

_LOAD = "AutoModelForCausalLM.from_pretrained(...)"


def refuse(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the designed error of the callback."""
    raise ValueError(f"OnlineSelection: {argument} must be {rule}, got {got}. {remedy}")


def is_sft(trainer: Any) -> bool:
    """Return whether the trainer is TRL's SFTTrainer, whose loss comes from its fused head."""
    return any(cls.__name__ == "SFTTrainer" for cls in type(trainer).__mro__)


def check_ranks(trainer: Any, **settings: Any) -> None:
    """Refuse, on all ranks alike, settings that are not the same on all of them.

    This comes before any check that only some ranks might fail, and leave the others waiting.
    """
    args = getattr(trainer, "args", None)
    known, found = getattr(args, "world_size", 1), world_size()
    if known != found:
        refuse(
            "processes", f"those that the trainer knows of ({known})", found,
            "It would train on each of them apart. On CPUs set use_cpu=True, by which it finds the "
            "others.",
        )  # fmt: skip
    dataset = getattr(trainer, "train_dataset", None)
    rows = None if dataset is None or is_stream(dataset) else len(dataset)
    shown = {"train_dataset": f"{rows} rows", **settings}
    # Addresses of objects differ between processes that hold the same.
    same = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in shown.items()}
    check_settings("OnlineSelection", same, getattr(args, "device", "cpu"))


def check_trainer(
    trainer: Any,
    strategy: Strategy,
    *,
    candidates: int,
    weighs: bool,
    shadow: bool,
    score: Any,
    reference: nn.Module | str | None,
    groups: str | None,
) -> None:
    """Refuse trainers and settings whose gradient would not be the one that is promised."""
    check_version("OnlineSelection", "transformers", "hf")
    _check_kind(trainer)
    args = trainer.args
    parallel = {n: getattr(trainer, f"get_{n}_size")() for n in ("tp", "cp", "sp")}
    strategies = (getattr(args, "train_sampling_strategy", "random"), candidates)
    for bad, argument, rule, got, remedy in (
        (args.n_gpu > 1, "n_gpu", "at most 1 per process", args.n_gpu,
         "Start one process per GPU with torchrun: DataParallel splits rows behind the loss."),
        (args.auto_find_batch_size, "auto_find_batch_size", "off", True,
         "A retried step would be chosen twice. Set the batch size yourself."),
        (max(parallel.values()) > 1, "tensor, context and sequence parallel sizes", "1", parallel,
         "Use data parallelism (DDP, FSDP, DeepSpeed)."),
        (strategies[0] == "batch_rebalance", "train_sampling_strategy", "not 'batch_rebalance'",
         strategies[0], "It sizes its batches itself. Use 'group_by_length'."),
        (getattr(trainer, "padding_free", False), "padding_free", "off", True,
         "A flattened batch has no rows to choose. Set packing=False and padding_free=False in "
         "SFTConfig, or pack with packing_strategy='wrapped' to choose whole packed rows."),
        (not may_shift(trainer), "model",
         "one whose loss is the shifted causal one", type(trainer.model).__name__,
         "Rows of masked, sequence-to-sequence and classification models are not scored here."),
        (getattr(trainer, "loss_is_scaled_for_ga", None) is False,  # from transformers 5.19 on
         "loss_is_scaled_for_ga", "None or True", False,
         "Let the loss divide by num_items_in_batch, and leave the setting as it was: what is "
         "averaged over each micro-batch cannot be exact over a step."),
        (not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None, "model",
         "one whose forward takes num_items_in_batch", type(trainer.model).__name__,
         "Without it the trainer averages each micro-batch alone and no exact mean exists. Accept "
         "**kwargs in forward and pass them to the loss."),
        (weighs and _own_loss(trainer) is not None, "loss", "the model's own for row weights",
         _own_loss(trainer), "Turn it off, use normalize='tokens' and a method without weights."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)
    _check_data(trainer, strategy, candidates, shadow)
    warn_slow_bfloat16("OnlineSelection", args)
    if score is None:
        _check_model(trainer, strategy, reference, groups)
    check_scorer("OnlineSelection", "score", strategy, score)


def _check_kind(trainer: Any) -> None:
    """Refuse what is no trainer of rows, or has the callback already."""
    other = hasattr(trainer, "num_generations") or is_other_trl(trainer)
    if not hasattr(trainer, "get_batch_samples") or other:
        refuse(
            "trainer", "a transformers Trainer or TRL SFTTrainer", type(trainer).__name__,
            right_callback(trainer),
        )  # fmt: skip
    if getattr(trainer.get_batch_samples, "__self__", trainer) is not trainer:
        refuse(
            "trainer",
            "without another OnlineSelection",
            "one that is attached already",
            "Combine methods with Chain, or detach() the first.",
        )


def _own_loss(trainer: Any) -> str | None:
    """Name the setting that takes the loss away from the model, where weights cannot reach it."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    if trainer.label_smoother is not None:
        return "label_smoothing_factor"
    if getattr(trainer.args, "use_liger_kernel", False):
        return "use_liger_kernel"
    loss_type = getattr(trainer.args, "loss_type", None)
    return f"loss_type={loss_type!r}" if is_sft(trainer) and loss_type == "dft" else None


def _check_data(trainer: Any, strategy: Strategy, candidates: int, shadow: bool) -> None:
    dataset, args = trainer.train_dataset, trainer.args
    if dataset is None:
        refuse("train_dataset", "a dataset with rows", None, "Give the trainer its dataset.")
    size = None if is_stream(dataset) else len(dataset)
    if size == 0:
        refuse("train_dataset", "a dataset with rows", "none", "Give the trainer its dataset.")
    if shadow and strategy.observes:
        refuse(
            "shadow", "off for a method that learns from the training loss", True,
            f"Leave shadow out: {type(strategy).__name__} could not see it without changing how "
            "it is computed.",
        )  # fmt: skip
    planned = None if size is None else strategy.epoch_plan(size, epoch=0, seed=0)
    if planned is not None:
        for bad, argument, rule, got in (
            (candidates > 1, "candidates", "1", candidates),
            (shadow, "shadow", "off", True),
            (args.train_sampling_strategy != "random", "train_sampling_strategy", "'random'",
             args.train_sampling_strategy),
        ):  # fmt: skip
            if bad:
                refuse(
                    argument, f"{rule} for a method that plans whole epochs", got,
                    f"Set it so: {type(strategy).__name__} already decides which rows the loader "
                    "reads.",
                )  # fmt: skip
    if size is None and strategy.epoch_plan(1024, epoch=0, seed=0) is not None:
        refuse(
            "train_dataset", "a dataset with a length for an epoch plan", "a stream",
            "Use a map-style dataset.",
        )  # fmt: skip
    if size is not None and planned is None:
        check_size(
            "OnlineSelection", size, accumulate=1, drops_last=args.dataloader_drop_last,
            micro_batch=args.train_batch_size * candidates * args.world_size,
            names=("candidates", "dataloader_drop_last"),
        )  # fmt: skip


def _check_model(
    trainer: Any, strategy: Strategy, reference: nn.Module | str | None, groups: str | None
) -> None:
    if "group" in strategy.needs and groups is None:
        refuse(
            "groups", "the column with the group of each row", None,
            f"Name it by groups=: {type(strategy).__name__} chooses within groups.",
        )  # fmt: skip
    needs = [name for name in strategy.needs if name not in ("ids", "tokens", "group")]
    CausalLMScorer(needs)
    head = getattr(trainer.model, "get_output_embeddings", lambda: None)()
    if needs and head is None:
        refuse(
            "model", "a causal language model with an LM head", type(trainer.model).__name__,
            f"{type(strategy).__name__} needs {', '.join(needs)}; pass score= for other models.",
        )  # fmt: skip
    if "reference_loss" in needs and reference is None:
        refuse(
            "reference", "a model, 'adapter' or a column of losses", None,
            f"Pass reference=, for which {_LOAD} loads a model: {type(strategy).__name__} compares "
            "the loss with it.",
        )  # fmt: skip
    if reference == "adapter" and not hasattr(trainer.model, "disable_adapter"):
        refuse(
            "reference", "a model or a column where no PEFT adapter is", "'adapter'",
            "Train with a PEFT adapter, or give the reference model.",
        )  # fmt: skip


def check_loader(loader: Any, rows: int, processes: int) -> None:
    """Refuse a loader that does not load the candidates: a trainer may build its own.

    Args:
        loader: What the trainer built.
        rows: Candidates of one micro-batch on one process.
        processes: Number of processes; accelerate may count the rows of all of them.
    """
    found = getattr(loader, "total_batch_size", None) or getattr(loader, "batch_size", None)
    if found is not None and found not in (rows, rows * processes):
        refuse(
            "train dataloader", f"one of {rows} candidates a micro-batch", found,
            "get_train_dataloader of this trainer sets its own batch size: let it use "
            "self._train_batch_size, or use candidates=1.",
        )  # fmt: skip
