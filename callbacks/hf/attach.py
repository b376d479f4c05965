"""Online selection in the Hugging Face Trainer and TRL's SFTTrainer.

A bare ``TrainerCallback`` never sees a batch, so this one takes the trainer and wraps a few bound
methods **of that instance**; :meth:`OnlineSelection.detach` puts everything back. Wrapped are:

- ``get_train_dataloader``: candidate batches are larger, and row ids ride in them;
- ``get_batch_samples``: the one place where all micro-batches of an optimizer step are in hand and
  the loss normaliser is not counted yet: score, choose, deal out, count;
- ``compute_loss``: row weights enter the loss that the host computes itself, and with
  ``reuse_forward`` the layers give back what they gave when they were scored;
- ``log``: metrics join the host's own;
- ``_save_rng_state`` and ``_inner_training_loop``: the state goes into the checkpoint before the
  checkpoint counts as written, and comes back from the path that only the inner loop is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel._base.arguments import OF_OTHER_HOSTS, spelled
from onlinesel.callbacks._shared.announce import opening
from onlinesel.callbacks._shared.meter import StepMeter
from onlinesel.callbacks._shared.replay import HELD, Replay
from onlinesel.callbacks._shared.trainers import seed_of
from onlinesel.callbacks.hf.checks import check_ranks, check_trainer, is_sft, refuse
from onlinesel.callbacks.hf.columns import carried_columns, domain_sampler
from onlinesel.callbacks.hf.fused import default_scorer
from onlinesel.callbacks.hf.loss import (
    UNDEFINED,
    WEIGHTS,
    LossTap,
    as_undefined,
    put_weights,
    tapped_loss,
)
from onlinesel.callbacks.hf.observed import TrainedLosses
from onlinesel.data.randomness import seed_of_rank
from onlinesel.data.rows import ROW_ID
from onlinesel.mixing import Mixture
from onlinesel.parallel.agreement import check_arguments, check_candidates
from onlinesel.report.runlog import RunLog
from onlinesel.scoring import CausalLMScorer, evaluating
from onlinesel.scoring.own import Score, as_signals
from onlinesel.selector import Selector
from onlinesel.step import StepPlanner
from onlinesel.types import Normalize, Scope, Signals, Strategy

try:
    from onlinesel.callbacks._shared.attached import AttachedCallback
    from onlinesel.callbacks._shared.reuse import reuse_in_trainer
    from onlinesel.callbacks.hf.batches import RowBatches
    from onlinesel.callbacks.hf.data import TrainingData
    from onlinesel.callbacks.hf.loss_check import LossCheck
    from onlinesel.callbacks.hf.state import (
        record_facts,
        resume_run,
        run_facts,
        save_run,
        trained_steps,
    )
except ImportError as error:
    raise ImportError(
        'onlinesel.callbacks.hf needs transformers: pip install "onlinesel[hf]".'
    ) from error

__all__ = ["OnlineSelection"]


class OnlineSelection(AttachedCallback):
    """Choose and weigh the rows of every optimizer step.

    A checkpoint is taken up on any number of processes, and with another batch size or
    accumulation: the rows go on behind the last one that was read, over the ends of epochs, and
    each is read once an epoch. The trainer's own count of epochs is then bookkeeping only, and from
    ``num_train_epochs`` it works out another number of steps: set ``max_steps``. What ranks that
    decide alone remember is united by id. Streams and ``group_by_length`` have no order to go on
    in, and are refused unless ``ignore_data_skip`` is set. The engine must load its own part:
    DeepSpeed refuses optimizer states of another number of processes.

    Args:
        trainer: A ``Trainer`` or TRL ``SFTTrainer`` of a causal language model. It is changed at
            once; add the callback to the same trainer.
        strategy: The method.
        candidates: Rows loaded and scored for each row that trains.
            ``per_device_train_batch_size`` stays the number of rows trained.
        scope: What competes: ``"global"`` all candidates of the optimizer step, over every
            micro-batch and rank; ``"rank"`` those of this rank; ``"batch"`` each micro-batch alone.
        normalize: ``"tokens"``, ``"samples"``, ``"rows"``; None takes the strategy's own.
        seed: Of the selection's own generator; None takes the trainer's seed. The trainer's
            generators are never touched.
        ids: ``"auto"`` uses a column ``sample_id`` if there is one, else the row number of a
            map-style dataset, else a hash of the row's tokens; ``"hash"`` always hashes; another
            name is an integer column.
        shadow: Score and log what would be chosen, and change nothing.
        reference: Where RHO-Loss gets its reference: a causal LM, ``"adapter"`` (this model with
            its PEFT adapter off), or the name of a column of cached losses.
        groups: Column of integers with the source or domain of each row, for methods that choose
            within groups and for ``mixture``.
        mixture: Draws the candidates by domain, in proportions that may follow the losses; it
            replaces the trainer's shuffling.
        score: ``(model, batch) -> Signals``, or the ``(N,)`` losses of the rows, called in eval
            mode without gradient. By default the scorer of causal language models.
        record: Folder (or an open :class:`onlinesel.report.runlog.RunLog`) in which every decision
            is written down for ``onlinesel report``. One that holds another run is refused.
        record_text: Write what the first rows say into it (2,000 rows, 400 characters of each).
        reuse_forward: Let the scoring forward be the training forward as well, for models with
            gradient checkpointing: the outputs of the checkpointed layers are held for all
            candidates of the step on this rank, ``layers * rows * tokens * width`` numbers, until
            it is decided, and for the rows that train until their backward. Rows that come from
            another rank are forwarded again.
        reuse_limit: GiB to hold at most on each rank; the rest is forwarded again. None: no bound.
        log_all: Log every number about the decisions, not the kept share, the share of the step,
            the mean score of the rows kept and rows that are not finite alone.

    Raises:
        ValueError: The arguments, the trainer or its settings cannot give exact selection, or
            differ between processes; the message says what to change.
        TypeError: ``strategy`` is not a strategy.

    Example:
        ```python
        trainer = SFTTrainer(model, args=args, train_dataset=dataset)
        trainer.add_callback(OnlineSelection(trainer, UDS(), candidates=4))
        trainer.train()
        ```
    """

    _wrapped = (
        "get_train_dataloader", "get_batch_samples", "compute_loss", "log", "_save_rng_state",
        "_inner_training_loop",
    )  # fmt: skip
    _instead = "Use When(..., stop=step) to end the selection within a run."
    _planner: StepPlanner | None = None

    @spelled("OnlineSelection", old={"scorer": "score"}, elsewhere=OF_OTHER_HOSTS)
    def __init__(
        self,
        trainer: Any,
        strategy: Strategy,
        *,
        candidates: int = 1,
        scope: Scope = "global",
        normalize: Normalize | None = None,
        seed: int | None = None,
        ids: str = "auto",
        shadow: bool = False,
        reference: nn.Module | str | None = None,
        groups: str | None = None,
        mixture: Mixture | None = None,
        score: Score | None = None,
        record: str | Path | RunLog | None = None,
        reuse_forward: bool = False,
        reuse_limit: float | None = None,
        record_text: bool = True,
        log_all: bool = False,
    ) -> None:
        seed = seed_of(trainer) if seed is None else seed
        check_ranks(
            trainer, strategy=strategy, candidates=candidates, scope=scope, normalize=normalize,
            seed=seed, ids=ids, shadow=shadow, groups=groups, mixture=mixture,
            reuse_forward=reuse_forward, reuse_limit=reuse_limit,
        )  # fmt: skip
        self.selector = Selector(strategy, seed=seed)
        self.normalize = strategy.normalize if normalize is None else normalize
        self._observing = bool(strategy.observes) or bool(getattr(mixture, "needs", ()))
        check_arguments("OnlineSelection", candidates, scope, self.normalize)
        check_trainer(
            trainer, strategy, candidates=candidates, shadow=shadow, reference=reference,
            weighs=self.normalize != "tokens" or self._observing, groups=groups, score=score,
        )  # fmt: skip
        self._reuse = reuse_in_trainer(
            trainer, reuse_forward, reuse_limit, shadow=shadow, score=score
        )
        self.trainer, self.candidates, self.scope = trainer, candidates, scope
        self.seed, self.shadow, self.ids = seed, shadow, ids
        self.groups, self.mixture, self._reference = groups, mixture, reference
        columns = carried_columns(trainer, ids, reference, groups)
        self._domains = domain_sampler(
            trainer, mixture, groups, seed=seed, reference=reference,
            plain=not shadow and self._planned(1024) is None, numbered=ROW_ID in columns,
        )  # fmt: skip
        self._data = TrainingData(
            trainer, columns, factor=1 if shadow else candidates, plan=self._planned,
            sampler=self._domains,
        )  # fmt: skip
        self._scorer = score or default_scorer(trainer, strategy, reference)
        self._meter = StepMeter(record, partial(record_facts, self), log_all=log_all, shadow=shadow)
        self._meter.read_texts(trainer, record_text)
        self._trained, self._rows = TrainedLosses(), RowBatches()
        check_candidates("OnlineSelection", strategy, candidates)
        self._attach()

    # Data -----------------------------------------------------------------------------------

    def _on_get_train_dataloader(self) -> Any:
        """Build the trainer's own loader over candidates, with ids in the batches."""
        loader = self._data.loader(self._call["get_train_dataloader"])
        if self._running:  # and not only looked at
            self._meter.announce(self._opening)
        return loader

    def _opening(self) -> str:
        """Return the line with which a run starts."""
        return opening(
            self.selector.strategy, self.trainer.model, candidates=self.candidates,
            reference=self._reference, own_scorer=not isinstance(self._scorer, CausalLMScorer),
            checkpointing=self.trainer.args.gradient_checkpointing, shadow=self.shadow,
            reused=self._reuse is not None, **self._data.described(),
        )  # fmt: skip

    def _planned(self, rows: int) -> Callable[[int], Tensor] | None:
        """Return the strategy's plan of each epoch, None if it plans none."""
        plan: Callable[..., Any] = self.selector.strategy.epoch_plan
        if plan(rows, epoch=0, seed=self.seed) is None:
            return None
        return lambda epoch: plan(rows, epoch=epoch, seed=self.seed)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the order of the rows its epoch, which comes from the run's own counter."""
        self._data.begin_epoch(state.global_step)

    # The step -------------------------------------------------------------------------------

    def _on_get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the candidates of one optimizer step, and return what trains."""
        self._meter.fetch()
        count_on = device if self.shadow else self._data.counts_on(device)
        batches, items = self._call["get_batch_samples"](epoch_iterator, num_batches, count_on)
        self._data.note(len(batches))
        if not batches:
            return batches, items
        batches, columns, ids, groups, given = self._rows.take_apart(self.trainer, batches)
        step = self.trainer.state.global_step
        decide = partial(self._plan(device).plan, columns, ids, step, groups, given)
        plan = self._meter.deciding(decide, self._reuse, columns, ids)
        self._loss_check.once(columns[0], self._rows.rebuild)
        self._trained.begin(plan.ids, plan.batches)
        if self.shadow:
            for batch in batches:
                batch.pop("reference_loss", None)
            return batches, items
        self._meter.undefined |= plan.undefined
        self._rows.put_together(plan.batches)
        return plan.batches, put_weights(plan, self.trainer.args, always=self._observing)

    def _plan(self, device: torch.device) -> StepPlanner:
        if self._planner is None:
            tokenizer = getattr(self.trainer, "processing_class", None)
            self._planner = StepPlanner(
                self.selector, self._score, candidates=self.candidates, scope=self.scope,
                normalize=self.normalize, device=device,
                pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
            )  # fmt: skip
        return self._planner

    def _score(
        self, batch: dict[str, Any], needs: Sequence[str], hosted: Mapping[str, Any]
    ) -> Signals:
        trainer = self.trainer
        held: AbstractContextManager[None] = nullcontext()
        if self._reuse is not None:
            held = self._reuse.scoring(batch)
            batch = self._reuse.without_marks(batch)
        batch = self._rows.rebuild(batch)
        with trainer.compute_loss_context_manager():
            if isinstance(self._scorer, CausalLMScorer):
                more = {"core": trainer.model, "needs": needs, "around": held, "hosted": hosted}
                return self._scorer(trainer.model_wrapped, batch, **more)
            with evaluating(trainer.model_wrapped):
                return as_signals(self._scorer(trainer.model_wrapped, batch), refuse)

    def _on_compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let the trainer compute its own loss, with this micro-batch's weights in it."""
        if inputs.pop(UNDEFINED, False):
            return as_undefined(self._on_compute_loss(model, inputs, *args, **kwargs))
        multipliers, held = inputs.pop(WEIGHTS, None), inputs.pop(HELD, None)
        if multipliers is None:
            with Replay(held):
                return self._call["compute_loss"](model, inputs, *args, **kwargs)
        core = self.trainer.accelerator.unwrap_model(model)
        core = core.get_base_model() if hasattr(core, "get_base_model") else core
        tap = LossTap(multipliers)
        with Replay(held), tapped_loss(core, tap, fused=is_sft(self.trainer)):
            result = self._call["compute_loss"](model, inputs, *args, **kwargs)
        if self._observing:
            assert tap.row_loss is not None
            self._trained.note(tap.row_loss, multipliers)
        return result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from the rows that trained, before a checkpoint of this step is written."""
        if self._reuse is not None:
            self._reuse.finish()
        self._trained.teach(self.selector, self._domains, self.scope, args.device)
        if isinstance(self._scorer, CausalLMScorer):
            self._scorer.advance()
        self._meter.end(state.global_step)

    # Logs and checkpoints -------------------------------------------------------------------

    def _on_log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._meter.tell(logs)
            if self._domains is not None:
                logs |= {f"selection/{name}": v for name, v in self._domains.metrics().items()}
        self._call["log"](logs, *args, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the held-out loss in the record."""
        self._meter.evaluated(state.global_step, kwargs["metrics"])

    @property
    def _rank(self) -> int | None:
        """The process that a state belongs to; None where all ranks hold the same."""
        args = self.trainer.args
        return args.process_index if self.scope != "global" and args.world_size > 1 else None

    def _on__save_rng_state(self, output_dir: str) -> None:
        """Write the state beside the trainer's own, before the checkpoint counts as complete."""
        self._call["_save_rng_state"](output_dir)
        self._data.save(output_dir, self.trainer.state.global_step)
        if self._rank is None and not self.trainer.args.should_save:
            return
        facts = run_facts(self, self.selector.strategy) | {
            "world_size": self.trainer.args.world_size,
            "data": self._data.facts(self.trainer.state.global_step),
        }
        save_run(output_dir, self.selector, self._domains, facts, self._rank)

    def _begin(self, checkpoint: str | None, trial: int | None = None) -> None:
        seed = seed_of_rank(self.seed, self._rank)
        self.selector = Selector(self.selector.strategy, seed=seed)
        self._planner, self._trained, self._rows = None, TrainedLosses(), RowBatches()
        self._loss_check = LossCheck(
            self.trainer, self._call["compute_loss"], self._scorer, self.normalize
        )
        if self._reuse is not None:
            self._reuse.start(self.trainer.model)
        if isinstance(self._reference, nn.Module):
            self._reference.to(self.trainer.args.device)
        if isinstance(self._scorer, CausalLMScorer):
            self._scorer.reset()
        step = self._resume(checkpoint)
        self._meter.start(step, self.trainer.args.process_index == 0, trial)

    def _during(self) -> AbstractContextManager[None]:
        return self._data.standing()

    def _end(self) -> None:
        self._meter.stop()

    def _resume(self, checkpoint: str | None) -> int | None:
        """Read the state of a checkpoint; return its step, None without one."""
        facts = None
        if checkpoint is not None:
            facts = resume_run(
                checkpoint, self.selector, self._domains, run_facts(self, self.selector.strategy),
                self._rank, self.trainer.args.world_size,
            )  # fmt: skip
        self._data.begin(facts, checkpoint)
        # A record goes on where the trainer does, with or without a state of the selection.
        return None if checkpoint is None else trained_steps(checkpoint)
