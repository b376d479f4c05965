"""Online selection in Lightning's Trainer, for LightningModules of any kind.

Nothing of the module or the loader changes. For the time of a fit, three bound methods **of those
instances** are wrapped, and put back afterwards:

- ``dataloader`` of the trainer's training source: the trainer iterates candidates, a window of one
  optimizer step at a time, and neither shuffles nor shards them again;
- ``batch_to_device`` of the strategy and ``_on_before_batch_transfer`` of the module: once a window
  begins, all its candidates go through Lightning's own transfer with the user's hooks, the step is
  decided, and what trains is handed out micro-batch by micro-batch.

Row weights reach the loss through :func:`onlinesel.weighted_mean` in ``training_step``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from onlinesel._base.arguments import OF_THE_TRAINER, spelled
from onlinesel.callbacks._shared.micro_batch import MicroBatch, needs_weighted_mean
from onlinesel.callbacks._shared.record import Record, optimizer_settings
from onlinesel.callbacks._shared.replay import Replay
from onlinesel.callbacks._shared.source import Score, StepSource
from onlinesel.callbacks._shared.wrapping import restore_all
from onlinesel.callbacks.lightning import data
from onlinesel.callbacks.lightning.fit import go_on, wrap_fit
from onlinesel.callbacks.lightning.run import (
    begin_epoch,
    causal_model,
    check_run,
    engine_of,
    gradient_factor,
    through_strategy,
)
from onlinesel.data.columns import as_columns
from onlinesel.data.loader import CandidateLoader, Candidates
from onlinesel.report.runlog import RunLog
from onlinesel.scoring import unwrap
from onlinesel.selector import Selector
from onlinesel.types import Normalize, Scope, Strategy
from onlinesel.weights import hand_over

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        'onlinesel.callbacks.lightning needs lightning: pip install "onlinesel[lightning]".'
    ) from error

__all__ = ["LightningSelection", "OnlineSelection"]


class LightningSelection(Callback):
    """Choose and weigh the rows of every optimizer step.

    ``training_step`` returns ``onlinesel.weighted_mean(losses)`` of one loss per row or, with
    :func:`onlinesel.token_losses`, per token; in validation the same line gives the plain mean. The
    batch size of the loader stays the number of rows that train in a micro-batch.

    Args:
        strategy: The method, or a :class:`onlinesel.Selector` that holds it.
        candidates: Rows loaded and scored for each row that trains.
        accumulate: Micro-batches of an optimizer step under manual optimization, 1 by default. With
            automatic optimization the trainer's ``accumulate_grad_batches`` counts.
        scope: What competes: ``"global"`` all candidates of the step, over every micro-batch and
            rank; ``"rank"`` those of this rank; ``"batch"`` each micro-batch alone.
        normalize: ``"tokens"``, ``"samples"``, ``"rows"``; None takes the strategy's own.
        seed: Of the order of the rows and of the selection's generator.
        score: ``(module, batch) -> Signals``, or the ``(N,)`` losses of the rows, called in eval
            mode without gradient with the LightningModule and a batch as ``training_step`` gets it.
            By default the scorer of causal language models, if the module or exactly one of its
            children is one.
        ids: ``"auto"``: a column ``sample_id``, else row numbers, else a hash of the content;
            ``"hash"``; or the name of a column, which is taken out of the batch.
        groups: Column with the source or domain of each row, taken out of the batch.
        order: A sampler with an epoch in place of the loader's, such as
            :class:`onlinesel.mixing.DomainSampler`.
        reference: RHO-Loss's reference: a model or ``"adapter"``.
        record: Folder in which every decision is written down for ``onlinesel report``, with the
            held-out loss that the module logs as ``val_loss``.
        reuse_forward: Let the scoring forward be the training forward as well, for transformers'
            models with gradient checkpointing: see the Trainer's ``OnlineSelection``.
        reuse_limit: GiB of layer outputs that may be held for it on each rank, or None.
        log_all: Log every number about the decisions: see the Trainer's ``OnlineSelection``.

    Attributes:
        step: Optimizer steps so far.

    Raises:
        ValueError: The arguments, the trainer or its loader cannot give exact selection; the
            message says what to change.
        TypeError: ``strategy`` is not a strategy.

    Example:
        >>> import torch, onlinesel
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from onlinesel.strategies import TopLoss
        >>> from torch.nn.functional import cross_entropy
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 3)
        ...     def forward(self, inputs):
        ...         return self.net(inputs)
        ...     def training_step(self, batch, batch_idx):
        ...         inputs, labels = batch
        ...         losses = cross_entropy(self(inputs), labels, reduction="none")
        ...         return onlinesel.weighted_mean(losses)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> rows = [(torch.ones(2) * i, i % 3) for i in range(16)]
        >>> score = onlinesel.ClassificationScorer()
        >>> selection = LightningSelection(TopLoss(), candidates=2, score=score)
        >>> trainer = Trainer(barebones=True, max_epochs=1, callbacks=[selection])
        >>> trainer.fit(Classifier(), torch.utils.data.DataLoader(rows, batch_size=2))
        >>> selection.step, selection.selector.metrics()["kept_share"]
        (4, 0.5)
    """

    @spelled("LightningSelection", elsewhere=OF_THE_TRAINER)
    def __init__(
        self,
        strategy: Strategy | Selector,
        *,
        candidates: int = 1,
        accumulate: int | None = None,
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
    ) -> None:
        self._make = partial(
            StepSource, "LightningSelection", strategy, candidates=candidates, scope=scope,
            normalize=normalize, seed=seed, score=score, ids=ids, groups=groups, order=order,
            reference=reference, record=Record(record), reuse_forward=reuse_forward,
            reuse_limit=reuse_limit, log_all=log_all,
        )  # fmt: skip
        self._source = self._make()
        self._score, self._order, self._accumulate = score, order, accumulate
        self.step = 0
        self._trainer: Any = None
        self._layout: dict[str, bool] = {}
        self._stream: data.Stream | None = None
        self._before: list[tuple[Any, dict[str, Any]]] = []
        self._replay = Replay(None)
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to a step or a fit that is over."""
        hand_over(None)
        self._replay.cancel()
        self._micro: MicroBatch | None = None
        self._loaded: dict[str, Any] | None = None
        self._strict = False
        self._val_check: Any = None

    @property
    def selector(self) -> Selector:
        """The selector of this fit, or of the last."""
        return self._source.selector

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; a trainer holds one such callback."""
        return "onlinesel.OnlineSelection"

    # The fit --------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap what the trainer will call in this fit."""
        if stage != "fit":
            return
        check_run(trainer, pl_module, self._accumulate)
        self._restore()
        if trainer is not self._trainer or trainer.global_step == 0:
            self._source, self._stream, self.step = self._make(), None, 0
        self._trainer = trainer
        self._before = wrap_fit(trainer, pl_module, self._streamed, self._decided)

    def _restore(self) -> None:
        restore_all(self._before)
        self._forget()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put everything back."""
        if stage == "fit":
            self._restore()
            self._source.meter.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put everything back after an error or an interrupt."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or continue where the checkpoint stands, all of which is read by now."""
        loop = trainer.fit_loop.epoch_loop
        if self._loaded is not None:
            self._resume(trainer, self._loaded)
        elif loop.restarting and loop.batch_progress.current.ready:
            if not self._over():
                data.refuse(
                    "checkpoint", "one of a run with LightningSelection, or of an epoch's end",
                    trainer.ckpt_path, "Begin without ckpt_path: which rows it had trained in "
                    "this epoch is not known.",
                )  # fmt: skip
            begin_epoch(trainer.fit_loop)
        self._source.begin(self.step or None, optimizer_settings(trainer.optimizers))

    # Data -----------------------------------------------------------------------------------

    def _window_size(self) -> int:
        """Return the micro-batches of an optimizer step."""
        if self._trainer.lightning_module.automatic_optimization:
            return int(self._trainer.accumulate_grad_batches)
        return self._accumulate or 1

    def _streamed(self, loader: Any) -> Any:
        """Return what the trainer iterates instead of the loader."""
        data.check_loader(self._trainer, loader, self._order)
        attach = partial(self._attach, loader, self._stream)
        self._stream = data.Stream(self._trainer, self._source, loader, attach, self._window_size)
        return self._stream

    def _attach(self, loader: Any, before: data.Stream | None) -> CandidateLoader:
        """Take the loader and the model, which is there by now."""
        trainer, module = self._trainer, self._trainer.lightning_module
        language = causal_model(module)
        model = module if language is None or self._score is not None else language
        reader = self._source.attach(
            loader, model, accumulate=self._window_size, device=trainer.strategy.root_device,
            call=partial(through_strategy, trainer),
            core=module if language is None else unwrap(language),
        )  # fmt: skip
        return data.follow(reader, before)

    def _decided(self, token: data.Token, prepare: Any, move: Any) -> Any:
        """Return the batch that trains in a token's place, deciding its step if it is the first."""
        window, loop = token.window, self._trainer.fit_loop.epoch_loop
        if token.index == 0:
            data.check_window(window, self._window_size(), loop.batch_progress.current.ready)
            if window.ahead:
                self._source.meter.fetch()
            parts = [self._moved(part, prepare, move) for part in window.parts]
            window.parts = []
            plan = self._source.plan(parts, self.step)
            factor = gradient_factor(self._trainer, window.accumulate)
            window.planned = self._source.micro_batches(plan, factor)
            self._strict = needs_weighted_mean(plan, window.accumulate)
        self._micro = window.planned[token.index]
        if window.final and self._micro.last:
            loop.batch_progress.is_last_batch = True  # wherever the trainer thought it would end
        batch, self._micro.batch = self._micro.batch, None
        return batch

    def _moved(self, part: Candidates, prepare: Any, move: Any) -> Candidates:
        """Do with one micro-batch of candidates what the trainer does with a batch."""
        batch = self._trainer.precision_plugin.convert_input(part.rebuild(part.columns))
        size = part.ids.shape[0]
        columns = as_columns(move(prepare(batch, 0), dataloader_idx=0), size, self._layout)
        return replace(part, columns=columns.values, rebuild=columns.rebuild)

    # The step -------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand this micro-batch's weights to ``onlinesel.weighted_mean``."""
        if self._micro is not None:
            hand_over(self._micro.weighing)
            self._replay.cancel()  # of a batch that was skipped before its end
            self._replay = self._micro.training()
            self._replay.__enter__()
            engine = engine_of(trainer)
            if engine is not None:  # it would miss a shorter step at the epoch's end
                engine.set_gradient_accumulation_boundary(self._micro.last)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from the rows that trained, before a checkpoint of this step is written."""
        hand_over(None)
        micro = self._micro
        if micro is None:
            return
        self._replay.__exit__(None)
        trained = outputs or not pl_module.automatic_optimization
        if self._strict and trained and not micro.used:
            data.refuse(
                "training_step", "one that returns onlinesel.weighted_mean(losses)",
                "a loss of its own", "Compute one loss per row (reduction='none'), or per token "
                "with onlinesel.token_losses(logits, labels).",
            )  # fmt: skip
        if micro.last:
            self._finish()
            if trainer._logger_connector.should_update_logs and not trainer.barebones:
                pl_module.log_dict(self._source.meter.drain(), batch_size=1)
        self._micro = None

    def _finish(self) -> None:
        """Close the step that has just trained, once."""
        if self._source.open:
            self.step += 1
            self._source.finish(self.step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Drop the rest of an epoch that was skipped."""
        hand_over(None)
        self._replay.cancel()
        self._micro = None
        if self._val_check is not None:
            trainer.val_check_batch, self._val_check = self._val_check, None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the held-out loss in the record."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = trainer.callback_metrics.get("val_loss")
            if found is not None:
                self._source.meter.evaluated(self.step, {"eval_loss": float(found)})

    # Checkpoints ----------------------------------------------------------------------------

    def _over(self) -> bool:
        """Whether the trainer has no more batches for this epoch."""
        return bool(self._trainer.fit_loop.epoch_loop._num_ready_batches_reached())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs; every rank must call it."""
        if self._loaded is not None:  # saved before the first batch
            return self._loaded
        if self._stream is None or "reader" not in vars(self._stream):
            return {}
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.current
        if self._micro is not None and self._micro.last and progress.processed == progress.ready:
            self._finish()  # another callback saves at the end of the batch
        return {"over": self._over(), "selection": self._source.state_dict(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the trainer has restored all of its own; a fit alone needs it."""
        if self._before:
            self._loaded = state_dict

    def _resume(self, trainer: Any, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stands."""
        assert self._stream is not None
        self._loaded = None
        self.step = self._source.load_state_dict(state["selection"])
        self._val_check = go_on(trainer, self._stream, state["over"])


OnlineSelection = LightningSelection  # its first name, which is that of the Trainer's as well
