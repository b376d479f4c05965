"""A method of your own: a frozen dataclass with one function, and no registration.

    python examples/own_strategy.py

`MiddleLoss` leaves out the rows that the model already knows and those that it may never learn.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from onlinesel import Selection, Signals, State, Strategy
from onlinesel.callbacks.hf import OnlineSelection


@dataclass(frozen=True)
class MiddleLoss(Strategy):
    """Keep the rows whose loss is closest to a quantile of the candidates' losses."""

    quantile: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("loss",)  # the trainer computes what is named here

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Give weight 1 to the rows that train, and 0 to the rest."""
        loss = signals.require(self, "loss")
        score = -(loss - loss.nanquantile(self.quantile)).abs()
        weights = torch.zeros(signals.size)
        weights[score.nan_to_num(-torch.inf).topk(keep).indices] = 1.0
        return Selection(weights, score), state


def main() -> None:
    """Train a tiny model with it and show what was kept."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
    rows = torch.randint(64, (256, 16)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10, per_device_train_batch_size=4, logging_steps=5, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.add_callback(OnlineSelection(trainer, MiddleLoss(0.5), candidates=4))
        trainer.train()
    print(f"kept: {trainer.state.log_history[0]['selection/kept_share']:.2f}")


if __name__ == "__main__":
    main()
