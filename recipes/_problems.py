"""Problems made by rule, with answers that a program can check, for reinforcement learning.

Two tasks. ``mixed`` has prompts of three sorts that are easy to tell apart: copies of a digit
(trivial), sums of two-digit numbers (learnable) and riddles (impossible: no answer is ever paid).
``digits`` has one sort of prompt and a difficulty that grows smoothly: sums of numbers of 1 to 6
digits, of which a model that has practised the short ones more solves the longer ones less often.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "PARTS",
    "TASKS",
    "Accuracy",
    "Problem",
    "Task",
    "build_tokenizer",
    "columns",
    "correct",
    "draw",
    "evaluate",
    "greedy",
    "held_out",
    "part_of",
    "pass_rates",
    "pool",
]

PARTS = {"held_out": 0.2, "train": 0.4, "warm": 0.4}
"""Share of all problems that a task can make in each part."""

_PAD, _END = "<pad>", "<end>"
_SYMBOLS = "0123456789+=ach"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        kind: What sort it is; for ``digits`` the number of digits.
        prompt: What the model is given.
        answer: The only completion that is paid, or "" if none is.
    """

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A source of problems.

    Args:
        make: For each kind, makes one problem of it.
        practice: Share of each kind in supervised practice before reinforcement learning.
        pool: Training prompts of each kind.
        held_out: Held-out problems of each kind.
        goal: Kinds whose held-out accuracy is what training is for.
        tokens: Longest completion: one more than the longest answer, for the end.
    """

    make: dict[str, Callable[[random.Random], Problem]]
    practice: dict[str, float]
    pool: dict[str, int]
    held_out: dict[str, int]
    goal: tuple[str, ...]
    tokens: int


def part_of(prompt: str) -> str:
    """Return the part that a prompt belongs to, from a hash of it alone.

    Example:
        >>> part_of("a12+34=") in PARTS
        True
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    for part, share in PARTS.items():
        at -= share
        if at < 0:
            return part
    return part


def draw(task: Task, kind: str, part: str, rng: random.Random) -> Problem:
    """Return a random problem of one kind and part."""
    while True:
        problem = task.make[kind](rng)
        if part_of(problem.prompt) == part:
            return problem


def pool(task: Task, seed: int = 0) -> list[Problem]:
    """Return the training problems of a task, each prompt once, in random order.

    Example:
        >>> rows = pool(TASKS["mixed"])
        >>> len(rows) == len({row.prompt for row in rows}) == 2000
        True
    """
    return _distinct(task, task.pool, "train", random.Random(f"train {seed}"))


def held_out(task: Task, seed: int = 0) -> list[Problem]:
    """Return the held-out problems of a task, each once; no training prompt is among them."""
    return _distinct(task, task.held_out, "held_out", random.Random(f"held out {seed}"))


def _distinct(task: Task, counts: dict[str, int], part: str, rng: random.Random) -> list[Problem]:
    found: dict[str, Problem] = {}
    for kind, count in counts.items():
        wanted = len(found) + count
        while len(found) < wanted:
            problem = draw(task, kind, part, rng)
            found[problem.prompt] = problem
    problems = list(found.values())
    rng.shuffle(problems)
    return problems


def columns(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Return the problems as columns, for ``datasets.Dataset.from_dict``."""
    return {name: [getattr(p, name) for p in problems] for name in ("prompt", "answer", "kind")}


def correct(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1.0 for every completion that is its answer, else 0.0: a reward function for TRL.

    Args:
        completions: Texts of the completions.
        answer: The answer for each; "" pays nothing, not even an empty completion.

    Example:
        >>> correct(["46", "47", ""], answer=["46", "46", ""])
        [1.0, 0.0, 0.0]
    """
    return [
        float(bool(right) and given == right)
        for given, right in zip(completions, answer, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character."""
    vocab = {symbol: number for number, symbol in enumerate((_PAD, _END, *_SYMBOLS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# Held-out evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Share of problems whose greedy completion is the answer.

    Attributes:
        goal: Over the kinds that the task is for.
        kinds: For each kind.
    """

    goal: float
    kinds: dict[str, float]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    problems: Sequence[Problem],
) -> Accuracy:
    """Return the accuracy of greedy completions.

    Args:
        model: A causal LM; it is put back into the mode it was in.
        tokenizer: Of :func:`build_tokenizer`.
        task: What the problems are from.
        problems: Usually :func:`held_out`.
    """
    texts = greedy(model, tokenizer, [p.prompt for p in problems], task.tokens)
    paid = correct(texts, [p.answer for p in problems])
    scores: dict[str, list[float]] = {}
    for problem, score in zip(problems, paid, strict=True):
        scores.setdefault(problem.kind, []).append(score)
    goal = [score for kind in task.goal for score in scores.get(kind, [])]
    kinds = {kind: sum(scores[kind]) / len(scores[kind]) for kind in sorted(scores)}
    return Accuracy(sum(goal) / max(len(goal), 1), kinds)


@torch.no_grad()
def pass_rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> list[float]:
    """Return the share of completions sampled at temperature 1 that would be paid, exactly.

    It is the probability that the model gives to the answer and the end after it.

    Args:
        model: A causal LM.
        tokenizer: Of :func:`build_tokenizer`.
        problems: Any number of them; those without an answer have the rate 0.
    """
    rates = [0.0] * len(problems)
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, problem in enumerate(problems):
        if problem.answer:
            shapes.setdefault((len(problem.prompt), len(problem.answer)), []).append(row)
    for (start, _), rows in shapes.items():
        texts = [problems[row].prompt + problems[row].answer + _END for row in rows]
        ids = torch.tensor(tokenizer(texts)["input_ids"], device=model.device)
        logs = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
        found = logs.gather(-1, ids[:, start:, None]).sum((1, 2)).exp()
        for row, rate in zip(rows, found.tolist(), strict=True):
            rates[row] = rate
    return rates


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    tokens: int,
) -> list[str]:
    """Return the most likely completion of each prompt.

    Prompts of one length go together, so that none needs padding.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        prompts: Any number of them.
        tokens: Longest completion.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    lengths: dict[int, list[int]] = {}
    for row, ids in enumerate(encoded):
        lengths.setdefault(len(ids), []).append(row)
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for rows in lengths.values():
            batch = torch.tensor([encoded[row] for row in rows], device=model.device)
            end = tokenizer.eos_token_id
            for row, ids in zip(rows, _extend(model, batch, tokens, end).tolist(), strict=True):
                ids = ids[: [*ids, end].index(end)]
                texts[row] = str(tokenizer.decode(ids, skip_special_tokens=True))
    finally:
        model.train(training)
    return texts


def _extend(model: PreTrainedModel, batch: Tensor, tokens: int, end: int) -> Tensor:
    """Return ``(rows, at most tokens)`` greedy tokens after a batch of prompts of one length."""
    made: list[Tensor] = []
    over = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    cache = None
    while len(made) < tokens and not over.all():
        out = model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, batch = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(batch)
        over |= batch[:, 0] == end
    return torch.cat(made, dim=1)


# The tasks ----------------------------------------------------------------------------------------


def _copy(rng: random.Random) -> Problem:
    text = f"{rng.randrange(10_000):04d}"
    return Problem("copy", f"c{text}=", text[-1])


def _sum(rng: random.Random) -> Problem:
    one, other = rng.randrange(10, 100), rng.randrange(10, 100)
    return Problem("sum", f"a{one}+{other}=", str(one + other))


def _riddle(rng: random.Random) -> Problem:
    return Problem("riddle", f"h{rng.randrange(10_000):04d}=", "")


_WIDTH = 6


def _long_sum(digits: int) -> Callable[[random.Random], Problem]:
    """Return a maker of sums of two numbers of so many digits.

    They are written from the units on and filled up with zeros: a digit of the answer then needs
    what stands at fixed distances before it, in short numbers and in long ones, and what is learnt
    on the one helps with the other.
    """
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits

    def write(number: int, width: int) -> str:
        return str(number)[::-1].ljust(width, "0")

    def make(rng: random.Random) -> Problem:
        one, other = rng.randrange(low, high), rng.randrange(low, high)
        prompt = f"{write(one, _WIDTH)}+{write(other, _WIDTH)}="
        return Problem(str(digits), prompt, write(one + other, _WIDTH + 1))

    return make


_DIGITS = tuple(str(digits) for digits in range(1, _WIDTH + 1))

TASKS: dict[str, Task] = {
    "mixed": Task(
        {"copy": _copy, "sum": _sum, "riddle": _riddle},
        practice={"copy": 1, "sum": 2},
        pool={"copy": 800, "sum": 400, "riddle": 800},
        held_out={"copy": 50, "sum": 500},
        goal=("sum",),
        tokens=4,
    ),
    "digits": Task(
        {kind: _long_sum(int(kind)) for kind in _DIGITS},
        practice={"1": 6, "2": 5, "3": 4, "4": 3, "5": 2, "6": 1},
        # There are only a hundred sums of two digits, and a fifth of them is held out.
        pool={"1": 25} | dict.fromkeys(_DIGITS[1:], 395),
        held_out={"1": 15} | dict.fromkeys(_DIGITS[1:], 97),
        goal=_DIGITS,
        tokens=_WIDTH + 2,
    ),
}
"""The tasks by name."""
