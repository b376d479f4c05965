"""The trainer's own parts that the callback builds on, named, so that a change is told by name."""

from __future__ import annotations

import inspect
import re
from typing import Any

from trl.trainer.utils import add_fused_lm_head

__all__ = ["ATTRIBUTES", "HEAD", "READS", "SEAMS", "moved_seams"]

SEAMS: dict[str, tuple[str, ...]] = {
    "get_train_dataloader": (),
    "_prepare_inputs": ("generation_batch",),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ),
    "compute_loss": ("model", "inputs"),
    "_compute_loss": ("model", "inputs"),
    "training_step": ("model", "inputs"),
    "log": ("logs", "start_time"),
    "_save_rng_state": ("output_dir",),
    "_inner_training_loop": (),
}  # fmt: skip
"""Methods that are wrapped or called, and the parameters that must be among theirs."""

READS: dict[str, tuple[str, ...]] = {
    "_prepare_inputs": (
        r"self\._generate_and_score_completions\(",
        r"self\._step % generate_every == 0",
        r"split_tensor_dict\(generation_batch, self\.args\.steps_per_generation\)",
    ),
    "_generate_and_score_completions": (
        r"self\._calculate_rewards\(",
        r"self\._generate\(",
        r'"num_items_in_batch": num_items_in_batch',
        r'"advantages": advantages',
        # The definition of advantages, which is needed again over the groups that train.
        r"rewards - mean_grouped_rewards",
        r"advantages / \(std_rewards \+ 1e-4\)",
        r"\(grouped - mean_k\) / \(std_k \+ 1e-4\)",
    ),
    "_calculate_rewards": (r"self\.reward_funcs", r"gather\(rewards_per_func\)"),
    "_tokenize_prompts": (r"return prompt_ids, images, multimodal_fields",),
    # The clip range and the advantages are read after the log-probabilities were computed.
    "_compute_loss": (
        r"(?s)self\._get_per_token_logps_and_entropies\(.*advantages = inputs\[\"advantages\"\]",
        r"(?s)self\._get_per_token_logps_and_entropies\(.*torch\.clamp\(coef_1, 1 - "
        r"self\.epsilon_low, 1 \+ self\.epsilon_high\)",
        r'inputs\["num_items_in_batch"\]\.clamp\(min=1\.0\)',
        # Means over the rows or the tokens of a micro-batch, or over all tokens.
        r"mask\)\.sum\(-1\) / mask\.sum\(-1\)\.clamp\(min=1\.0\)\)\.mean\(\)",
        r"per_token_loss\.size\(0\) \* self\.max_completion_length",
        r"per_token_loss = per_token_loss \+ self\.beta \* per_token_kl",
    ),
    "_generate_single_turn": (r"unwrapped_model\.generate\(",),
}
"""What the source of a method must contain for the wrapping to mean what it says."""

HEAD = (
    # What fused_logprobs stands in for, and what it leaves to TRL.
    r"per_token = _ChunkedLogProbFunction\.apply\(",
    r"hidden_states\[mask\] if compact else hidden_states\.reshape\(",
    r"labels\[mask\] if compact else labels\.clamp\(min=0\)",
    r"if shift_labels is None:\s+hidden_states = .*\[:, :-1\]\s+labels = labels\[:, 1:\]",
    r"weight = weight\.full_tensor\(\)",
    r"autocast_ctx, maybe_gather_lm_head_ctx\(weight, bias\):",
    r"log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token",
)
"""What the source of TRL's fused head must contain."""

ATTRIBUTES = (
    "_step", "_buffered_inputs", "_tokenizer", "aux_loss_enabled", "beta", "environment_factories",
    "epsilon_low", "epsilon_high", "importance_sampling_level", "loss_type",
    "max_completion_length", "multi_objective_aggregation", "num_generations", "num_iterations",
    "pad_to_multiple_of", "reward_func_names", "reward_funcs", "reward_weights", "rollout_func",
    "scale_rewards", "temperature", "tools", "use_transformers_continuous_batching", "use_vllm",
)  # fmt: skip
"""Attributes of a constructed trainer that are read or set."""


def _unwrapped(method: Any) -> Any:
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


def moved_seams(trainer: Any, *, sources: bool = False) -> list[str]:
    """Return what this trainer lacks of what the callback builds on, in words; empty if nothing.

    Args:
        trainer: A GRPO trainer, or its class (attributes are not looked at then).
        sources: Also look at the source of the methods and of the fused head, as the tests do for
            each new version.
    """
    moved = []
    owner = trainer if isinstance(trainer, type) else type(trainer)
    for name, parameters in SEAMS.items():
        method = getattr(owner, name, None)
        if method is None:
            moved.append(f"method {name}")
            continue
        known = inspect.signature(_unwrapped(method)).parameters
        moved += [f"parameter {p} of {name}" for p in parameters if p not in known]
    if not isinstance(trainer, type):
        moved += [f"attribute {name}" for name in ATTRIBUTES if not hasattr(trainer, name)]
    if sources:
        for name, patterns in READS.items():
            text = inspect.getsource(_unwrapped(getattr(owner, name)))
            moved += [f"{p!r} in {name}" for p in patterns if not re.search(p, text)]
        text = inspect.getsource(add_fused_lm_head)
        moved += [f"{p!r} in add_fused_lm_head" for p in HEAD if not re.search(p, text)]
    return moved
