"""Tiny trainers, and the naive reference that their gradients are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from onlinesel.callbacks.hf import OnlineSelection

LEARNING_RATE = 0.5
ASKED = 5
"""Forwards of one row before the first step, by which the model is asked what its loss does."""


def make_model(lora: bool = False, **config: Any) -> Any:
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **depth, "pad_token_id": 0, **config}))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the gradient of lora_A
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def checkpointed(model: Any) -> Any:
    """Let a model checkpoint its layers, by the name that transformers has for it."""
    name = "activation_checkpointing_enable"  # newer transformers
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    return model


def make_rows(count: int = 48, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of ragged length whose first two tokens carry no loss."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 13, (1,), generator=g))
        ids = torch.randint(1, 64, (length,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def collate(features: list[dict[str, list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
    width = max(len(f["input_ids"]) for f in features)

    def pad(values: list[int], fill: int) -> list[int]:
        extra = [fill] * (width - len(values))
        return values + extra if side == "right" else extra + values

    return {
        "input_ids": torch.tensor([pad(f["input_ids"], 0) for f in features]),
        "labels": torch.tensor([pad(f["labels"], -100) for f in features]),
        "attention_mask": torch.tensor([pad([1] * len(f["input_ids"]), 0) for f in features]),
    }


def arguments(folder: Path | str, **changes: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return {**values, **changes}


def make_trainer(
    folder: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    collator: Any = collate,
    **changes: Any,
) -> Trainer:
    return Trainer(
        make_model() if model is None else model,
        TrainingArguments(**arguments(folder, **changes)),
        train_dataset=make_rows() if rows is None else rows,
        data_collator=collator,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    )


def make_sft_trainer(
    folder: Path | str, *, model: Any = None, rows: Any = None, **changes: Any
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    values = {"bf16": False, "gradient_checkpointing": False, "max_length": None, **changes}
    config = SFTConfig(**arguments(folder, **values), dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        make_model() if model is None else model,
        config,
        train_dataset=Dataset.from_list(make_rows() if rows is None else rows),
        processing_class=make_tokenizer(),
    )


def attach(trainer: Any, strategy: Any, **options: Any) -> OnlineSelection:
    callback = OnlineSelection(trainer, strategy, **options)
    trainer.add_callback(callback)
    return callback


def choices(folder: Path | str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "choices.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def reference_gradient(
    model: Any,
    rows: list[dict[str, list[int]]],
    ids: list[int],
    weights: list[float],
    normalize: str,
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the gradient and value of the loss contract, row by row and without padding."""
    model.zero_grad()
    model.eval()
    total, denominator = torch.zeros(()), 0.0
    for i, weight in zip(ids, weights, strict=True):
        if weight == 0:
            continue
        tokens = torch.tensor([rows[i]["input_ids"]])
        labels = torch.tensor(rows[i]["labels"][1:])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        summed = cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count = int((labels != -100).sum())
        total = total + weight * (summed if normalize == "tokens" else summed / count)
        denominator += weight * (count if normalize == "tokens" else 1.0)
    loss = total / denominator
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradient, float(loss.detach())


def relative_error(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    gradient: dict[str, torch.Tensor],
) -> float:
    """Compare one SGD step with the reference's gradient."""
    moved = torch.cat([((before[n] - after[n]) / LEARNING_RATE).flatten() for n in before])
    wanted = torch.cat([gradient[n].flatten() for n in before])
    return float((moved - wanted).norm() / wanted.norm())
