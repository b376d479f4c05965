"""GRPO that trains only on problems it can learn from, on a tiny model: under a minute on a CPU.

    python examples/grpo_trainer.py

The model answers with words at random, and is paid for even numbers. Some problems pay nothing and
some pay everything, so that their groups have no gradient; watch `rollouts/` in the log.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.rl import PassRateBand, Refill, Thompson

WORDS = {"<pad>": 0, "<end>": 1, **{str(n): n + 2 for n in range(62)}}


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def even(completions: list[str], kind: list[str], **_: Any) -> list[float]:
    """Pay for an even first number, unless the problem is trivial or impossible."""
    first = [int((text.split() or ["1"])[0]) for text in completions]  # an empty answer is odd
    paid = {"trivial": lambda n: 1.0, "impossible": lambda n: 0.0, "fair": lambda n: 1.0 - n % 2}
    return [paid[k](n) for k, n in zip(kind, first, strict=True)]


def main() -> None:
    """Train for 15 steps and show how many of the groups were worth training on."""
    set_seed(0)
    kinds = ["trivial", "impossible", "fair"]
    rows = [{"prompt": f"{n} {n % 7}", "kind": kinds[n % 3]} for n in range(60)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, num_generations=4, per_device_train_batch_size=16, max_completion_length=3,
            max_steps=15, learning_rate=1e-3, beta=0.0, bf16=False, use_cpu=True, logging_steps=5,
            report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(model, even, args, Dataset.from_list(rows), None, tokenizer())
        parts = {"gate": PassRateBand(0.25, 0.75), "refill": Refill(), "prompts": Thompson()}
        trainer.add_callback(RolloutSelection(trainer, **parts))
        trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    print(f"kept share of the groups: {last['rollouts/kept_share']:.2f}")


if __name__ == "__main__":
    main()
