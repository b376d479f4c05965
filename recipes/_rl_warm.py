"""The start of all reinforcement learning runs on a task: a small Llama after some practice.

Practice is supervised and short: it ends as soon as the model solves a given share of problems when
it samples. How many steps that takes differs a little from machine to machine; where it ends does
not. Making it takes about a minute, so it is kept in a folder named after its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from onlinesel.recipes._problems import (
    TASKS,
    Problem,
    Task,
    build_tokenizer,
    draw,
    evaluate,
    held_out,
    pass_rates,
)

__all__ = [
    "BATCHES",
    "TARGETS",
    "RLStart",
    "RLWarmSettings",
    "load_rl_start",
    "practise",
    "prepare_rl",
]

_FORMAT = 2  # of the folder and of the problems; raise it when either changes
_CHECK = 10  # steps between two looks at the share of solved problems
_DEVELOPMENT = 512

TARGETS = {"mixed": 0.18, "digits": 0.10}
"""Share of sampled completions of the goal's problems that are right where practice ends."""

BATCHES = {"mixed": 128, "digits": 64}
"""Problems of a step of practice."""


@dataclass(frozen=True)
class RLWarmSettings:
    """The model and its practice.

    Args:
        task: Name in :data:`onlinesel.recipes._problems.TASKS`.
        target: Share of sampled completions that are right where practice ends; that of
            :data:`TARGETS` by default.
        layers: Layers of the Llama.
        width: Its hidden size; the feed-forward part is twice as wide.
        batch: Problems of a step; that of :data:`BATCHES` by default.
        rate: Learning rate.
        limit: Steps after which practice ends anyway.
        seed: Of the weights and of the problems practised.
    """

    task: str
    target: float | None = None
    layers: int = 4
    width: int = 128
    batch: int | None = None
    rate: float = 1e-3
    limit: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(
                f"RLWarmSettings: task must be one of {', '.join(TASKS)}, got {self.task!r}. "
                "Choose one of them."
            )
        if self.target is None:
            object.__setattr__(self, "target", TARGETS[self.task])
        if self.batch is None:
            object.__setattr__(self, "batch", BATCHES[self.task])

    def key(self) -> str:
        """Return a short name of everything that the result depends on."""
        versions = [_FORMAT, platform.python_version(), torch.__version__]
        text = json.dumps([dataclasses.asdict(self), versions])
        return f"{self.task}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class RLStart:
    """What every run starts from.

    Attributes:
        folder: Where it is kept.
        facts: ``settings``, ``steps``, ``cpu_seconds`` of practice, ``goal`` and ``kinds`` (greedy
            held-out accuracy) and ``pass_rate`` of each kind.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def task(self) -> Task:
        """The task."""
        return TASKS[self.facts["settings"]["task"]]

    def model(self) -> LlamaForCausalLM:
        """Return a fresh copy of the model."""
        return LlamaForCausalLM.from_pretrained(self.folder)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer."""
        return build_tokenizer()


def load_rl_start(folder: Path) -> RLStart:
    """Read what :func:`prepare_rl` has written."""
    return RLStart(folder, json.loads((folder / "facts.json").read_text("utf-8")))


def prepare_rl(
    settings: RLWarmSettings, cache: Path, *, fresh: bool = False
) -> tuple[RLStart, bool]:
    """Return the start for these settings, and whether it came from the cache.

    Args:
        settings: Task, model and practice.
        cache: Folder that holds one folder for each settings used so far.
        fresh: Make it again even if it is there.
    """
    folder = cache / settings.key()
    # The folder appears in one move, whole: an interrupted build leaves nothing to be mistaken.
    if folder.exists() and not fresh:
        return load_rl_start(folder), True
    draft = cache / f"{settings.key()}.{os.getpid()}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        model, facts = practise(settings)
        model.save_pretrained(draft)
        (draft / "facts.json").write_text(json.dumps(facts, indent=1), "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_rl_start(folder), False


def practise(settings: RLWarmSettings) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a new model on problems of the warm part, and return it with the facts about it.

    Args:
        settings: Task, model and practice.
    """
    assert settings.batch is not None and settings.target is not None  # filled in by the settings
    torch.set_num_threads(1)
    set_seed(settings.seed)
    task, tokenizer = TASKS[settings.task], build_tokenizer()
    model = _new_model(settings, tokenizer)
    rng = random.Random(f"practice {settings.seed}")
    goal = {kind: task.practice[kind] for kind in task.goal}
    # As many of each kind as the pool has, for that is what runs will meet.
    development = [
        draw(task, kind, "warm", rng)
        for kind in rng.choices(task.goal, [task.pool[kind] for kind in goal], k=_DEVELOPMENT)
    ]
    # Gradients of a small model change fast: a long memory of their size slows the start down.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    began, rate = time.process_time(), 0.0
    for step in range(1, settings.limit + 1):  # noqa: B007, its last value is a fact
        optimizer.param_groups[0]["lr"] = settings.rate * min(1.0, step / 50)
        kinds = rng.choices(list(task.practice), list(task.practice.values()), k=settings.batch)
        ids, labels = _rows([draw(task, kind, "warm", rng) for kind in kinds], tokenizer)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _CHECK == 0:
            rates = pass_rates(model, tokenizer, development)
            rate = sum(rates) / len(rates)
            if rate >= settings.target:
                break
    spent = time.process_time() - began
    model.eval()
    facts = {
        "settings": dataclasses.asdict(settings),
        "parameters": model.num_parameters(),
        "steps": step,
        "cpu_seconds": spent,
        "development_pass_rate": rate,
        **_measure(model, tokenizer, task),
    }
    return model, facts


def _new_model(settings: RLWarmSettings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=2 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            # From larger weights practice is shorter, but what it teaches hardly carries over to
            # problems not seen, and reinforcement learning then moves several times more slowly.
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _rows(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, ``(rows, longest)``; labels only for the answer and the end.

    Rows are filled up at their right end, where a causal model needs no mask.
    """
    texts = tokenizer([p.prompt + p.answer + tokenizer.eos_token for p in problems])["input_ids"]
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (tokens, problem) in enumerate(zip(texts, problems, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        start = len(problem.prompt)
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return ids, labels


def _measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task
) -> dict[str, Any]:
    problems = held_out(task)
    accuracy = evaluate(model, tokenizer, task, problems)
    rates: dict[str, list[float]] = {}
    for problem, rate in zip(problems, pass_rates(model, tokenizer, problems), strict=True):
        rates.setdefault(problem.kind, []).append(rate)
    means = {kind: sum(rates[kind]) / len(rates[kind]) for kind in sorted(rates)}
    return {"goal": accuracy.goal, "kinds": accuracy.kinds, "pass_rate": means}
