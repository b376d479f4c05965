"""Online selection in a loop of your own: plain PyTorch, Accelerate, DDP, FSDP2, DeepSpeed.

``onlinesel.steps`` gives one item per optimizer step. It owns what a loop gets wrong easily: which
rows are candidates, which of them train, how the micro-batches are cut, and what the loss is
divided by over all micro-batches and ranks. The loop keeps forward, backward and optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onlinesel._base.arguments import OF_THE_TRAINER, spelled
from onlinesel.callbacks._shared.micro_batch import MicroBatch, needs_weighted_mean
from onlinesel.callbacks._shared.source import Score, StepSource
from onlinesel.parallel.distributed import rank, sum_over_ranks, world_size
from onlinesel.report.runlog import RunLog
from onlinesel.selector import Selector, describe
from onlinesel.step import Decision
from onlinesel.types import Normalize, Scope, Strategy

__all__ = ["MicroBatch", "Step", "Steps", "steps"]

_AVERAGING = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class Step:
    """One optimizer step; iterate it for its micro-batches.

    Attributes:
        index: Number of the optimizer step, from 0.
        micro_batches: What trains. Their number is the same on every rank.
        decisions: What was decided about which candidates, a pair per decision.
    """

    def __init__(
        self, index: int, micro_batches: list[MicroBatch], decisions: list[Decision], engine: Any,
        *, strict: bool = False,
    ) -> None:  # fmt: skip
        self.index, self.micro_batches, self.decisions = index, micro_batches, decisions
        self._strict = strict
        self._engine, self._device = engine, _device_of(engine)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in self.micro_batches:
            # DeepSpeed counts micro-batches by itself and would miss a shorter step at the end.
            if hasattr(self._engine, "set_gradient_accumulation_boundary"):
                self._engine.set_gradient_accumulation_boundary(micro.last)
            with micro.training():
                yield micro

    def check(self) -> None:
        """Refuse a loop that trained this step with a loss of its own, where that is another.

        Raises:
            ValueError: Rows, micro-batches or ranks do not count alike, and no weight was used.
        """
        forgotten = [m for m in self.micro_batches if m.begun and not (m.used or m.read)]
        if self._strict and forgotten:
            raise ValueError(
                "steps: losses must go through micro.loss(losses) where row weights, several "
                f"micro-batches or several ranks count in a step, got {len(forgotten)} of "
                f"{len(self)} micro-batches without. Compute one loss a row (reduction='none') and "
                "write micro.loss(losses).backward()."
            )

    @property
    def metrics(self) -> dict[str, float]:
        """Scalars about the last decision, under the names of the Trainer's log."""
        found = describe(*self.decisions[-1]) if self.decisions else {}
        return {f"selection/{name}": value for name, value in found.items()}

    def mean_loss(self) -> float:
        """Return the step's loss over all micro-batches and ranks; every rank must call it."""
        parts = [micro.value for micro in self.micro_batches if micro.value is not None]
        total = torch.stack(parts).sum() if parts else torch.zeros((), device=self._device)
        return float(sum_over_ranks(total))


class Steps:
    """Optimizer steps that train on chosen and weighed rows; iterate it once per epoch.

    Args:
        loader: A torch ``DataLoader`` of ``batch_size`` rows that train in a micro-batch, or any
            iterable of batches: dicts, tuples, dataclasses of tensors, arrays and lists with one
            entry a row. Of a ``DataLoader`` with torch's own sampler the order is taken over and
            dealt to the ranks: leave the sampler out. Any other loader must give each rank rows of
            its own.
        model: As the loop calls it: plain, DDP, FSDP, accelerate-prepared, a DeepSpeed engine.
        strategy: The method, or a :class:`onlinesel.Selector` that holds it.
        candidates: Rows loaded and scored for each row that trains.
        accumulate: Micro-batches of an optimizer step on each rank.
        scope: What competes: ``"global"`` all candidates of the step, over every micro-batch and
            rank; ``"rank"`` those of this rank; ``"batch"`` each micro-batch alone.
        normalize: ``"tokens"``, ``"samples"``, ``"rows"``; None takes the strategy's own.
        seed: Of the order and of the selection's generator.
        score: ``(model, batch) -> Signals``, or the ``(N,)`` losses of the rows, called in eval
            mode without gradient. By default the scorer of causal language models.
        ids: ``"auto"``: a column ``sample_id``, else row numbers, else a hash of the content;
            ``"hash"``; or the name of a column, which is taken out of the batch.
        groups: Column with the source or domain of each row, taken out of the batch.
        order: A sampler with an epoch in place of the loader's, such as
            :class:`onlinesel.mixing.DomainSampler`.
        reference: RHO-Loss's reference: a model or ``"adapter"``.
        record: Folder in which every decision is written down for ``onlinesel report``.
        reuse_forward: Let the scoring forward be the training forward as well, for transformers'
            models with gradient checkpointing: see the Trainer's ``OnlineSelection``. Each
            micro-batch is then forwarded once, inside the loop over the step.
        reuse_limit: GiB of layer outputs that may be held for it on each rank, or None.
        log_all: Whether :meth:`drain` gives every number about the decisions, and not the kept
            share, the share of the step and the mean score of the kept rows alone.
        gradient_factor: What the engine divides gradients by, which the losses are multiplied by
            in advance. None finds it: the number of ranks for DDP and FSDP, times the engine's own
            accumulation for DeepSpeed. ``Accelerator`` divides by its own
            ``gradient_accumulation_steps`` on top: leave that at 1.

    Attributes:
        step: Optimizer steps so far.

    Raises:
        ValueError: Arguments that cannot give exact selection, or that differ between ranks.

    Example:
        >>> import torch, onlinesel
        >>> from torch.nn.functional import cross_entropy
        >>> from torch.utils.data import DataLoader
        >>> from onlinesel.strategies import TopLoss
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = DataLoader([(torch.ones(2) * i, i % 3) for i in range(16)], batch_size=2)
        >>> score = onlinesel.ClassificationScorer()
        >>> for step in onlinesel.steps(loader, model, TopLoss(), candidates=2, score=score):
        ...     for micro in step:
        ...         inputs, labels = micro.batch
        ...         losses = cross_entropy(model(inputs), labels, reduction="none")
        ...         micro.loss(losses).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> step.index, round(step.metrics["selection/kept_share"], 2)
        (3, 0.5)
    """

    @spelled("steps", elsewhere=OF_THE_TRAINER)
    def __init__(
        self,
        loader: Any,
        model: nn.Module,
        strategy: Strategy | Selector,
        *,
        candidates: int = 1,
        accumulate: int = 1,
        scope: Scope = "global",
        normalize: Normalize | None = None,
        seed: int = 0,
        score: Score | None = None,
        ids: str = "auto",
        groups: str | None = None,
        order: Any = None,
        reference: nn.Module | str | None = None,
        record: str | Path | RunLog | None = None,
        reuse_forward: bool = False,
        reuse_limit: float | None = None,
        log_all: bool = False,
        gradient_factor: float | None = None,
    ) -> None:
        if type(accumulate) is not int or accumulate < 1:
            raise ValueError(
                f"steps: accumulate must be an integer >= 1, got {accumulate!r}. "
                "Say how many micro-batches an optimizer step has."
            )
        self._source = StepSource(
            "steps", strategy, candidates=candidates, scope=scope, normalize=normalize, seed=seed,
            score=score, ids=ids, groups=groups, order=order, reference=reference, record=record,
            reuse_forward=reuse_forward, reuse_limit=reuse_limit, log_all=log_all,
        )  # fmt: skip
        self._model, self._accumulate = model, accumulate
        self._factor = _factor_of(model) if gradient_factor is None else gradient_factor
        device = _device_of(model)
        self._reader = self._source.attach(
            loader, model, accumulate=accumulate, device=device, thins=True
        )
        self.step = 0
        self._resumed: int | None = None
        self._recording = False
        # Also where nobody calls close(): when the steps are let go, or the program ends.
        weakref.finalize(self, self._source.meter.stop)

    @property
    def selector(self) -> Selector:
        """The selector."""
        return self._source.selector

    @property
    def epoch(self) -> int:
        """Number of the epoch that is being read, from 0."""
        return self._reader.epoch

    def __len__(self) -> int:
        """Return the number of optimizer steps of an epoch, where the loader has a length.

        A method that leaves rows out of an epoch (InfoBatch) makes that of the epoch at hand.
        """
        return len(self._reader)

    def __iter__(self) -> Iterator[Step]:
        """Go through the next epoch, or through the rest of one after :meth:`load_state_dict`."""
        self._finish()  # of a loop that was left
        if not self._recording:
            self._recording = True
            self._source.meter.start(self._resumed, writes=rank() == 0)
        self._source.meter.fetch()
        for window in self._reader.windows():
            plan = self._source.plan(window, self.step)
            del window  # the candidates that were not chosen
            strict = needs_weighted_mean(plan, self._accumulate)
            micro_batches = self._source.micro_batches(plan, self._factor)
            step = Step(self.step, micro_batches, plan.decisions, self._model, strict=strict)
            del micro_batches
            yield step
            step.check()
            del step
            self._finish()
            self._source.meter.fetch()

    def _finish(self) -> None:
        if self._source.open:
            self._source.finish(self.step + 1)
            self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: plain values and CPU tensors.

        Take it after the optimizer's step, inside the loop or outside, on **every** rank: the step
        at hand counts as trained, and what its losses teach is gathered. It is the same on all of
        them, so any one may write it.
        """
        self._finish()
        return self._source.state_dict(self.step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the next iteration finishes that epoch.

        Raises:
            ValueError: The state belongs to other settings or another kind of loader.
        """
        self.step = self._resumed = self._source.load_state_dict(state)

    def drain(self) -> dict[str, float]:
        """Return the means of all metrics since the last call, as the Trainer logs them."""
        return self._source.meter.drain()

    def evaluated(self, loss: float) -> None:
        """Note a held-out loss in the record, on every rank; evaluation is not training time."""
        self._finish()
        self._source.meter.evaluated(self.step, {"eval_loss": loss})

    def close(self) -> None:
        """Say what choosing cost and what was dropped, and close the record, if there is one."""
        self._finish()
        self._source.meter.stop()


steps = Steps
"""Read as it is used: ``for step in onlinesel.steps(...)``."""


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "cpu" and world_size() > 1 and "nccl" in torch.distributed.get_backend():
        return torch.device("cuda", torch.cuda.current_device())  # parameters were offloaded
    return device


def _factor_of(model: nn.Module) -> float:
    """Return what the engine around a model divides gradients by."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "DeepSpeedEngine" in names:
        return float(world_size() * model.gradient_accumulation_steps())  # type: ignore[operator]
    if world_size() == 1 or names & set(_AVERAGING):
        return float(world_size())
    raise ValueError(
        f"steps: gradient_factor must be given for a model whose gradients nobody is seen to "
        f"average over {world_size()} ranks, got None with {type(model).__name__}. Wrap the model "
        "in DistributedDataParallel or fully_shard, or say what your loop divides gradients by."
    )
