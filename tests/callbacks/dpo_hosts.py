"""Tiny preference trainers, and the naive loss that they are held against.

Run by torchrun on two processes, it trains one step and one run in parts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.functional import logsigmoid

from onlinesel.callbacks.dpo import PreferenceSelection
from onlinesel.rl.preference import TARS, PreferenceTerms, PreferenceTokens, PreferenceWeights
from tests.callbacks.hosts import (
    arguments,
    make_model,
    make_tokenizer,
    parameters,
    relative_error,
)
from tests.launching import begin, leave

BETA = 0.5
HIDE = TARS(differing=3.0, min_run=2, share=0.3)


@dataclass(frozen=True)
class Ones(PreferenceWeights):
    """Change nothing, whatever was asked for."""

    names: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return self.names

    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        return PreferenceTerms(torch.ones(tokens.ids.shape))


@dataclass(frozen=True)
class ById(PreferenceWeights):
    """Weights 0, 0.5, 1, 1.5 and 2 by the token's id, so that a test can compute them itself."""

    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        return PreferenceTerms((tokens.ids % 5) / 2)


@dataclass(frozen=True)
class ByColumn(PreferenceWeights):
    needs = ("clarity", "doubt")  # type: ignore[assignment]

    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        return PreferenceTerms(tokens.require(self, "clarity") + 1)


class Spy(PreferenceWeights):
    """Another method, whose questions and answers are kept."""

    def __init__(self, inner: PreferenceWeights) -> None:
        self.inner = inner
        self.asked: list[PreferenceTokens] = []
        self.answers: list[PreferenceTerms] = []

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.inner.needs

    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        self.asked.append(tokens)
        self.answers.append(self.inner.weigh(tokens, generator=generator))
        return self.answers[-1]


def make_pairs(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Ragged pairs whose answers share their middle."""
    g = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(f"w{i}" for i in torch.randint(3, 64, (size,), generator=g).tolist())

    rows = []
    for _ in range(count):
        shared = words(3, 6)
        chosen, rejected = (f"{words(1, 4)} {shared} {words(0, 4)} <eos>" for _ in range(2))
        rows.append({"prompt": words(2, 5), "chosen": chosen, "rejected": rejected})
    return rows


def make_reference() -> Any:
    model, noise = make_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


def make_dpo_trainer(
    folder: Path | str,
    *,
    adapter: Any = None,
    model: Any = None,
    evaluates: bool = False,
    **changes: Any,
) -> Any:
    from trl import DPOConfig, DPOTrainer

    values = {"bf16": False, "gradient_checkpointing": False, "max_length": None, "beta": BETA}
    lora = model is not None and hasattr(model, "peft_config")
    return DPOTrainer(
        make_model() if model is None else model,
        None if adapter or lora else make_reference(),
        DPOConfig(**arguments(folder, **{**values, **changes})),
        train_dataset=Dataset.from_list(make_pairs()),
        eval_dataset=Dataset.from_list(make_pairs(4, seed=5)) if evaluates else None,
        processing_class=make_tokenizer(),
        peft_config=adapter,
    )


def attach(trainer: Any, weights: PreferenceWeights, **options: Any) -> PreferenceSelection:
    callback = PreferenceSelection(trainer, weights, **options)
    trainer.add_callback(callback)
    return callback


def with_columns(trainer: Any, drop: int = 0) -> Any:
    """Add values that can be read off the ids: a seventh of the id, and minus the id."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            values[f"{side}_clarity"] = [i / 7 for i in ids][drop:]
            values[f"{side}_doubt"] = [-i for i in ids]
        return values

    trainer.train_dataset = trainer.train_dataset.map(add)
    return trainer


def history(trainer: Any) -> list[dict[str, float]]:
    noise = ("runtime", "per_second", "selection/")
    return [
        {k: v for k, v in logs.items() if not any(part in k for part in noise)}
        for logs in trainer.state.log_history
    ]


def same_parameters(one: Any, other: Any) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def pairs_of(trainer: Any, tokens: PreferenceTokens) -> list[tuple[list[int], list[int], int]]:
    """Find the rows of a micro-batch in the data: chosen, rejected, length of the prompt."""
    found = []
    half = tokens.ids.shape[0] // 2
    for i in range(half):
        texts = [row[: int(row.ne(0).sum())].tolist() for row in tokens.ids[[i, i + half]]]
        (row,) = [
            row
            for row in trainer.train_dataset
            if texts == [row["prompt_ids"] + row[f"{s}_ids"] for s in ("chosen", "rejected")]
        ]
        found.append((*texts, len(row["prompt_ids"])))
        for text, mask in zip(texts, tokens.mask[[i, i + half]], strict=True):
            wanted = [len(row["prompt_ids"]) <= t < len(text) for t in range(mask.shape[0])]
            assert mask.tolist() == wanted
    return found


def log_probs(model: Any, text: list[int], read: list[int] | None = None) -> torch.Tensor:
    """Log-probability of every token, 0 for the first, without padding and by the full softmax.

    ``read`` is what the model is given in place of the text that it is to predict.
    """
    given = text if read is None else read
    logits = model(input_ids=torch.tensor([given]), use_cache=False).logits[0]
    logits = logits[-len(given) : -1]  # prompt tuning puts virtual tokens in front
    found = logits.float().log_softmax(-1)[torch.arange(len(text) - 1), text[1:]]
    return torch.cat([torch.zeros(1), found])


def reference_log_probs(trainer: Any, *texts: Any) -> torch.Tensor:
    with torch.no_grad():
        if trainer.ref_model is not None:
            return log_probs(trainer.ref_model, *texts)
        if "ref" not in trainer.model.peft_config:
            with trainer.model.disable_adapter():
                return log_probs(trainer.model, *texts)
        trainer.model.set_adapter("ref")
        found = log_probs(trainer.model, *texts)
        trainer.model.set_adapter("default")
        return found


def log_ratio(trainer: Any, text: list[int], first: int, weights: Any, inputs: Any) -> Any:
    """Sum over the answer of weight times log-ratio; ``inputs`` is what both models read."""
    read = None if inputs is None else inputs[: len(text)].tolist()
    ratio = log_probs(trainer.model, text, read) - reference_log_probs(trainer, text, read)
    return (weights[: len(text)] * ratio)[first:].sum()


def by_hand(trainer: Any, spy: Spy, alpha: float | None = None) -> tuple[dict[str, Any], float]:
    """Return the gradient and the value of one optimizer step's loss."""
    trainer.model.zero_grad()
    trainer.model.eval()
    losses = []
    for tokens, terms in zip(spy.asked, spy.answers, strict=True):
        pairs = pairs_of(trainer, tokens)
        for i, (chosen, rejected, first) in enumerate(pairs):
            shared = min(len(chosen), len(rejected))
            ratios = []
            for row, text in ((i, chosen), (i + len(pairs), rejected)):
                weights = terms.weights[row].clone()
                weights[shared:] *= 1.0 if alpha is None else alpha
                inputs = None if terms.inputs is None else terms.inputs[row]
                ratios.append(log_ratio(trainer, text, first, weights, inputs))
            losses.append(-logsigmoid(BETA * (ratios[0] - ratios[1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    named = trainer.model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}, float(loss.detach())


def retrained() -> Any:
    """A model whose adapter exists already: TRL keeps a copy as the reference."""
    return make_model(lora=True)


def shake(model: Any) -> None:
    """Move the adapter that trains away from its start, so that the log-ratios are not 0."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ".ref." not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)


def step_by_hand(trainer: Any, weights: PreferenceWeights, **options: Any) -> tuple[float, Spy]:
    """Train one step; return the error of its gradient."""
    if hasattr(trainer.model, "peft_config"):
        shake(trainer.model)
    spy, before = Spy(weights), parameters(trainer.model)
    attach(trainer, spy, **options).trainer.train()
    after = parameters(trainer.model)
    trainer.model.load_state_dict(before, strict=False)
    gradient, loss = by_hand(trainer, spy, trainer.ld_alpha)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    return relative_error(before, after, gradient), spy


def train_in_parts(folder: Path, resume: bool, weights: PreferenceWeights = HIDE) -> Any:
    trainer = make_dpo_trainer(
        folder,
        max_steps=5,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        evaluates=True,
        eval_strategy="steps",
        eval_steps=1,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    spy = Spy(weights)
    attach(trainer, spy)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer, spy.answers


def same_answers(whole: list[PreferenceTerms], resumed: list[PreferenceTerms]) -> bool:
    pairs = list(zip(whole, resumed, strict=True))
    return all(torch.equal(a.weights, b.weights) for a, b in pairs)


def assert_resumes(folder: Path) -> None:
    first, whole = train_in_parts(folder, resume=False)
    second, resumed = train_in_parts(folder, resume=True)
    assert len(whole) == 10 and same_answers(whole[4:], resumed)
    assert same_parameters(first, second)


def one_step(folder: Path) -> None:
    """Train one step of this process's rows; what it saw and what came of it go to the folder."""
    trainer = make_dpo_trainer(folder, gradient_accumulation_steps=2)
    spy, before = Spy(HIDE), parameters(trainer.model)
    attach(trainer, spy, seed=3).trainer.train()
    asked = [(t.ids, t.mask, t.special) for t in spy.asked]
    weights = [t.weights for t in spy.answers]
    found = (asked, weights, before, parameters(trainer.model))
    torch.save(found, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    begin()
    one_step(Path(sys.argv[1]))
    assert_resumes(Path(sys.argv[1]) / "parts")
    if dist.get_rank() == 0:
        print("same", flush=True)
    leave()
