"""The stand-in for a preference trainer's model, and a collator that brings values of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from onlinesel.rl.preference import PreferenceTerms

__all__ = ["TOKEN_VALUE", "CarryTokenValues", "WeighedModel", "refuse"]

TOKEN_VALUE = "onlinesel_token_"
"""What the keys of token values in a batch begin with."""


def refuse(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the designed error of the callback."""
    raise ValueError(f"PreferenceSelection: {argument} must be {rule}, got {got}. {remedy}")


class CarryTokenValues:
    """A collator that brings values of tokens along, in the places of their tokens.

    Where a token of an answer ends up, after truncation and padding, is found by collating its
    number in place of its id.

    Args:
        collate: The preference collator.
        names: Values; features hold a list for each, ``chosen_<name>`` and ``rejected_<name>``, as
            long as ``chosen_ids`` and ``rejected_ids``.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], names: Sequence[str]) -> None:
        self.collate = collate
        self.names = tuple(names)

    def __call__(self, features: Sequence[dict[str, Any]]) -> Any:
        sides = ("chosen", "rejected")
        columns = {f"{side}_{name}" for side in sides for name in self.names}
        rest = [{k: v for k, v in f.items() if k not in columns} for f in features]
        numbers = [
            {**f, **{f"{side}_ids": list(range(len(f[f"{side}_ids"]))) for side in sides}}
            for f in rest
        ]
        batch = dict(self.collate(rest))
        places, mask = self.collate(numbers)["input_ids"], batch["completion_mask"] != 0
        for name in self.names:
            values = torch.zeros(places.shape)
            rows = [(side, feature) for side in sides for feature in features]
            for row, (side, feature) in enumerate(rows):
                given, ids = feature[f"{side}_{name}"], feature[f"{side}_ids"]
                if len(given) != len(ids):
                    refuse(
                        f"{side}_{name}", f"one value for each of the {len(ids)} {side}_ids",
                        len(given), "Add it to trainer.train_dataset, whose rows hold the ids.",
                    )  # fmt: skip
                row_values = torch.tensor(given, dtype=torch.float32)
                values[row, mask[row]] = row_values[places[row, mask[row]]]
            batch[TOKEN_VALUE + name] = values
        return batch


class WeighedModel:
    """Stands in for the policy while a DPOTrainer computes one loss.

    Args:
        model: The policy as the trainer calls it.
        trainer: Sums the reference's log-probabilities.
        inputs: The batch that the loss is computed of; receives the reference sums.
        values: The user's values of tokens, ``(2N, T)`` each.
        needs: What the weights need; ``"policy"`` and ``"reference"`` join the values.
        decide: Gives the terms from the values.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: Any,
        inputs: dict[str, Any],
        values: dict[str, Tensor],
        needs: Sequence[str],
        decide: Callable[[dict[str, Tensor]], PreferenceTerms],
    ) -> None:
        self._model, self._trainer, self._inputs = model, trainer, inputs
        self._values, self._needs, self._decide = values, needs, decide

    def __getattr__(self, name: str) -> Any:
        """Be the model for everything but the call."""
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy and the reference, and return the policy's output, weighted."""
        if not kwargs.get("fused_lm_head"):  # the logits for compute_metrics
            return self._model(*args, **kwargs)
        policy = self._model(*args, **kwargs) if "policy" in self._needs else None
        reference = self._reference() if "reference" in self._needs else None
        for name, output in (("policy", policy), ("reference", reference)):
            if output is not None:
                self._values[name] = self._by_token(output)
        terms = self._decide(self._values)
        device = self._inputs["input_ids"].device
        changed: dict[str, Tensor] = {}
        if terms.inputs is not None:
            if policy is not None:
                refuse(
                    "inputs", "None from weights that need 'policy'", "token ids",
                    "Leave them out, or 'policy' out of needs: the policy has read the batch "
                    "before it changes.",
                )  # fmt: skip
            changed["input_ids"], reference = terms.inputs.to(device), None
        if policy is None:
            policy = self._model(*args, **{**kwargs, **changed})
        weights = terms.weights[:, 1:].to(device)
        sums = self._sum_reference(weights, changed, reference)
        # The loss looks here once the policy has run, as it would for precomputed sums.
        self._inputs["ref_chosen_logps"], self._inputs["ref_rejected_logps"] = sums
        return _weigh(policy, weights)

    def _reference(self) -> Any:
        """Return the reference's output for the batch as it is; the sums are not used."""
        outputs: list[Any] = []

        def keep(**kwargs: Any) -> Any:
            outputs.append(self._reference_model(**kwargs))
            return outputs[0]

        self._trainer.compute_ref_log_probs(keep, self._inputs)
        return outputs[0]

    def _sum_reference(self, weights: Tensor, changed: dict[str, Tensor], known: Any) -> Any:
        """Let the trainer sum the weighted reference, whose output may be known already."""

        def weighed(**kwargs: Any) -> Any:
            output = known
            if output is None:
                output = self._reference_model(**{**kwargs, **changed})
            return _weigh(output, weights)

        return self._trainer.compute_ref_log_probs(weighed, self._inputs)

    @property
    def _reference_model(self) -> Any:
        """Without its own model, the trainer has switched the policy's adapter before it calls."""
        reference = self._trainer.ref_model
        return self._trainer.model if reference is None else reference

    def _by_token(self, output: Any) -> Tensor:
        """Return log-probabilities in the places of their tokens: the first token has none."""
        width = self._inputs["input_ids"].shape[1] - 1
        return pad(_log_probs(output)[:, -width:].detach().float(), (1, 0))


def _log_probs(output: Any) -> Tensor:
    found: Tensor | None = getattr(output, "log_probs", None)
    if found is None:
        refuse(
            "trainer", "a DPOTrainer whose models give log_probs", type(output).__name__,
            "Use TRL 1.16, with the fused head that it puts on its models.",
        )  # fmt: skip
    return found


def _weigh(output: Any, weights: Tensor) -> Any:
    """Multiply an output's log-probabilities by weights of ``(2N, T - 1)``."""
    log_probs = _log_probs(output)
    # Prompt tuning puts virtual tokens in front, whose positions the trainer cuts off.
    factors = pad(weights, (log_probs.shape[1] - weights.shape[1], 0), value=1.0).to(log_probs)
    output.log_probs = torch.where(factors > 0, log_probs * factors, 0.0)
    return output
