"""How often a step of transformers' Trainer waits for the device, with rows chosen and without."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from onlinesel import strategies
from onlinesel.bench._measure import in_fresh_process
from onlinesel.bench._settings import find_device
from onlinesel.bench._simulated import simulation
from onlinesel.bench._waits import HostWaits, Wait
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.recipes._bench_trainer import PRESETS, StepSizes

__all__ = ["GOAL", "beyond_plain", "count_all_waits", "count_waits"]

GOAL = 2
"""Waits of a selected step beyond those of a plain one, at most."""

_PADDING = {"input_ids": 0, "labels": -100, "attention_mask": 0}


def count_waits(sizes: StepSizes, strategy: str) -> dict[str, Any]:
    """Count the host's waits in the second optimizer step, with rows chosen and without.

    On CUDA the device is waited for; on a CPU a simulated one, in a process of its own.

    Args:
        sizes: Model, rows, candidates, accumulation and device; ``strategy`` takes the place of
            theirs.
        strategy: Name of the method that chooses.

    Returns:
        JSON-ready: the settings, and under ``"rows"`` for ``"full"`` rows (all of one length,
        without a mask) and ``"padded"`` ones: the waits of a ``"plain"`` step, of a
        ``"selected"`` one, how many are ``"beyond"`` the plain step's, whether the goal is
        ``"met"``, and the ``"lines"`` of the selected step, see :func:`beyond_plain`. On CUDA also
        the ``"calls"`` that the profiler saw.
    """
    return count_all_waits([replace(sizes, strategy=strategy)])[0]


def count_all_waits(cases: Sequence[StepSizes]) -> list[dict[str, Any]]:
    """Return what :func:`count_waits` does for each case, in one process; all on one device."""
    if cases[0].where.type == "cpu":
        return in_fresh_process(_simulated, cases)
    return [_compared(sizes, sizes.where) for sizes in cases]


def _simulated(cases: Sequence[StepSizes]) -> list[dict[str, Any]]:
    with simulation() as device:
        return [_compared(sizes, device) for sizes in cases]


def _compared(sizes: StepSizes, device: torch.device) -> dict[str, Any]:
    found = {
        "device": str(device), "preset": sizes.preset, "strategy": sizes.strategy,
        "candidates": sizes.candidates, "accumulate": sizes.accumulate, "goal": GOAL,
    }  # fmt: skip
    kinds = {"full": False, "padded": True}
    return {**found, "rows": {name: _pair(sizes, device, p) for name, p in kinds.items()}}


def _pair(sizes: StepSizes, device: torch.device, padded: bool) -> dict[str, Any]:
    """Return the counts of a plain and of a selected step."""
    plain, selected = (_second_step(sizes, device, padded, chooses) for chooses in (False, True))
    lines = beyond_plain(selected.waits, plain.waits)
    beyond = sum(line["beyond"] for line in lines)
    found: dict[str, Any] = {
        "plain": len(plain.waits), "selected": len(selected.waits), "beyond": beyond,
        "met": beyond <= GOAL, "lines": lines,
    }  # fmt: skip
    if selected.calls:
        found["calls"] = {"plain": plain.calls, "selected": selected.calls}
    return found


def beyond_plain(selected: Sequence[Wait], plain: Sequence[Wait]) -> list[dict[str, Any]]:
    """List the waits of a selected step by line, with how many of them a plain step lacks.

    What the plain step waits for is found again in the host's code, though perhaps at another line
    of it: first below what is wrapped around the host's methods, then elsewhere, as in the
    scoring forward.
    """
    left = Counter(wait.kind for wait in plain)
    lines = []
    for wait, count in sorted(Counter(selected).items(), key=lambda item: _nearness(item[0])):
        own = wait.line.startswith("onlinesel.")
        shared = 0 if own else min(count, left[wait.kind])
        left[wait.kind] -= shared
        lines.append({**asdict(wait), "count": count, "beyond": count - shared})
    return lines


def _nearness(wait: Wait) -> int:
    """Return 0 for the host's own methods, 1 for what it is asked to do besides, 2 for ours."""
    if wait.line.startswith("onlinesel."):
        return 2
    return 0 if wait.through is None or "._on_" in wait.through else 1


class _SecondStep(TrainerCallback):
    """Watch from the end of the first step to the end of the second."""

    def __init__(self, device: torch.device) -> None:
        self.seen = HostWaits(device)
        self._open = ExitStack()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if state.global_step == 1:
            self._open.enter_context(self.seen)
        elif state.global_step == 2:
            self._open.close()


def _second_step(sizes: StepSizes, device: torch.device, padded: bool, chooses: bool) -> HostWaits:
    """Train two steps, and return what the second waited for."""
    watch = _SecondStep(device)
    rows = sizes.rows if chooses else sizes.rows * sizes.candidates
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=2,
            gradient_accumulation_steps=sizes.accumulate, learning_rate=1e-5, optim="adamw_torch",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=device.type != "cuda", seed=sizes.seed,
        )  # fmt: skip
        if device.type != "cuda":
            # Neither library knows the device, so each is told where it keeps what it has found.
            args.distributed_state.device = device
            args.__dict__["_setup_devices"] = device
        trainer = Trainer(
            _model(sizes, device), args, train_dataset=_rows(sizes, padded), data_collator=_collate
        )
        trainer.remove_callback(PrinterCallback)
        if chooses:
            strategy = getattr(strategies, sizes.strategy)()
            trainer.add_callback(
                OnlineSelection(trainer, strategy, candidates=sizes.candidates, seed=sizes.seed)
            )
        trainer.add_callback(watch)  # behind the selection, whose own end of a step is part of it
        trainer.train()
    return watch.seen


def _model(sizes: StepSizes, device: torch.device) -> Any:
    set_seed(sizes.seed)
    options: dict[str, Any] = {"tie_word_embeddings": True, **PRESETS[sizes.preset]}
    kind = find_device("bench_step", sizes.device, sizes.dtype)[1]
    with device:
        return AutoModelForCausalLM.from_config(Qwen2Config(**options, use_cache=False), dtype=kind)


def _rows(sizes: StepSizes, padded: bool) -> list[dict[str, Tensor]]:
    """Return random rows for three steps, of one length or of several."""
    found = []
    g = torch.Generator().manual_seed(sizes.seed)
    for row in sizes.data(3):
        if padded:
            length = int(torch.randint(sizes.tokens // 2, sizes.tokens, (), generator=g))
            row = {name: values[:length] for name, values in row.items()}
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            row["labels"] = row["labels"].clone()
            row["labels"][: length // 4] = -100  # the prompt
        found.append(row)
    return found


def _collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: pad_sequence([row[name] for row in rows], True, _PADDING[name]) for name in rows[0]
    }
