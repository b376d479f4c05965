"""What a loss makes of labels, found by asking it: names of classes and attributes prove nothing.

The loss of a causal language model is shifted: position ``t`` predicts the label at ``t + 1``, and
the first label of a row counts for nothing. ``GPT2LMHeadModel`` has this loss and
``BartForCausalLM`` has not, whatever transformers' table of losses says. Counting, scoring and
weighing rows all depend on it, and on whether the loss divides by the number that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from onlinesel.data.batch import IGNORED_LABEL, take_rows, trim
from onlinesel.data.padding import token_axes

__all__ = ["LossFacts", "Probe", "ask_loss", "differs"]

_SHORT = 8  # tokens are enough, where a row can be cut
_NEAR, _FAR = 0.05, 0.1  # of a loss in 16 bits; in nats, and of the loss

AskedLoss = Callable[[dict[str, Any], int], Tensor | float]
"""``(inputs with labels, num_items_in_batch) -> loss``."""


@dataclass(frozen=True)
class LossFacts:
    """What a loss does.

    Attributes:
        shifts: Whether the label of a row's first token counts for nothing.
        divides: Whether it is the sum over labelled tokens divided by the number that it is given.
        value: Loss of the token that :attr:`Probe.one` labels, in nats; nan if it does not divide.
    """

    shifts: bool
    divides: bool
    value: float


@dataclass(frozen=True)
class Probe:
    """One row of a batch with labels that tell losses apart.

    Attributes:
        none: Nothing is labelled.
        first: The row's first token is labelled.
        one: The second token is labelled that is no padding.
        usable: Whether the row has two tokens; one tells nothing.
    """

    none: dict[str, Any]
    first: dict[str, Any]
    one: dict[str, Any]
    usable: bool

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Probe:
        """Make one from the first row of a flat batch that has two tokens, or from its first row.

        Args:
            batch: Has ``labels`` of ``(N, T)``.
        """
        labels = batch["labels"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(labels) if mask is None or mask.dim() != 2 else mask
        if mask.shape != labels.shape:  # of the inputs of another sequence
            mask = torch.ones_like(labels)
        tokens = mask.ne(0).sum(dim=1)
        long = (tokens >= 2).nonzero().flatten()
        row = _short(take_rows(batch, [int(long[0]) if long.numel() else 0]))
        width = row["labels"].shape[1]
        alive = (
            row["attention_mask"]
            if mask is batch.get("attention_mask")
            else torch.ones_like(row["labels"])
        )
        start = int(alive.ne(0).long().argmax())  # padding may be left on the left

        def labelled(*places: int) -> dict[str, Any]:
            own = torch.full_like(row["labels"], IGNORED_LABEL)
            tokens = row.get("input_ids", torch.ones_like(own))
            for place in places:
                token = tokens[0, min(place, tokens.shape[1] - 1)]
                own[0, place] = torch.where(token > 0, token - 1, token + 1)  # no model is sure of
            shifted = pad(own, (0, 1), value=IGNORED_LABEL)[:, 1:]
            return {**row, "labels": own} | (
                {"shift_labels": shifted} if "shift_labels" in row else {}
            )

        second = min(start + 1, width - 1)
        return cls(labelled(), labelled(0), labelled(second), bool(long.numel()) and width > 1)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Cut a row to its first tokens, where all of its columns are made of tokens."""
    axes = token_axes([row])
    row = trim(row)
    tensors = {n for n, v in row.items() if isinstance(v, Tensor) and v.dim() > 1}
    if axes.fixed or tensors != set(axes.columns) or len(axes.anchors) != 1:
        return row
    square = any(len(dims) > 1 for _, dims in axes.columns.values())
    return row if square else {n: row[n][:, :_SHORT] if n in tensors else row[n] for n in row}


def ask_loss(loss: AskedLoss, probe: Probe) -> LossFacts:
    """Find out what a loss does; always four calls, so that all ranks forward equally often.

    Args:
        loss: Called without gradient, in eval mode.
        probe: Of one row.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> def unshifted(inputs, items):
        ...     logits = torch.zeros(*inputs["labels"].shape, 9)
        ...     return cross_entropy(logits.mT, inputs["labels"], reduction="sum") / items
        >>> probe = Probe.of({"labels": torch.ones(1, 4).long()})
        >>> facts = ask_loss(unshifted, probe)
        >>> facts.shifts, facts.divides, round(facts.value, 3)
        (False, True, 2.197)
    """
    none, first, four, eight = (
        float(loss(dict(inputs), items))
        for inputs, items in (
            (probe.none, 4), (probe.first, 4), (probe.one, 4), (probe.one, 8),
        )
    )  # fmt: skip
    rest = none if _finite(none) else 0.0  # of a mixture's router, say; a mean of nothing is nan
    shifts = not _finite(first) or abs(first - rest) <= 1e-6 + 1e-3 * abs(rest)
    four, eight = four - rest, eight - rest
    divides = abs(four) > 1e-6 and abs(four - 2 * eight) <= _FAR * abs(four)
    return LossFacts(shifts, divides, 4 * four if divides else float("nan"))


def _finite(number: float) -> bool:
    return bool(torch.isfinite(torch.tensor(number)))


def differs(one: float, other: float) -> bool:
    """Return whether two losses of a token are others, for all that 16 bits tell."""
    return abs(one - other) > _NEAR + _FAR * abs(one)
