"""Token weights and adaptive temperature inside the trainer's own loss and log-probabilities.

The trainer reads its clip range and its advantages after it has computed the log-probabilities of
a micro-batch; that is where the token weights are put in their place, so that not a line of the
loss is written again. A temperature of its own for every token goes to ``policy_logprobs``; with
TRL's head it scales the hidden states before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList
from trl.models.utils import disable_gradient_checkpointing

from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.grpo.head import check_head, fused_logprobs, inner_model
from onlinesel.callbacks.grpo.loss import refuse_own_loss, trl_loss_inputs
from onlinesel.callbacks.grpo.rows import ENTROPY, TEMPERATURE, Rows, loss_mask
from onlinesel.rl.temperature import AdaptiveTemperature
from onlinesel.rl.types import TokenSignals, TokenWeights

__all__ = ["TokenTerm"]

Call = Callable[..., Any]


class _Thermostat(LogitsProcessor):
    """Sample each token at its own temperature, and note entropy and temperature.

    It comes before the trainer's own temperature, which divides by the base.
    """

    def __init__(
        self, method: AdaptiveTemperature, statistics: Mapping[str, Tensor] | None, base: float
    ) -> None:
        self.method, self.statistics, self.base = method, statistics, base
        self.entropy: list[Tensor] = []
        self.factor: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        entropy = torch.special.entr(scores.float().softmax(dim=-1)).sum(dim=-1)
        heat = self.method.temperatures(entropy, self.statistics, self.base) / self.base
        self.entropy.append(entropy)
        self.factor.append(heat)
        return scores / heat[:, None].to(scores)


class TokenTerm:
    """What the tokens of a generation batch count, from sampling to the loss.

    Args:
        trainer: A GRPO trainer.
        tokens: Token weights, or None.
        temperature: Temperature rule, or None.
        scores: Whether log-probabilities of whole completions are asked for.
        fused: Whether log-probabilities come from ``policy_logprobs`` instead of TRL's head.

    Raises:
        ValueError: ``fused`` does not go with this trainer.
    """

    def __init__(
        self,
        trainer: Any,
        tokens: TokenWeights | None,
        temperature: AdaptiveTemperature | None,
        scores: bool,
        fused: bool = False,
    ) -> None:
        if fused:
            check_head(trainer)
        self.trainer, self.tokens, self.temperature = trainer, tokens, temperature
        self.active = tokens is not None or temperature is not None
        self.scores, self.fused = scores, fused
        self.statistics: dict[str, Tensor] = {}
        """Of the tokens of the current generation batch, for the token weights."""
        self.heat: dict[str, Tensor] | None = None
        """Of the last generation batch, for the temperature of the next."""
        self._current: dict[str, Any] | None = None
        self._factor: Tensor | None = None
        self._thermostat: _Thermostat | None = None

    # Sampling -------------------------------------------------------------------------------

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let completions be sampled at their own temperatures, for one generation call."""
        if self.temperature is None:
            yield
            return
        model = self.trainer.model
        self._thermostat = _Thermostat(self.temperature, self.heat, self.trainer.temperature)
        generate = model.generate

        def tempered(*args: Any, **kwargs: Any) -> Any:
            processors = LogitsProcessorList([self._thermostat])
            return generate(*args, **kwargs, logits_processor=processors)

        try:
            with overridden(model, {"generate": tempered}):
                yield
        finally:
            self._factor = None

    def label(self, batch: dict[str, Any]) -> None:
        """Attach to the rows of a generation call what was noted while they were sampled."""
        if self._thermostat is None:
            return
        width, spot = batch["completion_ids"].shape[1], self._thermostat
        for name, noted, fill in (
            (TEMPERATURE, spot.factor, 1.0),
            (ENTROPY, spot.entropy, 0.0),
        ):
            value = torch.stack(noted, dim=1)[:, :width]
            batch[name] = pad(value, (0, width - value.shape[1]), value=fill)
        self._thermostat = None

    # Log-probabilities ----------------------------------------------------------------------

    def log_probs(self, call: Call, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute log-probabilities at the temperatures that sampled, and prepare the loss."""
        factor, core = self._sampled(args, kwargs), inner_model(self.trainer, model)
        with fused_logprobs(core, factor) if self.fused else _scaled(core, factor):
            result = call(model, *args, **kwargs)
        if self._current is not None and self.tokens is not None:
            self._put_terms(result[0].detach())
        return result

    def _sampled(self, args: Any, kwargs: Any) -> Tensor | None:
        """Return the factor on the temperature of each completion token, None where it is 1."""
        factor = self._factor
        if self._current is not None:
            factor = self._current.get(TEMPERATURE)
        elif self._thermostat is not None and self._thermostat.factor:
            factor = torch.stack(self._thermostat.factor, dim=1)
        if factor is None:
            return None
        width = kwargs.get("logits_to_keep", args[2] if len(args) > 2 else None)
        return pad(factor[:, :width], (0, width - min(factor.shape[1], width)), value=1.0)

    def measure(
        self,
        call: Call,
        rows: Rows,
        gather: Callable[[Tensor], Tensor],
        media: Mapping[str, Any],
    ) -> Tensor | None:
        """Measure the tokens of the final batch, once, and note their statistics.

        Args:
            call: The trainer's own computation of log-probabilities.
            rows: This rank's final rows; the entropies are added to them.
            gather: Concatenates one-dimensional tensors over the ranks.
            media: What the forward is given beside the tokens.

        Returns:
            ``(B,)`` mean log-probability of each row's tokens; None unless they are asked for.
        """
        if not self.active and not self.scores:
            return None
        mask = loss_mask(rows).bool()
        log_probs = rows.get("old_per_token_logps")
        wants_entropy = self.tokens is not None and ENTROPY not in rows
        if wants_entropy or (self.scores and log_probs is None):
            log_probs, entropy = self._forward(call, rows, media)
            if wants_entropy:
                rows[ENTROPY] = entropy.float()
        if ENTROPY in rows:
            said = gather(rows[ENTROPY][mask].float().clamp(min=0))
            if self.tokens is not None:
                self.statistics = self.tokens.statistics(said)
            if self.temperature is not None:
                self.heat = self.temperature.statistics(said)
        if not self.scores or log_probs is None:
            return None
        return (log_probs.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _forward(self, call: Call, rows: Rows, media: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        trainer = self.trainer
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        self._factor = rows.get(TEMPERATURE)
        kwargs = trainer.args.gradient_checkpointing_kwargs
        try:
            with torch.no_grad(), disable_gradient_checkpointing(trainer.model, kwargs):
                log_probs, entropy, _ = self.log_probs(
                    call,
                    trainer.model,
                    ids,
                    mask,
                    rows["completion_ids"].shape[1],
                    batch_size=trainer.args.per_device_train_batch_size,
                    compute_entropy=True,
                    **media,
                )
        finally:
            self._factor = None
        return log_probs, entropy

    # Loss -----------------------------------------------------------------------------------

    def loss(self, call: Call, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Let the trainer compute its loss, with the token weights in it."""
        trainer = self.trainer
        clip = {"epsilon_low": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
        self._current = dict(inputs)
        try:
            with overridden(trainer, clip) if self.tokens is not None else nullcontext():
                return call(model, self._current)
        finally:
            self._current = None

    def _put_terms(self, log_probs: Tensor) -> None:
        trainer, current = self.trainer, self._current
        assert current is not None and self.tokens is not None
        if trl_loss_inputs() is not current:  # else the loss would not read what is put here
            refuse_own_loss(trainer, "tokens")
        advantages, old = current["advantages"], current.get("old_per_token_logps")
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(log_probs)
        terms = self.tokens.weigh(
            TokenSignals(
                entropy=current[ENTROPY],
                ratio=torch.ones_like(log_probs) if old is None else (log_probs - old).exp(),
                advantages=advantages,
                mask=loss_mask(current).bool(),
                statistics={n: v.to(log_probs.device) for n, v in self.statistics.items()},
                clip=(trainer.epsilon_low, trainer.epsilon_high),
            )
        )
        current["advantages"] = terms.advantages
        trainer.epsilon_low, trainer.epsilon_high = terms.clip_low, terms.clip_high


@contextmanager
def _scaled(core: Any, factor: Tensor | None) -> Iterator[None]:
    """Divide the states that enter TRL's head by the factor on the temperature of their token."""
    if factor is None:
        yield
        return
    offset, width = 0, factor.shape[1]

    def scale(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal offset
        hidden = output.last_hidden_state
        rows = factor[offset : offset + hidden.shape[0]]
        offset += hidden.shape[0]
        # The token at position t is predicted from position t - 1.
        heat = pad(rows, (hidden.shape[1] - width - 1, 1), value=1.0)
        # In bfloat16 the temperature itself would be rounded by as much as it changes.
        output.last_hidden_state = (hidden.float() / heat[..., None]).to(hidden.dtype)
        return output

    handle = core.base_model.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
