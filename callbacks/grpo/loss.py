"""What a micro-batch of a chosen generation batch counts, whatever loss the trainer computes.

Where the rows that train do not divide evenly among micro-batches and ranks, the loss of each
micro-batch counts by its share of them. A loss that divides by rows or by tokens of the micro-batch
is then the mean over all rows that train; one that divides by ``num_items_in_batch`` is told that
number times the share, which leaves it as it is. So TRL's losses, their entropy bonus and those of
subclasses come out as without the rows that were dropped.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer

from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.grpo.checks import may_be_uneven, refuse
from onlinesel.callbacks.grpo.rows import ROWS, TRAINS
from onlinesel.parallel.distributed import world_size

__all__ = ["MicroLoss", "Window", "refuse_own_loss", "regroup", "trl_loss_inputs"]

Batch = dict[str, Any]
_ROW_MEANS = ("grpo", "sapo", "luspo", "dr_grpo")  # TRL's losses that divide by rows, muted or not


def regroup(slices: Sequence[Batch], ranks: int) -> list[Batch]:
    """Spread the rows that train evenly over the micro-batches, and drop muted rows.

    A muted row stays where a micro-batch would have none, or fewer than on another rank.

    Args:
        slices: Micro-batches with the columns ``TRAINS`` and ``ROWS``.
        ranks: Number of ranks.

    Returns:
        As many micro-batches, with equally many rows on every rank.
    """
    count, first = len(slices), slices[0]
    size = -(-int(first[ROWS]) // ranks)  # rows that train on the rank that has most
    trains = torch.cat([part[TRAINS] for part in slices]).bool().cpu()
    training, muted = trains.nonzero().flatten().tolist(), (~trains).nonzero().flatten().tolist()
    training += [muted.pop() for _ in range(size - len(training))]
    whole = {
        name: torch.cat([part[name] for part in slices])
        for name, value in first.items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    parts = []
    for i in range(count):
        chosen = training[i * size // count : (i + 1) * size // count] or [muted.pop()]
        index = torch.tensor(chosen)
        parts.append({**first, **{n: v[index.to(v.device)] for n, v in whole.items()}})
    return parts


def trl_loss_inputs() -> Mapping[str, Any] | None:
    """Return the batch that TRL's own loss is computing with; None if it is not running.

    What a subclass calls its loss says nothing; this looks at the calls that are under way.
    """
    code = inspect.unwrap(GRPOTrainer._compute_loss).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["inputs"]


def refuse_own_loss(trainer: Any, part: str) -> None:
    """Refuse a part that TRL's own loss alone can carry."""
    refuse(
        "trainer", f"one whose loss is that of GRPOTrainer._compute_loss for {part}=",
        f"{type(trainer).__name__}, which computes its own",
        "Call super()._compute_loss(model, inputs) with the same dictionary, or leave "
        f"{part}= out.",
    )  # fmt: skip


class MicroLoss:
    """Weigh the losses of micro-batches.

    Args:
        trainer: A GRPO trainer.
        parts: The callback's parts by the name of their argument.
        fused: Whether log-probabilities come from ``policy_logprobs``.
        log_probs: The trainer's own ``_get_per_token_logps_and_entropies``.
    """

    def __init__(
        self, trainer: Any, parts: Mapping[str, Any], fused: bool, log_probs: Callable[..., Any]
    ) -> None:
        self.trainer, self.parts, self.fused = trainer, parts, fused
        self._log_probs = log_probs
        self._asked = self._known = self._checked = self._running = False

    def asked(self) -> None:
        """Note that a loss asks for log-probabilities, and whether it is TRL's own."""
        if self._running and not self._checked:
            self._asked, self._known = True, self._known or trl_loss_inputs() is not None

    def compute(
        self, call: Callable[..., Any], model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the trainer's ``compute_loss`` returns, weighed."""
        plain = {name: value for name, value in inputs.items() if name not in (ROWS, TRAINS)}
        self._running = True
        try:
            if ROWS not in inputs:
                loss = call(model, plain, *args, **kwargs)
            else:
                loss = self._weighed(call, model, plain, inputs, *args, **kwargs)
        finally:
            self._running = False
        if not self._checked:
            self._check()
        return loss

    def _weighed(
        self, call: Callable[..., Any], model: nn.Module, plain: Batch, inputs: Batch,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        trainer, trains = self.trainer, inputs[TRAINS]
        size, mine, total = len(trains), int(trains.sum()), int(inputs[ROWS])
        if mine == 0:
            loss = call(model, plain, *args, **kwargs)
            # A mean over no tokens may be nan, which times 0 is no 0.
            return loss * 0.0 if bool(torch.isfinite(loss)) else self._nothing(model, plain)
        weight = mine * trainer.args.steps_per_generation * world_size() / total
        muted = size / mine if trainer.loss_type in _ROW_MEANS else 1.0
        if muted != 1.0:
            plain["advantages"] = plain["advantages"] * muted
        if weight != 1.0:
            plain["num_items_in_batch"] = plain["num_items_in_batch"] * weight
        with overridden(trainer, {"beta": trainer.beta * muted}):
            loss = call(model, plain, *args, **kwargs)
        if mine < size and not self._known:
            refuse(
                "_prepare_inputs", "the trainer's own for a loss of one's own",
                f"a micro-batch of {size} rows of which {mine} train",
                "Leave _prepare_inputs as it is, so that rows that were dropped can be taken out.",
            )  # fmt: skip
        return loss * weight if weight != 1.0 else loss

    def _nothing(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return a loss of 0 that comes from a forward, as every rank must do one."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].shape[1]
        log_probs: Tensor = self._log_probs(model, ids, mask, width)[0]
        return log_probs.sum() * 0.0

    def _check(self) -> None:
        """Refuse, once the first loss is there and before it trains, what it does not support."""
        self._checked = True
        if self._known:
            return
        trainer, parts = self.trainer, self.parts
        name = type(trainer).__name__
        shaped = parts["advantages"] is not None and parts["advantages"].per_sequence
        asking = [part for part in ("tokens", "temperature") if parts[part] is not None]
        asking += ["advantages"] if shaped else []
        if asking:
            refuse_own_loss(trainer, asking[0])
        if self.fused and not self._asked:
            refuse(
                "trainer", "one whose loss calls self._get_per_token_logps_and_entropies for "
                "fused_logprobs", f"{name}, which computes its own",
                "Call it in the loss, or set fused_logprobs=False.",
            )  # fmt: skip
        if may_be_uneven(trainer, parts):
            refuse(
                "rows that train", f"equally many on all {world_size()} processes for a loss of "
                "one's own", f"num_generations={trainer.num_generations} with {name}",
                "Whether that loss counts rows without tokens is not known. Make num_generations "
                "a multiple of the processes, and use no rollouts=.",
            )  # fmt: skip


class Window:
    """The micro-batches since the last optimizer step."""

    def __init__(self) -> None:
        self.restore({})

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Begin a run, or go on where :meth:`facts` were taken."""
        self.begin(*(bool(facts.get(name, False)) for name in ("empty", "skip")))
        self.clear()

    def facts(self) -> dict[str, bool]:
        """Return what must survive a checkpoint, which lies between two optimizer steps."""
        return {"empty": self._empty, "skip": self._skip}

    def begin(self, empty: bool, skip: bool) -> None:
        """Note that the next micro-batches are of a new generation batch.

        Args:
            empty: Whether no row of it trains.
            skip: Whether it leaves the weights alone.
        """
        self._empty, self._skip = empty, skip

    def clear(self) -> None:
        """Begin with the next optimizer step."""
        self._steps = self._barren = self._skipped = 0
        self._loss: Tensor | float = 0.0

    @property
    def skipped(self) -> bool:
        """Whether every micro-batch is of a batch that was decided to leave the weights alone."""
        return self._steps > 0 and self._skipped == self._steps

    def add(self, loss: Tensor) -> None:
        """Note one micro-batch and what it adds to the loss that is logged."""
        self._steps += 1
        self._barren += self._empty
        self._skipped += self._skip
        self._loss = self._loss + loss

    def close(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Let empty generation batches take nothing from the others of the same optimizer step.

        Args:
            loss: Of the last micro-batch, noted already.
            model: With the gradient of the whole step.

        Returns:
            What the last micro-batch adds to the loss that is logged.
        """
        if not 0 < self._barren < self._steps:
            return loss
        factor = self._steps / (self._steps - self._barren)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return loss + (factor - 1.0) * self._loss
