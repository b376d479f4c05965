"""How the labels of a loop's or a Lightning module's batches count, settled at the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel.data.batch import IGNORED_LABEL, count_labels, is_causal, label_width
from onlinesel.parallel.agreement import smallest_over_ranks
from onlinesel.parallel.distributed import world_size
from onlinesel.scoring import evaluating
from onlinesel.scoring.loss_probe import LossFacts, Probe, ask_loss

__all__ = ["LabelRule", "ask_model"]

Columns = Mapping[str, Any]
Call = Callable[[Callable[[Any], Any], Any], Any]


def _of_tokens(columns: Columns) -> bool:
    labels = columns.get("labels")
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def ask_model(
    columns: Columns, model: nn.Module, core: nn.Module, call: Call
) -> tuple[Any, LossFacts | None]:
    """Ask the loss of a model that takes labels about one row, and return the row as well.

    Of a model that takes none, or gives no loss, nothing is known.

    Args:
        columns: A batch of tokens.
        model: As the loop calls it.
        core: The model inside the wrappers.
        call: Calls a function of the model where an engine must be told.
    """
    inner: Any = core
    inner = inner.get_base_model() if callable(getattr(inner, "get_base_model", None)) else inner
    taken = inspect.signature(inner.forward).parameters
    if not _of_tokens(columns) or "labels" not in taken:
        return None, None
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    fitting = {name: value for name, value in columns.items()
               if name in taken or (open_ended and isinstance(value, Tensor))}  # fmt: skip
    probe = Probe.of(fitting)

    gives = False

    def loss(row: dict[str, Any], items: int) -> Tensor:
        nonlocal gives
        number = torch.tensor(float(items), device=row["labels"].device)
        row |= {"num_items_in_batch": number} if open_ended else {}
        with evaluating(model):
            output = call(lambda model: model(**row), model)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        gives = found is not None
        return torch.tensor(float("nan")) if found is None else found

    facts = ask_loss(loss, probe)
    return probe, facts if gives and probe.usable else None


class LabelRule:
    """Which labels of a row count, the same for a whole run and on every rank.

    A batch of tokens is that of a causal language model if labels and inputs have one shape and no
    loss says otherwise. The labels of a model whose loss does not shift them count one and all; a
    batch of anything else is made of whole items.
    """

    def __init__(self) -> None:
        self._shifted = self._unshifted = False
        self.settled = False

    def settle(
        self, window: Sequence[Columns], facts: LossFacts | None, device: torch.device
    ) -> None:
        """Decide, together with the other ranks.

        Args:
            window: The batches of the first step.
            facts: What the model's own loss does; None if it has none.
            device: Where collectives need their tensors.
        """
        unshifted = int(facts is not None and not facts.shifts)
        causal = int(all(map(is_causal, window)) and not unshifted)
        if world_size() > 1:
            unshifted = -smallest_over_ranks(-unshifted, device)
            causal = smallest_over_ranks(causal, device)
        self._unshifted, self._shifted, self.settled = bool(unshifted), bool(causal), True

    def check(self, owner: str, columns: Columns) -> None:
        """Refuse a batch whose labels are of another kind than those before.

        Raises:
            ValueError: The labels were those of a causal language model, and these are not.
        """
        if self._shifted and not is_causal(columns):
            shapes = {n: tuple(v.shape) for n, v in columns.items() if n in ("input_ids", "labels")}
            raise ValueError(
                f"{owner}: labels must have the shape of 'input_ids' in every batch if they have "
                f"it in the first, got {shapes}. Pad them to one shape, or give labels of another "
                "sequence a name of their own."
            )

    def count(self, columns: Columns) -> Tensor | None:
        """Return the labelled tokens of each row: ``(N,)``; None where each row is one item."""
        if self._unshifted and _of_tokens(columns):
            return columns["labels"].ne(IGNORED_LABEL).sum(dim=1)
        return count_labels(columns) if self._shifted else None

    def width(self, columns: Columns) -> int:
        """Return for how many tokens of each row a loss may be taken."""
        return columns["labels"].shape[1] if self._unshifted else label_width(columns)
