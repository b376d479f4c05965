"""Columns of the training dataset that ride in its batches, and domains that are drawn by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onlinesel._base.words import did_you_mean
from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks.hf.checks import refuse
from onlinesel.data.rows import GROUP, ROW_ID, complete
from onlinesel.mixing import DomainSampler, Mixture

__all__ = ["carried_columns", "domain_sampler"]


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
