"""How plain loops and Lightning score candidates: by the model itself, or by a user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from onlinesel.data.batch import is_causal
from onlinesel.scoring import CausalLMScorer, evaluating, unwrap
from onlinesel.scoring.loss_probe import LossFacts, Probe, differs
from onlinesel.scoring.own import Score, as_signals
from onlinesel.types import Signals, Strategy

if TYPE_CHECKING:
    from onlinesel.callbacks._shared.reuse import ReusedForward

__all__ = ["RowScorer"]


class RowScorer:
    """Score rows with a model that is taken later.

    Args:
        strategy: The method.
        score: The user's function, None for the scorer of causal language models.
        reference: As the hosts' argument.
        refuse: Raises the host's designed error.

    Attributes:
        own: Whether the user's function scores.
        core: The model inside its wrappers.
        call: Calls a function of the model.
        rebuild: Puts columns into the structure that the loader gave.
        reuse: Lets training forwards give what scoring forwards gave.
    """

    def __init__(
        self,
        strategy: Strategy,
        score: Score | None,
        reference: nn.Module | str | None,
        refuse: Callable[[str, str, object, str], NoReturn],
    ) -> None:
        self.strategy, self.refuse = strategy, refuse
        self.own, self._score, self.reference = score is not None, score, reference
        self._needs = [n for n in strategy.needs if n not in ("ids", "tokens", "group")]
        self._default: CausalLMScorer | None = None
        self.rebuild: Callable[[Any], Any] = dict
        self.reuse: ReusedForward | None = None

    def take(
        self,
        model: nn.Module,
        core: nn.Module | None,
        call: Callable[[Callable[[Any], Any], Any], Any] | None,
        device: torch.device,
    ) -> None:
        """Take a model; arguments as of ``StepSource.attach``."""
        self.model, self._device = model, device
        self.core = unwrap(model) if core is None else core
        self.call = call or (lambda function, model: function(model))
        self._make_default()

    def _make_default(self) -> None:
        """Make the default scorer where it fits, and say what is missing where it does not."""
        if self._score is not None or not self._needs:
            return
        name = type(self.core).__name__
        if getattr(self.core, "get_output_embeddings", lambda: None)() is None:
            self.refuse(
                "score", "given for a model that is no causal language model", f"None with {name}",
                f"{type(self.strategy).__name__} needs {', '.join(self._needs)}: pass score=, for "
                "example onlinesel.ClassificationScorer() or a function (model, batch) -> losses.",
            )  # fmt: skip
        known = isinstance(self.reference, nn.Module) or self.reference == "adapter"
        if "reference_loss" in self._needs and not known:
            self.refuse(
                "reference", "a model or 'adapter'", repr(self.reference),
                f"{type(self.strategy).__name__} compares the loss with it: load a model with "
                "AutoModelForCausalLM.from_pretrained(...) and pass that.",
            )  # fmt: skip
        if isinstance(self.reference, nn.Module):
            self.reference.to(self._device)
        self._default = CausalLMScorer(
            self._needs, reference=self.reference, **self.strategy.scorer_options
        )

    def __call__(
        self, batch: dict[str, Any], needs: Sequence[str], hosted: Mapping[str, Any]
    ) -> Signals:
        """Return the signals of the rows of a batch."""
        scorer = self._default
        if scorer is not None:
            around: AbstractContextManager[None] = nullcontext()
            if self.reuse is not None:
                around = self.reuse.scoring(batch)
                batch = self.reuse.without_marks(batch)
            inputs = self.rebuild(batch)
            batch = inputs if isinstance(inputs, dict) else batch
            scored = partial(scorer, core=self.core, needs=needs, around=around, hosted=hosted)
            return self.call(lambda model: scored(model, batch), self.model)
        score, rebuilt = self._score, self.rebuild(batch)
        assert score is not None
        with evaluating(self.model):
            found = self.call(lambda model: score(model, rebuilt), self.model)
        return as_signals(found, self.refuse)

    def check_loss(self, probe: Probe, facts: LossFacts | None) -> None:
        """Refuse a model that computes another loss than the default scorer sees."""
        if facts is None or self._default is None:
            return
        name = type(self.core).__name__
        if not facts.shifts:
            self.refuse(
                "score", "given for a model whose loss does not shift its labels",
                f"None with {name}", "Write a function (model, batch) -> losses.",
            )  # fmt: skip
        scorer, found = self._default, facts.value
        if facts.divides:
            row, needs = probe.one, ("loss",)
            signals = self.call(
                lambda model: scorer(model, row, core=self.core, needs=needs), self.model
            )
            found = float(signals.require(scorer, "loss"))
        if facts.divides and differs(found, facts.value):
            self.refuse(
                "score", f"given for {name}, whose loss of a token is {facts.value:.3f}",
                f"None, which finds {found:.3f}",
                "The model changes its logits after the LM head in a way that is not known here: "
                "write a function (model, batch) -> losses.",
            )  # fmt: skip

    def check_columns(self, columns: dict[str, Any]) -> None:
        """Refuse a batch that the default scorer cannot read."""
        if self._default is not None and not is_causal(columns):
            self.refuse(
                "score", "given for a batch without 'input_ids' and 'labels' of one shape",
                f"None with {', '.join(columns)}", "Write a function (model, batch) -> losses.",
            )  # fmt: skip

    def advance(self) -> None:
        """Note that the model has had an optimizer step."""
        if self._default is not None:
            self._default.advance()
