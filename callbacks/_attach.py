"""Wrapping a trainer's bound methods, and refusing what cannot be exact before step 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from onlinesel._datasets import check_size
from onlinesel._words import did_you_mean
from onlinesel.agreement import check_scorer, check_settings
from onlinesel.callbacks._hosts import is_other_trl, right_callback
from onlinesel.callbacks._loss import may_shift
from onlinesel.callbacks._precision import warn_slow_bfloat16
from onlinesel.callbacks._versions import check_version
from onlinesel.distributed import world_size
from onlinesel.mixing import DomainSampler, Mixture
from onlinesel.rows import GROUP, ROW_ID, complete
from onlinesel.scoring import CausalLMScorer
from onlinesel.types import Strategy

__all__ = [
    "carried_columns",
    "check_loader",
    "check_ranks",
    "check_trainer",
    "domain_sampler",
    "is_sft",
    "is_zero3",
    "overridden",
    "refuse",
    "seed_of",
]

_MISSING = object()
_LOAD = "AutoModelForCausalLM.from_pretrained(...)"


@contextmanager
def overridden(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of one instance, and leave its ``__dict__`` afterwards as it was."""
    before = {name: owner.__dict__.get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        restore(owner, before)


def restore(owner: Any, before: Mapping[str, Any]) -> None:
    """Put instance attributes back; those that were the class's own are taken off."""
    for name, value in before.items():
        if value is _MISSING:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = value


def take_off(callback: Any, before: Mapping[str, Any]) -> None:
    """Take a callback off its trainer, whose methods are then its own again."""
    trainer = callback.trainer
    restore(trainer, before)
    if callback in trainer.callback_handler.callbacks:
        trainer.remove_callback(callback)


def restore_all(before: list[tuple[Any, Mapping[str, Any]]]) -> None:
    """Put back what :func:`wrap` returned of several instances, the last first."""
    while before:
        restore(*before.pop())


def wrap(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Put methods over an instance's; returns what :func:`restore` needs."""
    before = {name: owner.__dict__.get(name, _MISSING) for name in methods}
    owner.__dict__.update(methods)
    return before


def refuse(argument: str, rule: str, got: object, remedy: str) -> None:
    """Raise the designed error of the callback."""
    raise ValueError(f"OnlineSelection: {argument} must be {rule}, got {got}. {remedy}")


def seed_of(trainer: Any) -> int:
    """Return the trainer's seed, 0 where it is no trainer, which is refused later."""
    return int(getattr(getattr(trainer, "args", None), "seed", 0))


def is_sft(trainer: Any) -> bool:
    """Return whether the trainer is TRL's SFTTrainer, whose loss comes from its fused head."""
    return any(cls.__name__ == "SFTTrainer" for cls in type(trainer).__mro__)


def is_zero3(trainer: Any) -> bool:
    """Return whether DeepSpeed will take the trainer's parameters apart."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return getattr(plugin, "zero_stage", None) == 3


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
    scorer: Any,
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
    if scorer is None:
        _check_model(trainer, strategy, reference, groups)
    check_scorer("OnlineSelection", "scorer", strategy, scorer)


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


def is_stream(dataset: Any) -> bool:
    """Return whether rows have no number; a stream may know its length all the same."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


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
            f"{type(strategy).__name__} needs {', '.join(needs)}; pass scorer= for other models.",
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


def carried_columns(
    trainer: Any, ids: str, reference: nn.Module | str | None, groups: str | None
) -> dict[str, str]:
    """Return which feature keys ride to which batch keys.

    Raises:
        ValueError: A named column is not in the dataset, or ids or groups are not integers.
    """
    dataset = trainer.train_dataset
    known = getattr(dataset, "column_names", None)
    columns: dict[str, str] = {}
    if ids == "auto" and "sample_id" in (known or ()) and _integers(dataset, "sample_id"):
        columns["sample_id"] = ROW_ID
    elif ids == "auto" and not is_stream(dataset):
        columns[ROW_ID] = ROW_ID
    elif ids not in ("auto", "hash"):
        columns[ids] = ROW_ID
    if groups is not None:
        columns[groups] = GROUP
    if isinstance(reference, str) and reference != "adapter":
        columns[reference] = "reference_loss"
    for name, target in columns.items():
        if target == "reference_loss" and name not in (known or ()) and (known or "/" in name):
            refuse(
                "reference", "a model, 'adapter' or a column of the training dataset", repr(name),
                f"Load a model with AutoModelForCausalLM.from_pretrained({name!r}), or name one of "
                f"the columns {', '.join(known or ('(unknown, of a stream)',))}.",
            )  # fmt: skip
        if name == ROW_ID or known is None:
            continue
        if name not in known:
            refuse(
                "ids" if target == ROW_ID else "groups", "a column of the training dataset",
                repr(name),
                did_you_mean(name, known, f"Name one of the columns {', '.join(known)}."),
            )  # fmt: skip
        if target in (ROW_ID, GROUP) and not _integers(dataset, name):
            refuse(
                "ids" if target == ROW_ID else "groups", "a column of integers", repr(name),
                "Use ids='auto' for row numbers, and number the groups.",
            )  # fmt: skip
        _check_complete(dataset, name)
    return columns


def _check_complete(dataset: Any, name: str) -> None:
    """Refuse a column with None in it where that can be known without reading all rows."""
    table = getattr(dataset, "data", None)
    if table is not None and name in table.column_names and table.column(name).null_count:
        complete("OnlineSelection", name, list(dataset[name]))


def domain_sampler(
    trainer: Any, mixture: Mixture | None, groups: str | None, *, seed: int, plain: bool,
    numbered: bool, reference: nn.Module | str | None,
) -> DomainSampler | None:  # fmt: skip
    """Return the sampler of a mixture of domains, None without one.

    Args:
        trainer: Its dataset has the domain of each row in the column ``groups``.
        mixture: Sets the proportions.
        groups: Name of the column.
        seed: Of the draws.
        plain: Whether nothing else wants to decide which rows the loader reads.
        numbered: Whether ids are row numbers.
        reference: Where reference losses come from.

    Raises:
        ValueError: The loader's rows cannot be drawn by domain here.
        TypeError: ``mixture`` is no mixture.
    """
    if mixture is None:
        return None
    strategy = getattr(trainer.args, "train_sampling_strategy", "random")
    needs_reference = "reference_loss" in getattr(mixture, "needs", ())
    for bad, argument, rule, got, remedy in (
        (groups is None, "groups", "the column with the domain of each row", None,
         "Name it by groups=: a mixture draws rows by domain."),
        (not numbered, "ids", "row numbers", "others",
         "A mixture draws rows of a map-style dataset: use ids='auto' and no column sample_id."),
        (not plain, "mixture", "without shadow and without a method that plans epochs", mixture,
         "Leave mixture= or the other out: only one may decide which rows the loader reads."),
        (strategy != "random", "train_sampling_strategy", "'random' for a mixture", strategy,
         "Leave it at 'random': the mixture decides which rows the loader reads."),
        (needs_reference and not (isinstance(reference, str) and reference != "adapter"),
         "reference", "a column of losses for this mixture", reference,
         "Name the column by reference=, or give DoReMi one reference loss for each domain."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)
    dataset = trainer.train_dataset
    known = hasattr(dataset, "column_names")
    domains = dataset[groups] if known else [row[groups] for row in dataset]
    return DomainSampler(torch.as_tensor(list(domains)), mixture, seed=seed)


def _integers(dataset: Any, column: str) -> bool:
    """Return whether a column is known to hold integers."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return "int" in str(getattr(feature, "dtype", ""))
