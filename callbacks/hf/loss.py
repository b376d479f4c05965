"""Row weights inside the host's own loss, and the losses of the rows that trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from onlinesel._base.host import upload
from onlinesel.step import StepPlan

__all__ = [
    "UNDEFINED",
    "WEIGHTS",
    "LossTap",
    "as_undefined",
    "put_weights",
    "may_shift",
    "tapped_loss",
]

WEIGHTS = "onlinesel_weights"
"""Batch key of the ``(N,)`` factors of the rows' summed token losses."""

UNDEFINED = "onlinesel_undefined"
"""Batch key that is there where the step's loss is to be shown as nan."""

_IGNORED = -100


def put_weights(plan: StepPlan, args: Any, *, always: bool) -> Tensor:
    """Put factors into the micro-batches that need them; return what the host divides by.

    Args:
        plan: Its batches are changed in place.
        args: The trainer's.
        always: Whether every micro-batch is to have them, so that its loss is tapped.
    """
    items, scale = plan.denominator, 1.0
    if not args.average_tokens_across_devices:
        items = items / args.world_size  # DDP's mean over ranks is all the averaging there is
    if float(items) < 1.0:  # SFTTrainer never divides by less than 1
        items, scale = torch.ones_like(items), 1.0 / float(items)
    for index, batch in enumerate(plan.batches):
        multipliers = plan.multipliers(index)
        if multipliers is None and (always or scale != 1.0):
            multipliers = (plan.weights[index] > 0).float()
        if multipliers is not None:
            batch[WEIGHTS] = upload(multipliers * scale, args.device)
        if plan.undefined:
            batch[UNDEFINED] = True
    return upload(items, args.device)


def as_undefined(result: Any) -> Any:
    """Return what a trainer's ``compute_loss`` gave with a loss of nan, of the same gradient."""
    if isinstance(result, tuple):
        return (result[0] + torch.nan, *result[1:])
    return result + torch.nan


class LossTap:
    """What passes through one forward's loss.

    Attributes:
        multipliers: ``(N,)`` factor of each row's summed token loss, or None for 1.
        row_loss: ``(N,)`` mean token loss of each row before weighting, once the loss has run.
    """

    def __init__(self, multipliers: Tensor | None) -> None:
        self.multipliers = multipliers
        self.row_loss: Tensor | None = None

    def __call__(self, token_loss: Tensor, mask: Tensor) -> Tensor:
        """Note the rows' losses and return the weighted token losses, ``(N, T)``."""
        counts = mask.sum(dim=1)
        means = (token_loss.detach() * mask).sum(dim=1) / counts.clamp(min=1)
        self.row_loss = torch.where(counts > 0, means.float(), float("nan"))
        if self.multipliers is None:
            return token_loss
        factors = self.multipliers.to(token_loss)[:, None]
        return torch.where(factors > 0, token_loss * factors, 0.0)

    def causal_lm_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stand in for transformers' causal LM loss: same arguments, weighted rows."""
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.device)
        token_loss = cross_entropy(
            logits.float().view(-1, vocab_size),
            targets.reshape(-1),
            ignore_index=ignore_index,
            reduction="none",
        ).view(targets.shape)
        summed = self(token_loss, targets.ne(ignore_index)).sum()
        return summed / torch.as_tensor(num_items_in_batch).to(summed)


@contextmanager
def tapped_loss(model: nn.Module, tap: LossTap, *, fused: bool) -> Iterator[None]:
    """Send one forward's token losses through a tap, and restore the model.

    Args:
        model: The transformers model itself (inside PEFT and wrappers).
        tap: Weighs and notes.
        fused: TRL's fused head gives ``log_probs`` from the forward and SFTTrainer sums them
            itself; otherwise the model calls its ``loss_function``.

    Raises:
        RuntimeError: The model took its loss another way, so that the weights had no effect.
    """
    if fused:

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if getattr(output, "log_probs", None) is not None and tap.row_loss is None:
                output.log_probs = -tap(-output.log_probs, output.label_mask)

        handle = model.register_forward_hook(hook, with_kwargs=True)
        undo = handle.remove
    else:
        before = model.__dict__.get("_loss_function")
        model.loss_function = tap.causal_lm_loss  # type: ignore[assignment]

        def undo() -> None:
            if before is None:
                del model._loss_function
            else:
                model._loss_function = before

    try:
        yield
        if tap.row_loss is None:
            raise RuntimeError(
                f"OnlineSelection: {type(model).__name__} must take its loss through "
                "'loss_function' (or TRL's fused head) for row weights to act, got a loss that "
                "bypasses it. Turn off Liger kernels, label smoothing and custom losses, or use a "
                "method without weights."
            )
    finally:
        undo()


def may_shift(trainer: Any) -> bool:
    """Return whether a trainer's loss may be the shifted causal one.

    Its first batch will tell; what it computes from logits without a model is known before.
    """
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    function = getattr(model, "loss_function", None)
    if function is None or trainer.compute_loss_func is not None:
        return True
    try:
        # The first token is labelled, which nothing predicts.
        loss = float(function(torch.zeros(1, 2, 3), torch.tensor([[1, -100]]), vocab_size=3))
    except Exception:  # noqa: BLE001  # takes something else than logits and labels of tokens
        return False
    return not 0.0 < loss < float("inf")
