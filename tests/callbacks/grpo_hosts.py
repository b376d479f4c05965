"""A tiny GRPO trainer whose completions and outcomes are known, and what its batches came to.

Completions are a function of the prompt and of their number within the group, not of a random
generator, so that runs with other batches or other numbers of processes can be compared row by row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.rl import AdaptiveTemperature
from tests.callbacks.hosts import arguments, make_model, make_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it may change
    from trl.experimental.gmpo import GMPOTrainer as GMPOTrainer

GENERATIONS = 4


def make_problems(rights: Sequence[float]) -> list[dict[str, Any]]:
    """One problem for each number of right answers among four; nan scores nothing."""
    return [
        {"prompt": " ".join(f"w{2 + (7 * i + j) % 60}" for j in range(2 + i % 3)), "rights": right}
        for i, right in enumerate(rights)
    ]


def outcome(completions: list[str], rights: list[float], **_: Any) -> list[float | None]:
    """Score by the number of the completion, which is its first word."""
    numbers = [int(text.split()[0].removeprefix("w")) - 10 for text in completions]
    return [
        None if right != right else float(number < right)
        for number, right in zip(numbers, rights, strict=True)
    ]


def math_ok(prompts: list[str], **kwargs: Any) -> list[float | None]:
    """Score the problems of one task, those of two words."""
    scored = zip(prompts, outcome(**kwargs), strict=True)
    return [value if len(prompt.split()) == 2 else None for prompt, value in scored]


def code_ok(prompts: list[str], **kwargs: Any) -> list[float | None]:
    """Score the problems of the other task."""
    scored = zip(prompts, outcome(**kwargs), strict=True)
    return [None if len(prompt.split()) == 2 else value for prompt, value in scored]


def first_of_tasks(rewards: dict[str, float | None], row: Mapping[str, Any]) -> float | None:
    """A rule: the outcome of the task that the row belongs to."""
    return rewards["math_ok" if len(row["prompt"].split()) == 2 else "code_ok"]


def length_bonus(completions: list[str], **_: Any) -> list[float]:
    return [0.1 * len(text.split()) for text in completions]


def word_parity(completions: list[str], **_: Any) -> list[float]:
    """Score sampled completions: an odd number of words is right."""
    return [float(len(text.split()) % 2) for text in completions]


class Ramp(AdaptiveTemperature):
    """Heat that grows with the number of the call, so that a shift by one shows."""

    def temperatures(self, entropy: torch.Tensor, statistics: Any, base: float) -> torch.Tensor:
        self.calls.append(entropy)  # type: ignore[attr-defined]
        return torch.full_like(entropy, base * (1 + 0.5 * len(self.calls)))  # type: ignore[attr-defined]


def make_ramp() -> Ramp:
    ramp = Ramp()
    object.__setattr__(ramp, "calls", [])
    return ramp


def written(prompt: list[int], number: int) -> list[int]:
    """Return the completion that is 'generated': its number, ragged words, the end."""
    length = 1 + (sum(prompt) + number) % 3
    return [10 + number, *((3 * sum(prompt) + 5 * number + k) % 60 + 2 for k in range(length)), 1]


def make_grpo_trainer(
    folder: Path | str,
    rights: Sequence[float] = (2,) * 8,
    *,
    model: Any = None,
    rewards: Any = outcome,
    known: bool = True,
    stream: bool = False,
    kind: Any = GRPOTrainer,
    **changes: Any,
) -> GRPOTrainer:
    """Return a trainer on problems with these numbers of right answers.

    Args:
        folder: For its output.
        rights: See :func:`make_problems`.
        model: By default a tiny Llama.
        rewards: Reward functions.
        known: Whether completions are those of :func:`written` instead of sampled ones.
        stream: Whether the problems are a stream.
        kind: Class of the trainer.
        **changes: Arguments of the configuration.
    """
    values = {
        "num_generations": GENERATIONS,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        **changes,
    }
    dataset = Dataset.from_list(make_problems(rights))
    trainer = kind(
        make_model() if model is None else model,
        reward_funcs=rewards,
        args=GRPOConfig(**arguments(folder, **values)),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        processing_class=make_tokenizer(),
    )
    if known:
        count = values["num_generations"]
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes

        def single_turn(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            start = rank * len(prompt_ids) if ranks > 1 else 0  # rows of a group may straddle ranks
            return [written(p, (start + i) % count) for i, p in enumerate(prompt_ids)], None

        trainer._generate_single_turn = single_turn
    return trainer


def attach(trainer: Any, **options: Any) -> RolloutSelection:
    callback = RolloutSelection(trainer, **options)
    trainer.add_callback(callback)
    return callback


class OwnLoss(GRPOTrainer):
    """A loss that nothing of TRL's has a hand in: the mean over rows of ``-A sum_t log p``."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        rows = -inputs["advantages"] * (chosen * inputs["completion_mask"]).sum(dim=1)
        return self.reduced(rows, inputs) / self.current_gradient_accumulation_steps

    def reduced(self, rows: torch.Tensor, inputs: Any) -> torch.Tensor:
        return rows.mean()


class OwnItems(OwnLoss):
    """The same divided by the tokens of the whole batch, which the trainer has counted."""

    def reduced(self, rows: torch.Tensor, inputs: Any) -> torch.Tensor:
        return rows.sum() * self.args.steps_per_generation / inputs["num_items_in_batch"]


def spy(trainer: Any) -> list[dict[str, Any]]:
    """Collect the generation batches that the trainer trains on."""
    made: list[dict[str, Any]] = []
    original = trainer._generate_and_score_completions

    def noted(inputs: Any) -> Any:
        batch = original(inputs)
        if trainer.model.training:
            made.append(batch)
        return batch

    trainer._generate_and_score_completions = noted
    return made


def rows(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Return prompt, completion and advantage of each row that carries loss, sorted."""
    found = []
    for i in range(batch["prompt_ids"].shape[0]):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        if len(answer):
            value = round(float(batch["advantages"][i]), 5)
            found.append((tuple(prompt.tolist()), tuple(answer.tolist()), value))
    return sorted(found)


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
