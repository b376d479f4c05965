"""Refuse, before the first step, what RolloutSelection could not do exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import trl
from trl.trainer.grpo_trainer import GRPOTrainer

from onlinesel.callbacks._shared.hosts import TESTED_TRL, right_callback
from onlinesel.callbacks._shared.precision import warn_slow_bfloat16
from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks._shared.versions import check_version
from onlinesel.callbacks.grpo.images import images_of
from onlinesel.callbacks.grpo.seams import moved_seams
from onlinesel.parallel.distributed import world_size
from onlinesel.rl.prompts import PromptSampler
from onlinesel.rl.refill import Refill
from onlinesel.rl.temperature import AdaptiveTemperature
from onlinesel.rl.types import Advantages, TokenWeights
from onlinesel.types import Strategy

__all__ = ["check", "may_be_uneven", "refuse"]

_TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
_SEQUENCE_LOSSES = ("grpo", "dapo", "dr_grpo")
_KINDS = {
    "gate": Strategy,
    "rollouts": Strategy,
    "refill": Refill,
    "prompts": PromptSampler,
    "advantages": Advantages,
    "tokens": TokenWeights,
    "temperature": AdaptiveTemperature,
}
_EXAMPLES = {
    "gate": "ZeroVariance()",
    "rollouts": "MaxVariance(keep=4)",
    "refill": "Refill()",
    "prompts": "SharedDifficulty()",
    "advantages": "TokenAverage()",
    "tokens": "HAPO()",
    "temperature": "AdaptiveTemperature()",
}


def refuse(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the designed error of the callback."""
    raise ValueError(f"RolloutSelection: {argument} must be {rule}, got {got}. {remedy}")


def check(
    trainer: Any, parts: Mapping[str, Any], success: float | None = None, fused: object = False
) -> None:
    """Check everything that can be known before the first step.

    Args:
        trainer: What should be a GRPO trainer.
        parts: The callback's parts by the name of their argument.
        success: Outcome above which an answer is right; None where outcomes may be graded.
        fused: Whether ``policy_logprobs`` stands in for TRL's head.

    Raises:
        ValueError: They do not fit together.
        TypeError: A part is not of its kind.
    """
    for name, kind in _KINDS.items():
        if parts[name] is not None and not isinstance(parts[name], kind):
            raise TypeError(
                f"RolloutSelection: {name} must be of type {kind.__name__}, got {parts[name]!r}. "
                f"Write for example {name}={_EXAMPLES[name]}."
            )
    if not isinstance(fused, bool):
        raise TypeError(
            f"RolloutSelection: fused_logprobs must be True or False, got {fused!r}. "
            "Write fused_logprobs=True for onlinesel.kernels.policy_logprobs."
        )
    _check_trainer(trainer)
    _check_groups(trainer, parts, success)
    _check_prompts(trainer, parts)
    _check_tokens(trainer, parts)
    if parts["temperature"] is not None:
        _check_temperature(trainer, fused)


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, GRPOTrainer):
        refuse("trainer", "a TRL GRPOTrainer", type(trainer).__name__, right_callback(trainer))
    check_version("RolloutSelection", "trl", "trl")
    moved = moved_seams(trainer)
    if moved:
        refuse(
            "TRL", "a version with the parts this callback builds on",
            f"{trl.__version__} without {', '.join(moved)}",
            f"Install the one it was tested with: pip install trl=={TESTED_TRL}.",
        )  # fmt: skip
    warn_slow_bfloat16("RolloutSelection", trainer.args)
    parallel = {n: getattr(trainer, f"get_{n}_size")() for n in ("tp", "cp", "sp")}
    if max(parallel.values()) > 1:
        refuse(
            "tensor, context and sequence parallel sizes", "1", parallel, "Use data parallelism."
        )
    if trainer.args.auto_find_batch_size:
        refuse(
            "auto_find_batch_size", "off", True,
            "A retried step would be chosen twice. Set the batch size yourself.",
        )  # fmt: skip
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "RolloutSelection":
            refuse(
                "trainer", "one without a RolloutSelection", "one that has it",
                "Give all parts to one callback, or detach() the other.",
            )  # fmt: skip


def _check_groups(trainer: Any, parts: Mapping[str, Any], success: float | None) -> None:
    gate, rollouts, size = parts["gate"], parts["rollouts"], trainer.num_generations
    for name, strategy in (("gate", gate), ("rollouts", rollouts)):
        needs = () if strategy is None else strategy.needs
        other = [need for need in needs if need not in ("reward", "group", "ids")]
        if other:
            refuse(
                name, "a strategy on reward and group", f"one that needs {', '.join(other)}",
                "Write it on outcomes: only OnlineSelection scores rows by the model.",
            )  # fmt: skip
    possible = getattr(gate, "possible", None)
    if possible is not None and not possible(size):
        _check_possible(gate, size, success)
    fewest = getattr(rollouts, "keep", None)
    if isinstance(fewest, int) and fewest > size:
        refuse(
            "rollouts", f"a choice among the {size} completions of a group", rollouts,
            "Raise num_generations.",
        )  # fmt: skip
    _check_images(trainer, parts)
    if parts["refill"] is not None and gate is None:
        refuse("refill", "used with a gate", "no gate", "Pass gate=ZeroVariance().")
    if trainer.aux_loss_enabled and may_be_uneven(trainer, parts):
        refuse(
            "rows that train", f"equally many on all {world_size()} processes with router_aux_"
            "loss_coef", f"num_generations={size}", "A row that fills up would train the router. "
            "Make num_generations a multiple of the processes, and use no rollouts=.",
        )  # fmt: skip
    _check_windows(trainer, parts)


def _check_images(trainer: Any, parts: Mapping[str, Any]) -> None:
    """Refuse to move or drop rows of images, and to embed prompts without theirs."""
    embeds = getattr(parts["prompts"], "features", None) == "policy"
    asked = [name for name in ("gate", "refill", "rollouts") if parts[name] is not None]
    images = images_of(trainer.train_dataset) if asked or embeds else None
    if images and asked:
        refuse(
            "train_dataset", f"text only with {asked[0]}=", images,
            "With images use prompts=, tokens=, advantages= and temperature=.",
        )  # fmt: skip
    if images:
        refuse(
            "features", "a column of the data set with images", "'policy'",
            "The prompts would be embedded without them. Embed them beforehand, or use Thompson().",
        )  # fmt: skip


def may_be_uneven(trainer: Any, parts: Mapping[str, Any]) -> bool:
    """Return whether processes may get other numbers of rows that train."""
    ranks, gated = world_size(), parts["gate"] is not None
    divides = trainer.num_generations % ranks == 0
    return ranks > 1 and (parts["rollouts"] is not None or (gated and not divides))


def _check_windows(trainer: Any, parts: Mapping[str, Any]) -> None:
    """Refuse optimizer steps over several generation batches, one of which may be empty."""
    slices, window = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    full = parts["refill"] is not None and parts["refill"].on_short in ("top_up", "raise")
    if parts["gate"] is None or full or not trainer.is_deepspeed_enabled or slices % window == 0:
        return
    refuse(
        "steps_per_generation", "a multiple of gradient_accumulation_steps for gate= with "
        "DeepSpeed", f"{slices} and {window}", "Its engine updates the weights before a batch "
        "without a group that trains can be made up for.",
    )  # fmt: skip


def _check_possible(gate: Any, size: int, success: float | None) -> None:
    """Refuse a gate that nothing can pass; warn of one that only graded outcomes can."""
    if success is not None or getattr(gate, "low", 0.0) >= getattr(gate, "high", 0.0):
        refuse(
            "gate", f"one that some number of right answers out of {size} can pass", gate,
            "Widen the band, or raise num_generations.",
        )  # fmt: skip
    warnings.warn(
        f"RolloutSelection: no number of right answers out of {size} can pass {gate}: only groups "
        "of graded outcomes, between 0 and 1, will train. Widen the band, or raise "
        "num_generations, if the outcome is 0 or 1.",
        stacklevel=2,
    )


def _check_prompts(trainer: Any, parts: Mapping[str, Any]) -> None:
    asked = [name for name in ("prompts", "refill") if parts[name] is not None]
    if not asked:
        return
    _check_engine(trainer, parts)
    dataset, groups = trainer.train_dataset, trainer.args.generation_batch_size
    groups //= trainer.num_generations
    if is_stream(dataset) and parts["prompts"] is not None:
        refuse(
            "train_dataset", "one with row numbers for prompts=", "a stream",
            "Use a map-style data set; a stream cannot be asked for a problem.",
        )  # fmt: skip
    if is_stream(dataset):
        return
    least = groups
    if parts["refill"] is not None and parts["refill"].max_rounds > 0:
        # A loader that does not shuffle leaves out what fills no batch, in every epoch.
        fixed = parts["prompts"] is None and not trainer.shuffle_dataset
        least += groups if fixed else 1
    if len(dataset) < least:
        refuse(
            "train_dataset", f"of at least {least} problems for batches of {groups}",
            f"{len(dataset)}", "Lower generation_batch_size, or use no refill.",
        )  # fmt: skip


def _check_engine(trainer: Any, parts: Mapping[str, Any]) -> None:
    """Refuse what sharded models and environments cannot do."""
    embeds = getattr(parts["prompts"], "features", None) == "policy"
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    skips = parts["refill"] is not None and parts["refill"].on_short in ("skip", "replace")
    for bad, argument, rule, got, remedy in (
        (embeds and sharded, "features", "a column of the data set with FSDP and DeepSpeed",
         "'policy'", "Embed the prompts beforehand, for example with the model before training."),
        (embeds and trainer.environment_factories is not None, "features",
         "a column of the data set with environments", "'policy'",
         "Their prompts are only known while they are rolled out."),
        (skips and trainer.is_deepspeed_enabled, "on_short", "partial, top_up or raise with "
         "DeepSpeed", repr(parts["refill"].on_short) if skips else None,
         "Set it so: its engine updates the weights before a step can be skipped."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)


def _check_tokens(trainer: Any, parts: Mapping[str, Any]) -> None:
    tokens, advantages = parts["tokens"], parts["advantages"]
    level = trainer.importance_sampling_level
    for bad, argument, rule, got, remedy in (
        (tokens and trainer.loss_type not in _TOKEN_LOSSES, "loss_type",
         f"one of {', '.join(_TOKEN_LOSSES)} for token weights", repr(trainer.loss_type),
         "Set it so, or leave tokens= out: other losses do not clip by token."),
        (tokens and level != "token", "importance_sampling_level", "'token' for token weights",
         repr(level), "Set it so, or leave tokens= out: a ratio of whole sequences has no clip "
         "range by token."),
        (advantages and advantages.per_sequence and trainer.loss_type not in _SEQUENCE_LOSSES,
         "loss_type", f"one of {', '.join(_SEQUENCE_LOSSES)} for {advantages!r}",
         repr(trainer.loss_type), "Set it so, or leave advantages= out: they are defined for a "
         "mean over each sequence."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)


def _check_temperature(trainer: Any, fused: bool) -> None:
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else (
        trainer.model
    )  # fmt: skip
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    continuous = trainer.use_transformers_continuous_batching
    remedies = (
        "Change that, or leave temperature= out: tokens must be scored at the temperature that "
        "sampled them.",
        "Set fused_logprobs=True, which gives the head the temperature of each token.",
    )
    capped = getattr(config, "final_logit_softcapping", None) is not None
    biased = getattr(head, "bias", None) is not None
    for bad, rule, got, remedy in (
        (trainer.use_vllm, "generation by transformers", "vLLM, whose processors TRL cannot set",
         remedies[0]),
        (continuous, "generation by transformers' generate", "continuous batching", remedies[0]),
        (bool(trainer.tools), "one answer a completion", "tools", remedies[0]),
        (trainer.rollout_func is not None, "the trainer's own generation", "rollout_func",
         remedies[0]),
        (biased and not fused, "a head without bias", "a bias", remedies[1]),
        (capped and not fused, "plain logits", "soft-capped ones", remedies[1]),
    ):  # fmt: skip
        if bad:
            refuse("trainer", f"one with {rule} for temperature=", got, remedy)
