"""Before the first step: does the loss that will train do with labels what selection counts on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from onlinesel.callbacks.hf.checks import is_sft, refuse
from onlinesel.scoring import CausalLMScorer, evaluating
from onlinesel.scoring.loss_probe import Probe, ask_loss, differs
from onlinesel.types import Normalize

__all__ = ["LossCheck"]


class LossCheck:
    """Ask a trainer's loss about one row of its first batch, once a run.

    Args:
        trainer: The trainer.
        compute: Its own ``compute_loss``.
        scorer: The scorer; losses of the default one must be those of the model.
        normalize: What the loss is a mean over.
    """

    def __init__(
        self, trainer: Any, compute: Callable[..., Any], scorer: Any, normalize: Normalize
    ) -> None:
        self._trainer, self._compute, self._done = trainer, compute, False
        reads = isinstance(scorer, CausalLMScorer) and scorer.needs
        self._scorer: Any = scorer if reads else None
        # What is the mean of one micro-batch is that of the step where there is no other.
        args = trainer.args
        several = args.gradient_accumulation_steps > 1 or args.world_size > 1
        self._exact = several or normalize != "tokens"

    def once(
        self, columns: Mapping[str, Any], rebuild: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        """Ask about a row of a batch that has labels, and never again after it.

        Args:
            columns: The batch, flat.
            rebuild: Gives it the structure that the model takes.

        Raises:
            ValueError: The loss is another one than rows are counted and scored for.
        """
        labels = columns.get("labels")
        if self._done or not isinstance(labels, Tensor) or labels.dim() != 2:
            return
        columns = {name: value for name, value in columns.items() if name != "reference_loss"}
        probe = Probe.of(columns)
        # Ranks forward equally often: one that has no row of two tokens does not ask again.
        self._done = probe.usable or self._trainer.args.world_size > 1
        name = type(self._trainer.model).__name__
        facts = ask_loss(lambda row, items: self._loss(rebuild(row), items), probe)
        if not probe.usable:
            return
        if not facts.shifts:
            refuse(
                "model", "one whose loss is the shifted causal one",
                f"{name}, whose loss counts the first label of a row",
                "Rows of masked, sequence-to-sequence and classification models are not scored "
                "here. In a loop of your own, onlinesel.steps(..., score=) takes them.",
            )  # fmt: skip
        if self._exact and not facts.divides and not self._overridden():
            refuse(
                "loss", "divided by num_items_in_batch where a step has several micro-batches, "
                "processes or row weights", f"that of {self._trainer.compute_loss_func or name}, "
                "which is not",
                "Sum over the labelled tokens and divide by num_items_in_batch.",
            )  # fmt: skip
        plain = self._trainer.compute_loss_func is None and self._trainer.label_smoother is None
        if self._scorer is not None and facts.divides and plain:
            self._compare(rebuild(probe.one), facts.value / self._scale())

    def _compare(self, row: dict[str, Any], value: float) -> None:
        """Refuse a model whose logits are not what its head makes of the hidden states."""
        trainer = self._trainer
        with trainer.compute_loss_context_manager():
            signals = self._scorer(trainer.model_wrapped, row, core=trainer.model, needs=("loss",))
        scored = float(signals.loss)
        if differs(scored, value):
            refuse(
                "score", f"given for {type(trainer.model).__name__}, whose loss of a token is "
                f"{value:.3f}", f"the default scorer, which finds {scored:.3f}",
                "The model changes its logits after the LM head in a way that is not known here: "
                "pass score=, a function (model, batch) -> Signals.",
            )  # fmt: skip

    def _overridden(self) -> bool:
        """Whether a subclass computes the loss its own way; TRL's asks the model."""
        kind = type(self._trainer)
        return not is_sft(self._trainer) and kind.compute_loss is not Trainer.compute_loss

    def _scale(self) -> int:
        """Return what the trainer multiplies its loss by, to undo the mean over ranks."""
        alone = is_sft(self._trainer) or self._overridden()
        args = self._trainer.args
        return 1 if alone or not args.average_tokens_across_devices else args.world_size

    def _loss(self, inputs: dict[str, Any], items: int) -> Tensor:
        trainer, model = self._trainer, self._trainer.model_wrapped
        number = torch.tensor(float(items), device=inputs["labels"].device)
        own: Any = trainer.compute_loss_func
        with trainer.compute_loss_context_manager(), evaluating(model):
            if not is_sft(trainer):
                if not self._overridden():
                    return self._compute(model, inputs, num_items_in_batch=number)
                output = model(**inputs, num_items_in_batch=number)
            elif own is None:  # and not its method, which counts its calls
                output = model(
                    **inputs, num_items_in_batch=number, fused_lm_head=True, use_cache=False
                )
            else:
                labels = inputs.pop("labels")
                return own(model(**inputs), labels, num_items_in_batch=number)
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        return torch.tensor(float("nan")) if loss is None else loss
