"""Which callback belongs to which trainer, for the errors of all of them."""

from __future__ import annotations

from typing import Any

__all__ = ["TESTED_TRL", "is_other_trl", "right_callback"]

TESTED_TRL = "1.16.0"
"""What constraints.txt has, for whoever installs from elsewhere."""

_RIGHT = {
    "GRPOTrainer": "Use onlinesel.callbacks.grpo.RolloutSelection, which chooses problems and "
    "rollouts.",
    "DPOTrainer": "Use onlinesel.callbacks.dpo.PreferenceSelection, which weighs the tokens of "
    "pairs.",
    "RLOOTrainer": "Use TRL's GRPOTrainer with scale_rewards='none' and RolloutSelection: its "
    "advantages are RLOO's but for the factor G / (G - 1) of groups of G.",
    "AsyncGRPOTrainer": "Use TRL's GRPOTrainer and RolloutSelection; it generates with vLLM as "
    "well (use_vllm=True).",
    "SFTTrainer": "Use onlinesel.callbacks.hf.OnlineSelection, which chooses rows.",
}


def right_callback(trainer: Any) -> str:
    """Return what to use with a trainer, whatever was handed to a callback."""
    kinds = [kind for kind in type(trainer).__mro__ if kind is not object]
    for kind in kinds:
        if kind.__name__ in _RIGHT:
            return _RIGHT[kind.__name__]
        if kind.__name__ == "Trainer" and "lightning" in kind.__module__:
            return "Use onlinesel.callbacks.lightning.OnlineSelection, in Trainer(callbacks=[...])."
    if is_other_trl(trainer):
        return (
            "There is no callback for it. In a loop of your own, onlinesel.steps chooses rows for "
            "any loss."
        )
    if any(kind.__name__ == "Trainer" and "transformers" in kind.__module__ for kind in kinds):
        return "Use onlinesel.callbacks.hf.OnlineSelection, which chooses rows."
    return "Pass the trainer itself; for a loop of your own there is onlinesel.steps."


def is_other_trl(trainer: Any) -> bool:
    """Return whether a trainer is one of TRL's that does not train rows of texts as SFTTrainer."""
    kinds = type(trainer).__mro__
    named = {kind.__name__ for kind in kinds if kind.__module__.startswith("trl.")}
    return "SFTTrainer" not in named and any(
        name.endswith("Trainer") and not name.startswith("_") for name in named
    )
