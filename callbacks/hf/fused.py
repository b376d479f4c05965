"""Scoring a model that has TRL's fused head, where ZeRO-3 has taken the head apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel.callbacks._shared.trainers import is_zero3
from onlinesel.callbacks.hf.checks import is_sft
from onlinesel.data.batch import IGNORED_LABEL
from onlinesel.scoring import CausalLMScorer, evaluating
from onlinesel.types import Strategy

__all__ = ["FusedHeadScorer", "default_scorer"]


class FusedHeadScorer(CausalLMScorer):
    """Catch what leaves the backbone, in a forward that never calls the head as a module.

    SFTTrainer reads the head's weight beside the module. Had a scoring forward called the module,
    DeepSpeed would fetch the weight for it in the training forward as well, TRL would find it
    there and not hold on to it, and the backward would find it gone.
    """

    def _hidden(self, model: nn.Module, core: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if model is self.reference:
            return super()._hidden(model, core, batch)
        inner: Any = core
        if callable(getattr(core, "get_base_model", None)):
            inner = core.get_base_model()  # type: ignore[operator]
        caught: list[Tensor] = []
        handle = inner.base_model.register_forward_hook(
            lambda _, args, output: caught.append(output.last_hidden_state)
        )
        inputs = self._inputs(batch)
        # Without labels nothing goes through the head.
        nothing = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
        try:
            with evaluating(model):
                model(**inputs, labels=nothing, fused_lm_head=True)
        finally:
            handle.remove()
        return caught[0][:, -inputs["input_ids"].shape[1] :]


def default_scorer(
    trainer: Any, strategy: Strategy, reference: nn.Module | str | None
) -> CausalLMScorer:
    """Return the scorer of a trainer whose user gave none."""
    apart = is_sft(trainer) and is_zero3(trainer)
    needs = [name for name in strategy.needs if name != "group"]  # which rides in the batch
    kind = FusedHeadScorer if apart else CausalLMScorer
    return kind(needs, reference=reference, **strategy.scorer_options)
