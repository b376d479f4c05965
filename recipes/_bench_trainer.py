"""One side of ``onlinesel bench step``: a model, transformers' Trainer, and what is seen of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
from onlinesel._base.words import did_you_mean
from onlinesel.bench._measure import CountedProducts, Peak
from onlinesel.bench._settings import at_least, clock, find_device
from onlinesel.callbacks.hf import OnlineSelection

__all__ = [
    "IDLE",
    "PRESETS",
    "SIDES",
    "FirstStep",
    "Side",
    "StepSizes",
    "first_step",
    "seconds",
    "step_peak",
]

PRESETS = {
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    ),
    "small": dict(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=8192,
    ),
    "qwen2.5-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936,
    ),
    "qwen2.5-1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936,
    ),
    "qwen2.5-3b": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936,
    ),
    "qwen2.5-7b": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Sizes of Qwen2 models; the named ones have those of the published checkpoints."""


def _check_name(argument: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(
            f"bench_step: {argument} must be one of {', '.join(known)}, got {got!r}. "
            f"{did_you_mean(got, known, 'Choose one of them.')}"
        )


@dataclass(frozen=True)
class Side:
    """A way to train.

    Args:
        label: In tables and figures.
        checkpointing: Whether activations are checkpointed.
        selects: Whether a part of the candidates trains, or all of them.
        reuses: Whether the scoring forward is the training forward as well.
        idle: Whether the callback is there with nothing to choose.
        like: Side whose gradient this one must have, or None.
    """

    label: str
    checkpointing: bool
    selects: bool = False
    reuses: bool = False
    idle: bool = False
    like: str | None = None


IDLE = Side("all rows, the callback has nothing to choose", False, idle=True)
"""What the callback itself costs, beside training on all rows."""

SIDES = {
    "all": Side("all rows", False),
    "all_checkpointed": Side("all rows, checkpointing", True, like="all"),
    "selected": Side("selected", False, selects=True),
    "selected_checkpointed": Side("selected, checkpointing", True, selects=True, like="selected"),
    "selected_reused": Side(
        "selected, reuse_forward", True, selects=True, reuses=True, like="selected_checkpointed"
    ),
}


@dataclass(frozen=True)
class StepSizes:
    """What is trained, and how its rows are cut.

    Args:
        preset: Name of a model in :data:`PRESETS`.
        rows: Rows that train in a micro-batch where rows are chosen.
        candidates: Rows scored for each of them; 2 or more.
        tokens: Length of a row.
        accumulate: Micro-batches of an optimizer step where rows are chosen.
        micro_batch: Rows of a micro-batch where all rows train; None for ``rows * candidates``. It
            must divide the candidates of a step.
        strategy: Name of the method that chooses.
        dtype: Of weights, gradients and optimizer states; there is no autocast.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        seed: Of weights, rows and selection.

    Raises:
        ValueError: An unknown preset, method, device or dtype, or a number out of its range.
    """

    preset: str = "small"
    rows: int = 4
    candidates: int = 4
    tokens: int = 128
    accumulate: int = 1
    micro_batch: int | None = None
    strategy: str = "UDS"
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name("preset", self.preset, list(PRESETS))
        _check_name("strategy", self.strategy, strategies.__all__)
        at_least("bench_step", 1, rows=self.rows, accumulate=self.accumulate)
        at_least("bench_step", 2, tokens=self.tokens, candidates=self.candidates)
        at_least("bench_step", 1, micro_batch=self.together)
        if self.scored % self.together:
            raise ValueError(
                f"bench_step: micro_batch must divide the {self.scored} candidates of a step, got "
                f"{self.micro_batch}. Leave it out for {self.rows * self.candidates}."
            )
        if self.where.type == "cuda" and torch.cuda.device_count() > 1:
            raise ValueError(
                "bench_step: device must be the only GPU in sight, got one of "
                f"{torch.cuda.device_count()}. Set CUDA_VISIBLE_DEVICES to one; the trainer would "
                "use them all."
            )

    @property
    def where(self) -> torch.device:
        """The device."""
        return find_device("bench_step", self.device, self.dtype)[0]

    @property
    def together(self) -> int:
        """Rows of a micro-batch where all rows train."""
        return self.rows * self.candidates if self.micro_batch is None else self.micro_batch

    @property
    def scored(self) -> int:
        """Candidate rows of an optimizer step, which is what the other sides train."""
        return self.rows * self.candidates * self.accumulate

    def model(self) -> nn.Module:
        """Build the model, the same each time."""
        set_seed(self.seed)
        sizes: dict[str, Any] = {"tie_word_embeddings": True, **PRESETS[self.preset]}
        config = Qwen2Config(**sizes, use_cache=False)
        kind = find_device("bench_step", self.device, self.dtype)[1]
        with torch.device(self.where):
            built: nn.Module = AutoModelForCausalLM.from_config(config, dtype=kind)
        return built

    def data(self, steps: int) -> list[dict[str, Tensor]]:
        """Return random rows for so many optimizer steps; all their tokens have a label."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (steps * self.scored, self.tokens)
        rows = torch.randint(PRESETS[self.preset]["vocab_size"], shape, generator=g)
        return [{"input_ids": row, "labels": row} for row in rows]


class _StepEnds(TrainerCallback):
    """Call something with the number of steps whenever one ends; the device is then idle."""

    def __init__(self, device: torch.device, told: Callable[[int], None]) -> None:
        self._device, self._told = device, told

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._told(state.global_step)


class _Gradient(TrainerCallback):
    """Copy the first gradient, clipped as it is, before the optimizer steps."""

    values: dict[str, Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if self.values is None:
            named = kwargs["model"].named_parameters()
            self.values = {n: p.grad.to("cpu", copy=True) for n, p in named if p.grad is not None}


@contextmanager
def _trainer(sizes: StepSizes, side: Side, steps: int, *extra: TrainerCallback) -> Iterator[Any]:
    """Build the trainer of a side, in a folder that is gone afterwards."""
    batch, times = sizes.rows, sizes.accumulate
    if not side.selects:
        batch, times = sizes.together, sizes.scored // sizes.together
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=steps,
            gradient_accumulation_steps=times, gradient_checkpointing=side.checkpointing,
            learning_rate=1e-5, logging_strategy="no", save_strategy="no", report_to=[],
            use_cpu=sizes.where.type == "cpu", disable_tqdm=True, seed=sizes.seed,
            dataloader_pin_memory=sizes.where.type == "cuda",
        )  # fmt: skip
        trainer = Trainer(sizes.model(), args, train_dataset=sizes.data(steps))
        trainer.remove_callback(PrinterCallback)
        if side.selects:
            strategy = getattr(strategies, sizes.strategy)()
            trainer.add_callback(
                OnlineSelection(
                    trainer,
                    strategy,
                    candidates=sizes.candidates,
                    seed=sizes.seed,
                    reuse_forward=side.reuses,
                )  # fmt: skip
            )
        if side.idle:
            trainer.add_callback(OnlineSelection(trainer, strategies.Uniform(), seed=sizes.seed))
        for callback in extra:  # behind the selection, whose own end of a step is part of it
            trainer.add_callback(callback)
        yield trainer


@dataclass(frozen=True)
class FirstStep:
    """What an optimizer step does.

    Attributes:
        gradient: Of each parameter, on the CPU.
        forwards: How often a layer forwards each candidate row, recomputation included.
        flops: Of its matrix products and attention.
    """

    gradient: dict[str, Tensor]
    forwards: float
    flops: int


def first_step(sizes: StepSizes, side: Side) -> FirstStep:
    """Keep the gradient of the first step, and count what the second does.

    In the first one the callback also asks the model's loss about a row.
    """
    gradient, counted, rows = _Gradient(), CountedProducts(), 0

    def begin(step: int) -> None:
        nonlocal rows
        if step == 1:
            rows = counted.flops = 0

    def count(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal rows
        rows += (args[0] if args else kwargs["hidden_states"]).shape[0]

    with _trainer(sizes, side, 2, gradient, _StepEnds(sizes.where, begin)) as trainer:
        layers = trainer.model.model.layers
        for layer in layers:  # below what checkpointing calls, so that recomputing is seen
            layer.self_attn.register_forward_pre_hook(count, with_kwargs=True)
        with counted:
            trainer.train()
        assert gradient.values is not None
        return FirstStep(gradient.values, rows / len(layers) / sizes.scored, counted.flops)


def seconds(sizes: StepSizes, side: Side, steps: int) -> list[float]:
    """Return the seconds of so many steps, from the end of one to the end of the next.

    Loading, scoring, choosing, training and the optimizer are all in it. Steps before them warm up.
    """
    warm_up = 3 if sizes.where.type == "cuda" else 1
    ends: dict[int, float] = {}

    def told(step: int) -> None:
        # On a GPU what is waited for is no time of the processor's.
        ends[step] = clock() if sizes.where.type == "cpu" else time.perf_counter()

    with _trainer(sizes, side, warm_up + steps, _StepEnds(sizes.where, told)) as trainer:
        trainer.train()
    return [ends[i] - ends[i - 1] for i in range(warm_up + 1, warm_up + steps + 1)]


def step_peak(sizes: StepSizes, side: Side) -> float | None:
    """Return by how many MiB the second step peaks over weights and optimizer states."""
    peak: Peak | None = None
    grown: float | None = None

    def told(step: int) -> None:
        nonlocal peak, grown
        if peak is None:
            peak = Peak(sizes.where)
        else:
            grown = peak.mib()

    with _trainer(sizes, side, 2, _StepEnds(sizes.where, told)) as trainer:
        trainer.train()
    return grown
