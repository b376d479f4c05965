"""Never forwarding twice: the scoring forward of a row is its training forward as well.

With activation checkpointing a layer of the training forward leaves nothing but its output, which
is the input of the next one. The scoring forward has computed that output already. So the outputs
of the checkpointed layers are held for all candidates until the step is decided, those of the rows
that train are kept, and the training forward, which the host calls as ever, gets them back from
each layer without computing it. The backward recomputes the layer for these rows, as checkpointing
does. A layer then forwards each candidate once and each trained row once more: ``1 + k`` forwards a
row for a kept share ``k``, where scoring, forward and recomputation are ``1 + 2k``.

What lies outside the layers (embedding, last norm, LM head) is computed again in training. A row
that came from another rank, or did not fit the memory that holding may take, is forwarded as
without this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from onlinesel._base.host import to_host, upload
from onlinesel.callbacks._shared.replay import HELD, SCORER, Audit, HeldRows, check_limit, refuse
from onlinesel.callbacks._shared.stopwatch import Stopwatch
from onlinesel.callbacks._shared.trainers import is_zero3
from onlinesel.data.batch import rows_in
from onlinesel.data.padding import token_width
from onlinesel.parallel.distributed import rank
from onlinesel.scoring.own import Score
from onlinesel.step import StepPlan

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError as error:
    raise ImportError('reuse_forward needs transformers: pip install "onlinesel[hf]".') from error

__all__ = ["SOURCE", "ReusedForward", "reuse_in_trainer"]

SOURCE = "onlinesel_source"
"""Batch key of the numbers of the tokens, ``(N, T)`` int64; 0 for padding that came later."""

_CHECKPOINTING = (
    "Turn it on, or leave reuse_forward out: only layers that are recomputed in the backward can "
    "take the scoring forward as their own. Without it, selecting costs the same already."
)
_COMPILED = "Leave one of the two out: hooks on layers do not act in compiled graphs."
_ZERO3 = (
    "DeepSpeed's ZeRO stage", "at most 2", 3,
    "It gathers what a module needs when the module is called, which ranks that have rows of other "
    "ranks to forward do more often. Use FSDP2 or stage 2.",
)  # fmt: skip
_RANK_BITS = 40  # a token's number has its rank above them, since rows may change ranks

Batch = dict[str, Any]


@dataclass
class _Candidates:
    """One candidate micro-batch.

    Attributes:
        source: ``(n, T)`` numbers of its tokens.
        first: The first of them.
        outputs: ``(n, T, d)`` of each call of a layer; None where holding them is too much.
    """

    source: Tensor
    first: int
    outputs: list[Tensor] | None


class ReusedForward:
    """Hold the layer outputs of the scoring forward, and give them back to the training forward.

    Args:
        model: The transformers model, without the wrappers of data parallelism. Which of its layers
            are checkpointed is read at each step.
        limit: GiB that this rank may hold of a step, or None for no bound. Micro-batches that do
            not fit are forwarded twice.
        outer: The model with its wrappers, if there are any yet.

    Raises:
        ValueError: A row's scoring forward is not its training forward in this model.
    """

    def __init__(
        self, model: nn.Module, limit: float | None = None, outer: nn.Module | None = None
    ) -> None:
        self._limit = None if limit is None else limit * 2**30
        self.start(model, outer)

    def start(self, model: nn.Module, outer: nn.Module | None = None) -> None:
        """Begin a run of a model."""
        _check_model(model, model if outer is None else outer)
        self._model = model
        self._candidates: list[_Candidates] = []
        self._called: list[nn.Module] = []
        self._audit = Audit()
        self._bytes = 0
        self._watch = Stopwatch()
        self.saved_seconds = 0.0

    def decide(
        self, batches: Sequence[Batch], plan: Callable[[], StepPlan]
    ) -> tuple[StepPlan, dict[str, float]]:
        """Let a step be decided, and hold what its micro-batches need.

        Args:
            batches: This rank's candidate micro-batches, changed in place.
            plan: Scores them inside of :meth:`scoring`, and decides.

        Returns:
            The plan, and numbers for the log.
        """
        self.mark(batches)
        try:
            planned = plan()
            return planned, self.keep(planned.batches)
        finally:
            self._candidates = []  # an error must not keep them on the device

    def finish(self) -> None:
        """Check what the backwards of a step have shown.

        Raises:
            ValueError: A layer gave the rows that trained something else than when it was scored.
        """
        self._audit.finish()

    def mark(self, batches: Sequence[Batch]) -> None:
        """Number the tokens of a step's candidates; the numbers ride in the batches.

        Args:
            batches: This rank's candidate micro-batches, changed in place.
        """
        self._candidates, self._called = [], []
        self._bytes = 0
        self._watch.reset()
        first = (rank() + 1) << _RANK_BITS
        for batch in batches:
            size, width = rows_in(batch, "reuse_forward"), token_width(batch)
            if width is None:
                refuse("batches", "made of tokens", sorted(batch), "Set it to False.")
            assert width is not None
            device = next(v.device for v in batch.values() if isinstance(v, Tensor) and v.dim())
            source = torch.arange(first, first + size * width, device=device).view(size, width)
            batch[SOURCE] = source
            self._candidates.append(_Candidates(source, first, []))
            first += size * width

    @staticmethod
    def without_marks(batch: Mapping[str, Any]) -> Batch:
        """Return a candidate micro-batch as the model takes it."""
        return {name: value for name, value in batch.items() if name != SOURCE}

    @contextmanager
    def scoring(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Hold what the layers give while one candidate micro-batch is scored."""
        mine = next(c for c in self._candidates if c.source is batch[SOURCE])
        layers = self._layers()
        called: list[nn.Module] = []

        def hold(layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            called.append(layer)
            _check_call(layer, (*args, *kwargs.values()), output, mine.source)
            size = output.numel() * output.element_size()
            if len(called) == 1 and self._limit is not None:
                # All layers of a micro-batch or none: half of them would be held in vain.
                if self._bytes + size * len(layers) > self._limit:
                    mine.outputs = None
            if mine.outputs is not None:
                self._bytes += size
                mine.outputs.append(output.detach())

        # Before the hooks of others, which act on the training forward's output themselves.
        handles = [
            layer.register_forward_hook(hold, with_kwargs=True, prepend=True) for layer in layers
        ]
        try:
            with self._watch.running(mine.source.device):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._called = called

    def _layers(self) -> list[nn.Module]:
        """Return the layers that are checkpointed; which ones, the trainer says when it begins."""
        layers: list[nn.Module] = [
            module for module in self._model.modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]  # fmt: skip
        if not layers:
            refuse("gradient checkpointing", "on", False, _CHECKPOINTING)
        for layer in layers if self._audit.at_once else ():
            parts, name = list(layer.modules())[1:], type(layer).__name__
            if any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in parts):
                refuse(
                    "FSDP", "one that shards whole layers", f"parts of {name}",
                    "Wrap whole layers, or set reuse_forward=False: ranks with rows of other "
                    "ranks to forward would gather the parts more often.",
                )  # fmt: skip
            if any(part in layers for part in parts):
                refuse(
                    "checkpointed layers", "side by side", f"some inside of {name}",
                    "Set it to False for this model.",
                )  # fmt: skip
        return layers

    def keep(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Keep what the decided micro-batches need, and let go of the rest.

        Args:
            batches: The micro-batches that train, changed in place: the numbers of their tokens
                give way to what is held for them.

        Returns:
            The share of their rows that is not forwarded again, and the GiB that were held. What
            that saves is in ``saved_seconds``.
        """
        marks = to_host([batch[SOURCE] for batch in batches])
        parts = [_Part(b, m, self._candidates) for b, m in zip(batches, marks, strict=True)]
        values: list[list[Tensor | None]] = [[] for _ in parts]
        for call in range(len(self._called)):
            for part, found in zip(parts, values, strict=True):
                found.append(part.value(call))
            for candidates in self._candidates:  # call by call, so that little is there twice
                if candidates.outputs is not None:
                    candidates.outputs[call] = torch.empty(0)
        rows = reused = places = 0
        for batch, part, found in zip(batches, parts, values, strict=True):
            rows += part.known.shape[0]
            if found:  # also where no row is held: all ranks must build the same graph
                batch[HELD] = HeldRows(self._called, found, part.known, part.fresh, self._audit)
                held = part.known.shape[0] - part.fresh.shape[0]
                reused += held
                places += held * part.known.shape[1]
        scored = sum(candidates.source.numel() for candidates in self._candidates)
        # The forward that those rows do not need any more, at the pace of the scoring forward.
        self.saved_seconds = self._watch.seconds() * places / scored
        return {"reused_share": reused / rows, "held_gib": self._bytes / 2**30}


class _Part:
    """Where the tokens of one decided micro-batch come from.

    Attributes:
        known: ``(n, T)`` bool, tokens whose outputs are held and that are no padding.
        fresh: ``(f,)`` rows of which nothing is held.
        pieces: Candidates, their tokens, and where these go in the flattened micro-batch.
    """

    def __init__(self, batch: Batch, source: Tensor, candidates: Sequence[_Candidates]) -> None:
        device = batch.pop(SOURCE).device
        held = torch.zeros_like(source, dtype=torch.bool)
        self.pieces: list[tuple[_Candidates, Tensor, Tensor]] = []
        for part in candidates:
            if not part.outputs:
                continue
            mine = (source >= part.first) & (source < part.first + part.source.numel())
            places = mine.flatten().nonzero().squeeze(1)
            if places.numel():
                taken = source.flatten()[places] - part.first
                self.pieces.append((part, upload(taken, device), upload(places, device)))
                held |= mine
        self.fresh = upload((~held.any(dim=1)).nonzero().squeeze(1), device)
        self.known = upload(held, device)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == self.known.shape:
            self.known &= mask.ne(0)

    def value(self, call: int) -> Tensor | None:
        """Return the ``(n, T, d)`` outputs of a call of a layer, 0 where they are not held."""
        if not self.pieces:
            return None
        outputs = [part.outputs[call] for part, *_ in self.pieces if part.outputs]
        whole = outputs[0].new_zeros(*self.known.shape, outputs[0].shape[2])
        for output, (_, taken, places) in zip(outputs, self.pieces, strict=True):
            rows = output.flatten(0, 1).index_select(0, taken.to(output.device))
            whole.view(-1, whole.shape[2]).index_copy_(0, places.to(output.device), rows)
        return whole


def _check_call(layer: nn.Module, inputs: tuple[Any, ...], output: Any, source: Tensor) -> None:
    """Refuse a layer that takes or gives more than the hidden states of its rows."""
    plain = (Tensor, bool, int, float, str, type(None), torch.dtype)
    strange = [
        value for value in inputs
        if not all(isinstance(v, plain) for v in (value if isinstance(value, tuple) else (value,)))
    ]  # fmt: skip
    got = f"{type(layer).__name__} that takes a {type(strange[0]).__name__}" if strange else None
    if not isinstance(output, Tensor):
        got = f"{type(layer).__name__} that gives a {type(output).__name__}"
    elif output.dim() != 3 or output.shape[:2] != source.shape:
        got = f"{type(layer).__name__} that gives {tuple(output.shape)} for {tuple(source.shape)}"
    if got is not None:
        refuse(
            "checkpointed layers",
            "such that they take tensors and plain values and give one hidden state a token", got,
            "What else they pass on cannot be cut down to the rows that train: set it to False.",
        )  # fmt: skip


def reuse_in_trainer(
    trainer: Any, wanted: bool, limit: float | None, *, shadow: bool, score: Score | None
) -> ReusedForward | None:
    """Return what reuses the scoring forward of transformers' Trainer, None if not wanted.

    Args:
        trainer: The trainer.
        wanted: Whether it is asked for.
        limit: GiB that may be held on this rank, or None.
        shadow: Whether nothing is to change.
        score: What replaces the default scorer.

    Raises:
        ValueError: The scoring forward is not the training forward here.
    """
    check_limit(wanted, limit)
    if not wanted:
        return None
    args, noise = trainer.args, getattr(trainer.args, "neftune_noise_alpha", None)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    for bad, argument, rule, got, remedy in (
        (not args.gradient_checkpointing, "gradient_checkpointing", "on", False, _CHECKPOINTING),
        (noise is not None, "neftune_noise_alpha", "None", noise,
         "Leave one of the two out: the scored embeddings have no noise."),
        (getattr(fsdp, "fsdp_version", 2) == 1, "fsdp_version", "2", 1,
         "Set it in the FSDP settings."),
        (is_zero3(trainer), *_ZERO3),
        (args.torch_compile, "torch_compile", "off", True, _COMPILED),
        (getattr(args, "activation_offloading", False), "activation_offloading", "off", True,
         "Bound what is held by reuse_limit."),
        (shadow, "shadow", "off", True, "Leave one of the two out: nothing would be reused."),
        (score is not None, "score", "None", type(score).__name__, SCORER),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)
    return ReusedForward(trainer.model, limit)


def _check_model(model: nn.Module, outer: nn.Module) -> None:
    """Refuse models in which a row's scoring forward is not its training forward."""
    chance, name = _chance(model), type(model).__name__
    router = getattr(getattr(model, "config", None), "output_router_logits", False)
    layers = any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    compiled = next((n or name for n, m in outer.named_modules() if _is_compiled(m)), None)
    for bad, argument, rule, got, remedy in (
        (any(hasattr(p, "ds_id") for p in model.parameters()), *_ZERO3),
        (not layers, "model", "made of transformers' checkpointing layers", name,
         "Set it to False."),
        (chance is not None, "model",
         "without dropout, noise, batch statistics and rotations that follow the batch's width",
         chance, "A row would not be the same among other rows. Set a rate to 0."),
        (compiled is not None, "model", "one that is not compiled", compiled, _COMPILED),
        (router, "output_router_logits", "off", True,
         "Set it to False in the model's configuration: the router's loss needs routers that "
         "run in the training forward."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or type(module).__name__ == "OptimizedModule"


def _chance(model: nn.Module) -> str | None:
    """Name what makes the output of a layer depend on chance or on the rest of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{type(module).__name__} {name}"
        rotation = str(getattr(module, "rope_type", ""))
        if "dynamic" in rotation or "longrope" in rotation:
            return f"{name} of type {rotation}"
        rates = {k: v for k, v in vars(module).items() if isinstance(v, float) and v > 0}
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} with p={module.p}"
        for key, rate in rates.items():
            if "dropout" in key or "layerdrop" in key or "jitter" in key:
                return f"{name}.{key}={rate}"
    return None
