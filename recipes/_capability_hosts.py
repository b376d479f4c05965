"""One tiny run of each host, to see whether a method or a setting works there.

A run takes two optimizer steps on a CPU. It is said to work if it ends, its loss is finite, the
weights moved and the host logged what was chosen; what our own code refuses is quoted.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import onlinesel
from onlinesel.callbacks.dpo import PreferenceSelection
from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.rl import TARS, PassRateBand

__all__ = ["HOSTS", "Case", "probe"]

_VOCABULARY = {"<pad>": 0, "<end>": 1, **{str(n): n + 2 for n in range(62)}}
_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1, "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False,
    "dataloader_pin_memory": False, "gradient_checkpointing": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is tried.

    Args:
        method: The row method, or the parts of ``RolloutSelection`` by name.
        options: More arguments of the callback, or of ``onlinesel.steps``.
        arguments: More training arguments of the host.
        lora: Whether an adapter trains.
        dtype: Of the weights.
        streamed: Whether rows come from a stream.
    """

    method: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False
    dtype: torch.dtype = torch.float32
    streamed: bool = False


def _model(case: Case) -> Any:
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, pad_token_id=0, **sizes)
    model: Any = LlamaForCausalLM(config)
    if case.lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model.to(case.dtype)


def _tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def _rows() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    rows = []
    for n in range(64):
        ids = torch.randint(2, 64, (4 + n % 5,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def _dataset(case: Case, rows: list[dict[str, Any]]) -> Any:
    data = Dataset.from_list(rows)
    return data.to_iterable_dataset() if case.streamed else data


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        lists = [[1] * len(r["input_ids"]) if name == "mask" else r[name] for r in rows]
        return torch.tensor([values + [fill] * (width - len(values)) for values in lists])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": padded("mask", 0),
    }


def _options(case: Case, model: Any) -> dict[str, Any]:
    """Return the arguments of a callback about rows; a reference is the model itself."""
    alone = not case.method.needs and not hasattr(case.method, "drop")
    options = {"candidates": 1 if alone else 2, **case.options}
    if "reference_loss" in case.method.needs:
        options["reference"] = "adapter" if case.lora else _model(case)
    return options


def _train(trainer: Any, prefix: str) -> None:
    """Train, and complain of what is not as it must be."""
    trainer.remove_callback(PrinterCallback)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    _check(before, trainer.model, log[-1]["loss"])
    if not any(name.startswith(prefix) for entry in log for name in entry):
        raise AssertionError(f"nothing named {prefix}... was logged")


def _check(before: Mapping[str, Tensor], model: nn.Module, loss: float) -> None:
    if not math.isfinite(loss):
        raise AssertionError(f"the loss is {loss}")
    after = dict(model.named_parameters())
    if all(torch.equal(before[name], after[name]) for name in before):
        raise AssertionError("no weight moved")


def _hf(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = _model(case)
        args = TrainingArguments(folder, **{**_ARGUMENTS, **case.arguments})
        data = _dataset(case, _rows())
        trainer = Trainer(model, args, train_dataset=data, data_collator=_collate)
        trainer.add_callback(OnlineSelection(trainer, case.method, **_options(case, model)))
        _train(trainer, "selection/")


def _sft(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = _model(case)
        args = SFTConfig(folder, **{"max_length": 16, **_ARGUMENTS, **case.arguments})
        texts = [{"text": " ".join(str(n % 60) for n in row["input_ids"])} for row in _rows()]
        trainer = SFTTrainer(
            model, args, train_dataset=_dataset(case, texts), processing_class=_tokenizer()
        )
        trainer.add_callback(OnlineSelection(trainer, case.method, **_options(case, model)))
        _train(trainer, "selection/")


def _dpo(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, max_length=None, **{**_ARGUMENTS, **case.arguments})
        pairs = [
            {"prompt": f"{n} 3", "chosen": f"{n % 5} 4 9", "rejected": f"7 {n % 3}"}
            for n in range(16)
        ]
        trainer = DPOTrainer(
            _model(case), None if case.lora else _model(case), args,
            train_dataset=_dataset(case, pairs), processing_class=_tokenizer(),
        )  # fmt: skip
        trainer.add_callback(PreferenceSelection(trainer, TARS(), **case.options))
        _train(trainer, "selection/")


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


def _grpo(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_generations": 4, "max_completion_length": 3, "beta": 0.0}
        values = {**_ARGUMENTS, "per_device_train_batch_size": 8, **sizes, **case.arguments}
        prompts = _dataset(case, [{"prompt": f"{n} {n % 7}"} for n in range(48)])
        parts = case.method if isinstance(case.method, Mapping) else {"gate": PassRateBand()}
        trainer = GRPOTrainer(
            _model(case), _reward, GRPOConfig(folder, **values), prompts, None, _tokenizer()
        )
        trainer.add_callback(RolloutSelection(trainer, **parts, **case.options))
        _train(trainer, "rollouts/")


def _steps(case: Case) -> None:
    model = _model(case)
    if case.arguments.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows: Any = _Streamed(_rows()) if case.streamed else _rows()
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=_collate)
    accumulate = case.arguments.get("gradient_accumulation_steps", 1)
    options = {**_options(case, model), "accumulate": accumulate}
    for step in onlinesel.steps(loader, model, case.method, **options):
        for micro in step:
            batch = micro.batch
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            micro.loss(onlinesel.token_losses(logits, batch["labels"])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step.index == 1:
            break
    _check(before, model, step.mean_loss())


class _Streamed(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self._kept = rows

    def __iter__(self) -> Any:
        return iter(self._kept)


def _lightning(case: Case) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    from onlinesel.callbacks import lightning as host

    class Language(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = _model(case), math.nan
            if case.arguments.get("gradient_checkpointing"):
                self.model.gradient_checkpointing_enable()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = onlinesel.weighted_mean(onlinesel.token_losses(logits, batch["labels"]))
            self.loss = float(loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Language()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    rows: Any = _Streamed(_rows()) if case.streamed else _rows()
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=_collate)
    options = _options(case, module)
    trainer = LightningTrainer(
        max_steps=2, barebones=True, accelerator="cpu", devices=1,
        accumulate_grad_batches=case.arguments.get("gradient_accumulation_steps", 1),
        callbacks=[host.OnlineSelection(case.method, **options)],
    )  # fmt: skip
    trainer.fit(module, loader)
    _check(before, module, module.loss)


HOSTS: dict[str, Callable[[Case], None]] = {
    "Trainer": _hf, "SFTTrainer": _sft, "DPOTrainer": _dpo, "GRPOTrainer": _grpo,
    "Lightning": _lightning, "steps": _steps,
}  # fmt: skip
"""By the name of the host: runs a case, and raises what stands against it."""


def probe(host: str, case: Case) -> str | None:
    """Try a case in a host.

    Returns:
        None if it works, else the words with which our own code refuses it.

    Raises:
        Exception: It neither works nor is refused before the first step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            HOSTS[host](replace(case))
        except (ValueError, TypeError, NotImplementedError) as error:
            text = str(error)
            if " must " in text and text.split(":")[0].isidentifier():
                return " ".join(text.split())
            raise
    return None
