"""Scores of rows that a classifier predicts one label for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from onlinesel.types import Signals

__all__ = ["ClassificationScorer"]


def _forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the usual batches: ``(inputs, labels)`` or a mapping."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output, labels = model(**inputs), batch["labels"]
    else:
        *parts, labels = batch
        output = model(*parts)
    return getattr(output, "logits", output), labels


class ClassificationScorer:
    """Score the rows of a classifier's batches; a :data:`onlinesel.Scorer`.

    Gives ``loss``, ``entropy``, ``el2n`` and ``grad_norm`` (which is ``el2n`` where a row has one
    label), from one forward. Rows labelled -100 get nan, so that no method selects them.

    Args:
        forward: ``(model, batch) -> (logits (N, C), labels (N,))``. By default a batch is
            ``(inputs, labels)`` or a mapping with ``labels``, and the model gives the logits or an
            output that has them.

    Raises:
        ValueError: Logits that are not ``(N, C)``.

    Example:
        >>> import torch
        >>> model = torch.nn.Identity()
        >>> batch = (torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> [round(loss, 3) for loss in ClassificationScorer()(model, batch).loss.tolist()]
        [0.693, 9.0]
    """

    provides: Sequence[str] = ("loss", "entropy", "el2n", "grad_norm")

    def __init__(self, forward: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None) -> None:
        self._forward = forward or _forward

    def __call__(self, model: Any, batch: Any) -> Signals:
        """Score one batch."""
        logits, labels = self._forward(model, batch)
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                "ClassificationScorer: logits must be of shape (N, C) with labels (N,), got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}. Pass forward= for this model."
            )
        with torch.no_grad():
            log_p = torch.log_softmax(logits.detach().float(), dim=1)
            p, known = log_p.exp(), labels.ne(-100)
            safe = torch.where(known, labels, 0)
            p_label = p.gather(1, safe[:, None]).squeeze(1)
            el2n = (p.square().sum(dim=1) - 2 * p_label + 1).clamp(min=0).sqrt()
            found = {
                "loss": cross_entropy(log_p, safe, reduction="none"),
                "entropy": -(p * log_p.clamp(min=-1e30)).sum(dim=1),
                "el2n": el2n,
                "grad_norm": el2n,
            }
        return Signals(**{k: torch.where(known, v, torch.nan) for k, v in found.items()})
