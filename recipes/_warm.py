"""The start that all runs of the demo share: corpus, warm model, losses of the reference.

Building it takes about a minute, so it is kept in a folder named after its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from onlinesel.recipes._corpus import CorpusSettings, build_corpus
from onlinesel.scoring import CausalLMScorer

__all__ = ["Start", "WarmSettings", "as_dataset", "load_start", "prepare", "reference_losses"]

_FORMAT = 2  # of the folder; raise it when the meaning of its files changes


@dataclass(frozen=True)
class WarmSettings:
    """The model and its plain training before anything is compared.

    Args:
        corpus: How the data are cut.
        layers: Layers of the Llama.
        width: Its hidden size; the feed-forward part is twice as wide.
        steps: Optimizer steps of the warm-up.
        batch: Rows of each of them.
        rate: Their highest learning rate.
    """

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    layers: int = 4
    width: int = 128
    steps: int = 450
    batch: int = 8
    rate: float = 1e-3

    def key(self) -> str:
        """Return a short name of everything that the result depends on."""
        versions = [_FORMAT, platform.python_version(), torch.__version__]
        text = json.dumps([dataclasses.asdict(self), versions])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Start:
    """What every run starts from; ``facts`` tells what making it cost.

    Attributes:
        folder: Where it is kept.
        held_out: ``(rows, length)`` tokens.
        pool: ``(rows, length)`` tokens to fine-tune on.
        corrupted: ``(pool,)`` which of them are.
        reference_loss: ``(pool,)`` loss of each under the warm model.
        facts: ``held_out_loss``, ``warm_seconds``, ``reference_cpu_seconds`` and the like.
    """

    folder: Path
    held_out: Tensor
    pool: Tensor
    corrupted: Tensor
    reference_loss: Tensor
    facts: dict[str, Any]

    def model(self) -> LlamaForCausalLM:
        """Return a fresh copy of the warm model."""
        return LlamaForCausalLM.from_pretrained(self.folder / "model")

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def as_dataset(rows: Tensor, **columns: list[Any]) -> Dataset:
    """Return rows of tokens as a dataset for a causal LM, with further columns."""
    tokens = rows.tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens, **columns})


def load_start(folder: Path) -> Start:
    """Read what :func:`prepare` has written."""
    tensors = torch.load(folder / "data.pt", weights_only=True)
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    return Start(folder, facts=facts, **tensors)


def prepare(
    settings: WarmSettings,
    cache: Path,
    *,
    fresh: bool = False,
    each: Callable[..., Iterable[Any]] = map,
) -> tuple[Start, bool]:
    """Return the start for these settings, and whether it came from the cache.

    Args:
        settings: Model, corpus and warm-up.
        cache: Folder that holds one folder for each settings used so far.
        fresh: Build it again even if it is there.
        each: ``map``, or that of a pool of processes.
    """
    folder = cache / settings.key()
    # The folder appears in one move, whole: an interrupted build leaves nothing to be mistaken.
    if folder.exists() and not fresh:
        return load_start(folder), True
    draft = cache / f"{settings.key()}.{os.getpid()}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _build(settings, draft, each)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_start(folder), False


def _build(settings: WarmSettings, folder: Path, each: Callable[..., Iterable[Any]]) -> None:
    set_verbosity_error()
    disable_progress_bar()
    # A second thread gains a third on an idle machine, and on a busy one costs twenty times.
    torch.set_num_threads(1)
    began = time.perf_counter()
    print("  reading the standard library, training the tokenizer", flush=True)
    corpus = build_corpus(settings.corpus)
    corpus.tokenizer.save(str(folder / "tokenizer.json"))
    print(f"  warming the model up: {settings.steps} steps of {settings.batch} rows", flush=True)
    warm_began = time.perf_counter()
    model, loss = _warm_up(settings, corpus.warm, corpus.held_out, folder)
    warm_seconds = time.perf_counter() - warm_began
    model.save_pretrained(folder / "model")
    print(f"  reference losses of {len(corpus.pool)} rows", flush=True)
    # As lists: tensors would go to another process through shared memory, which may be small.
    parts = [part.tolist() for part in corpus.pool.chunk(2)]
    losses, seconds = zip(*each(reference_losses, [folder] * len(parts), parts), strict=True)
    facts = {
        "settings": dataclasses.asdict(settings),
        "held_out_loss": loss,
        "parameters": model.num_parameters(),
        "warm_seconds": warm_seconds,
        "reference_cpu_seconds": sum(seconds),
        "seconds": time.perf_counter() - began,
    }
    tensors = {
        "held_out": corpus.held_out,
        "pool": corpus.pool,
        "corrupted": corpus.corrupted,
        "reference_loss": torch.tensor([loss for part in losses for loss in part]),
    }
    torch.save(tensors, folder / "data.pt")
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), "utf-8")


def _warm_up(
    settings: WarmSettings, rows: Tensor, held_out: Tensor, folder: Path
) -> tuple[LlamaForCausalLM, float]:
    set_seed(settings.corpus.seed)
    config = LlamaConfig(
        vocab_size=settings.corpus.vocab,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=settings.corpus.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=32,
        prediction_loss_only=True,
        learning_rate=settings.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.steps // 10,
        seed=settings.corpus.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(held_out),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, trainer.evaluate()["eval_loss"]


def reference_losses(folder: Path, rows: list[list[int]]) -> tuple[list[float], float]:
    """Return the loss of each row under the warm model of a folder, and the CPU seconds it took."""
    disable_progress_bar()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    began = time.process_time()
    scorer = CausalLMScorer(("loss",))
    batches = torch.tensor(rows).split(32)
    losses = [scorer(model, {"input_ids": part, "labels": part}).loss for part in batches]
    return torch.cat(losses).tolist(), time.process_time() - began
