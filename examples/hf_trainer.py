"""Train on the best quarter of the candidates in a Hugging Face Trainer: one line more.

    python examples/hf_trainer.py

A tiny Llama learns sequences that count upwards, in a pool half of which is random numbers. UDS
chooses by the model's own predictions, without looking at the labels.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.strategies import UDS

VOCAB, LENGTH = 64, 24


def make_pool(rows: int) -> list[dict[str, list[int]]]:
    """Return rows that count upwards (even numbers) and rows of noise (odd numbers)."""
    generator = torch.Generator().manual_seed(0)
    counting = (torch.arange(rows).unsqueeze(1) + torch.arange(LENGTH)) % VOCAB
    noise = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    tokens = torch.where(torch.arange(rows).unsqueeze(1) % 2 == 0, counting, noise).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Train for 60 steps and show what was logged about the choice."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3,
            logging_steps=20, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=make_pool(512))
        # 8 rows train in a step, out of 32 that are looked at.
        trainer.add_callback(OnlineSelection(trainer, UDS(), candidates=4))
        trainer.train()
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    for name in ("loss", "selection/kept_share", "selection/score_share"):
        print(f"{name}: {float(last[name]):.3f}")


if __name__ == "__main__":
    main()
