"""What plain loops and Lightning share: candidates in, planned micro-batches out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onlinesel.callbacks._shared.announce import epoch_steps, opening
from onlinesel.callbacks._shared.labels import LabelRule, ask_model
from onlinesel.callbacks._shared.meter import Place, StepMeter
from onlinesel.callbacks._shared.micro_batch import MicroBatch
from onlinesel.callbacks._shared.record import model_settings
from onlinesel.callbacks._shared.replay import HELD, SCORER, check_limit
from onlinesel.callbacks._shared.replay import refuse as refuse_reuse
from onlinesel.data.batch import is_causal
from onlinesel.data.columns import map_tensors
from onlinesel.data.loader import CandidateLoader, Candidates
from onlinesel.data.rows import FILLER_ID
from onlinesel.parallel.agreement import (
    check_arguments,
    check_candidates,
    check_scorer,
    check_settings,
)
from onlinesel.parallel.distributed import gather_signals, rank, world_size
from onlinesel.scoring import CausalLMScorer, evaluating, unwrap
from onlinesel.scoring.loss_probe import LossFacts, Probe, differs
from onlinesel.selector import Selector
from onlinesel.step import StepPlan, StepPlanner
from onlinesel.types import Normalize, Scope, Signals, Strategy

if TYPE_CHECKING:
    from onlinesel.callbacks._shared.reuse import ReusedForward

__all__ = ["Score", "StepSource"]

Score = Callable[[Any, Any], Signals | Tensor]
"""``(model, batch) -> Signals``, or the ``(N,)`` losses of the rows."""


class StepSource:
    """Plan optimizer steps out of candidates, and carry what must survive a checkpoint.

    Args:
        owner: Name used in errors.
        strategy: The method, or a selector that holds it.
        candidates: As the hosts' argument; so are the others.
    """

    def __init__(
        self,
        owner: str,
        strategy: Strategy | Selector,
        *,
        candidates: int,
        scope: Scope,
        normalize: Normalize | None,
        seed: int,
        score: Score | None,
        ids: str,
        groups: str | None,
        order: Any,
        reference: nn.Module | str | None,
        record: Place,
        reuse_forward: bool,
        reuse_limit: float | None,
        log_all: bool,
    ) -> None:
        check_limit(reuse_forward, reuse_limit)
        if reuse_forward and score is not None:
            refuse_reuse("score", "None", type(score).__name__, SCORER)
        self.owner, self._reuse_wanted, self._reuse_limit = owner, reuse_forward, reuse_limit
        self._reuse: ReusedForward | None = None
        self.selector = (
            strategy if isinstance(strategy, Selector) else Selector(strategy, seed=seed)
        )
        self.strategy = self.selector.strategy
        self.candidates, self.scope, self.seed = candidates, scope, seed
        self.normalize = self.strategy.normalize if normalize is None else normalize
        self.ids, self.groups, self.order = ids, groups, order
        check_arguments(owner, candidates, scope, self.normalize)
        check_scorer(owner, "score", self.strategy, score)
        self._score, self._reference = score, reference
        self._needs = [n for n in self.strategy.needs if n not in ("ids", "tokens", "group")]
        self._default: CausalLMScorer | None = None
        self._rebuild: Callable[[Any], Any] = dict
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.open = False  # a step is planned and not finished
        told = getattr(getattr(order, "mixture", None), "needs", ())
        if "reference_loss" in told:
            self.refuse(
                "order", "of a mixture that needs no losses of a reference per row", order.mixture,
                "Give DoReMi one reference loss for each domain.",
            )  # fmt: skip
        self._moves_order = bool(told)
        self.observing = bool(self.strategy.observes) or self._moves_order
        self._told: dict[str, Any] = {}
        self.meter = StepMeter(record, self._record_facts, log_all=log_all)

    def begin(self, resume_step: int | None, told: dict[str, Any]) -> None:
        """Begin a run, or go on with one; what is told of it joins its record."""
        self._told = told
        self.meter.start(resume_step, writes=rank() == 0)

    def _record_facts(self) -> dict[str, Any]:
        """Return the entries of ``run.json``, once a run begins."""
        settings = model_settings(self._core) | self.reader.facts() | self._told
        name, seed = type(self.strategy).__name__, torch.initial_seed()
        return self.facts() | {"name": name, "trainer_seed": seed, "settings": settings}

    def facts(self) -> dict[str, Any]:
        """Return the settings that a checkpoint is held against and that ranks must share."""
        plain = ("candidates", "scope", "normalize", "ids", "seed")
        return {"strategy": repr(self.strategy)} | {name: getattr(self, name) for name in plain}

    def refuse(self, argument: str, rule: str, got: object, remedy: str) -> None:
        """Raise the designed error of the host."""
        raise ValueError(f"{self.owner}: {argument} must be {rule}, got {got}. {remedy}")

    def attach(
        self,
        loader: Any,
        model: nn.Module,
        *,
        accumulate: int | Callable[[], int],
        device: torch.device | str,
        call: Callable[[Callable[[Any], Any], Any], Any] | None = None,
        core: nn.Module | None = None,
        thins: bool = False,
    ) -> CandidateLoader:
        """Take a loader and a model; returns the reader of the candidates.

        A second call, for a new loader, leaves the selector as it stands.

        Args:
            loader: What gives the batches.
            model: The model as the loop calls it, wrapped or not.
            accumulate: Micro-batches of an optimizer step.
            device: Where the model and the collectives need their tensors.
            call: How to call a function of the model, where an engine must be told; by default
                the function is called with ``model``.
            core: The model inside the wrappers; found by default.
            thins: Let the strategy leave rows out of an epoch, whose length then varies.
        """
        self.device, self._model = torch.device(device), model
        self._core = unwrap(model) if core is None else core
        self._call = call or (lambda function, model: function(model))
        self._check_scorer()
        self._labels = LabelRule()
        if self._reuse_wanted:
            from onlinesel.callbacks._shared.reuse import ReusedForward  # needs transformers

            self._reuse = ReusedForward(self._core, self._reuse_limit, model)
        pad_id = getattr(getattr(self._core, "config", None), "pad_token_id", None) or 0
        asked = thins and self.scope == "global"  # then all ranks draw the same epoch
        self.reader = CandidateLoader(
            loader, candidates=self.candidates, accumulate=accumulate, seed=self.seed,
            ids=self.ids, groups=self.groups, plan=self.strategy.epoch_plan, order=self.order,
            pad_id=pad_id, device=self.device, thin=self.selector.rows_of_epoch if asked else None,
        )  # fmt: skip
        check_settings(self.owner, self.facts() | self.reader.facts(), self.device)
        check_candidates(self.owner, self.strategy, self.candidates)
        if self.scope != "global" and world_size() > 1 and self.selector.step == 0:
            # Ranks that decide alone must not draw the same numbers for different rows.
            self.selector = Selector(self.strategy, seed=self.seed + 1_000_003 * rank())
        self._planner = StepPlanner(
            self.selector, self._signals, candidates=self.candidates, scope=self.scope,
            normalize=self.normalize, pad_id=pad_id, device=self.device,
            count=self._labels.count, width=self._labels.width, mute=False,
        )  # fmt: skip
        return self.reader

    def _check_scorer(self) -> None:
        """Make the default scorer where it fits, and say what is missing where it does not."""
        if self._score is not None or not self._needs:
            return
        name = type(self._core).__name__
        if getattr(self._core, "get_output_embeddings", lambda: None)() is None:
            self.refuse(
                "score", "given for a model that is no causal language model", f"None with {name}",
                f"{type(self.strategy).__name__} needs {', '.join(self._needs)}: pass score=, for "
                "example onlinesel.ClassificationScorer() or a function (model, batch) -> losses.",
            )  # fmt: skip
        known = isinstance(self._reference, nn.Module) or self._reference == "adapter"
        if "reference_loss" in self._needs and not known:
            self.refuse(
                "reference", "a model or 'adapter'", repr(self._reference),
                f"{type(self.strategy).__name__} compares the loss with it: load a model with "
                "AutoModelForCausalLM.from_pretrained(...) and pass that.",
            )  # fmt: skip
        if isinstance(self._reference, nn.Module):
            self._reference.to(self.device)
        self._default = CausalLMScorer(
            self._needs, reference=self._reference, **self.strategy.scorer_options
        )

    def _signals(
        self, batch: dict[str, Any], needs: Sequence[str], hosted: Mapping[str, Any]
    ) -> Signals:
        scorer = self._default
        if scorer is not None:
            around: AbstractContextManager[None] = nullcontext()
            if self._reuse is not None:
                around = self._reuse.scoring(batch)
                batch = self._reuse.without_marks(batch)
            inputs = self._rebuild(batch)
            batch = inputs if isinstance(inputs, dict) else batch
            scored = partial(scorer, core=self._core, needs=needs, around=around, hosted=hosted)
            return self._call(lambda model: scored(model, batch), self._model)
        score, rebuilt = self._score, self._rebuild(batch)
        assert score is not None
        with evaluating(self._model):
            found = self._call(lambda model: score(model, rebuilt), self._model)
        if isinstance(found, Signals):
            return found
        if found.dim() != 1:
            self.refuse(
                "score", "a function that gives one loss a row", f"shape {tuple(found.shape)}",
                "Reduce each row first: .mean(dim=1).",
            )  # fmt: skip
        return Signals(loss=found)

    def _opening(self) -> str:
        """Return the line with which a run starts."""
        steps, without = epoch_steps(self.reader)
        return opening(
            self.strategy, self._core, candidates=self.candidates, rows=self.reader.step_rows(),
            steps=steps, without=without, ids=self.reader.identity, reference=self._reference,
            own_scorer=self._score is not None, reused=self._reuse is not None,
            checkpointing=bool(getattr(self._core, "is_gradient_checkpointing", False)),
        )  # fmt: skip

    # One step -------------------------------------------------------------------------------

    def plan(self, window: Sequence[Candidates], step: int) -> StepPlan:
        """Decide about the candidates of one step, on the model's device."""
        self.meter.announce(self._opening)
        for part in window:
            self._check_columns(part.columns)
        self._rebuild, self._before = window[0].rebuild, self.selector.mark()
        batches = [self._moved(part.columns) for part in window]
        self._settle_labels(batches)
        groups = None if window[0].groups is None else [_present(part.groups) for part in window]
        ids = [part.ids for part in window]
        given = [part.columns for part in window]
        decide = partial(self._planner.plan, batches, ids, step, groups, given)
        plan = self.meter.deciding(decide, self._reuse, batches)
        self._seen, self.open = [], True
        return plan

    def _settle_labels(self, batches: Sequence[dict[str, Any]]) -> None:
        """Find out which labels count, before the first step."""
        if not self._labels.settled:
            probe, facts = ask_model(batches[0], self._model, self._core, self._call)
            if facts is not None and self._default is not None:
                self._check_loss(probe, facts)
            self._labels.settle(batches, facts, self.device)
        for columns in batches:
            self._labels.check(self.owner, columns)

    def _check_loss(self, probe: Probe, facts: LossFacts) -> None:
        """Refuse a model that computes another loss than the default scorer sees."""
        name = type(self._core).__name__
        if not facts.shifts:
            self.refuse(
                "score", "given for a model whose loss does not shift its labels",
                f"None with {name}", "Write a function (model, batch) -> losses.",
            )  # fmt: skip
        scorer, found = self._default, facts.value
        assert scorer is not None
        if facts.divides:
            row, needs = probe.one, ("loss",)
            signals = self._call(
                lambda model: scorer(model, row, core=self._core, needs=needs), self._model
            )
            found = float(signals.require(scorer, "loss"))
        if facts.divides and differs(found, facts.value):
            self.refuse(
                "score", f"given for {name}, whose loss of a token is {facts.value:.3f}",
                f"None, which finds {found:.3f}",
                "The model changes its logits after the LM head in a way that is not known here: "
                "write a function (model, batch) -> losses.",
            )  # fmt: skip

    def _check_columns(self, columns: dict[str, Any]) -> None:
        """Refuse a batch that the default scorer cannot read."""
        if self._default is not None and not is_causal(columns):
            self.refuse(
                "score", "given for a batch without 'input_ids' and 'labels' of one shape",
                f"None with {', '.join(columns)}", "Write a function (model, batch) -> losses.",
            )  # fmt: skip

    def _moved(self, columns: dict[str, Any]) -> dict[str, Any]:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        return {name: map_tensors(moved, value) for name, value in columns.items()}

    def micro_batches(self, plan: StepPlan, factor: float) -> list[MicroBatch]:
        """Return what a step trains, in the user's structure.

        Args:
            plan: The step.
            factor: What the engine divides the gradient by.
        """
        last, micro_batches = len(plan.batches) - 1, []
        for m, batch in enumerate(plan.batches):
            held = batch.pop(HELD, None)
            micro = MicroBatch(self._rebuild(batch), plan.ids[m], plan.weights[m], m == last)
            micro._held = held
            # Not by the micro-batch itself, which a cycle would keep alive with all its rows.
            seen = partial(self._note, weakref.ref(micro), plan.ids[m], plan.weights[m])
            micro.weighing = plan.weighing(m, factor, seen)
            micro_batches.append(micro)
        return micro_batches

    def _note(self, micro: Any, ids: Tensor, weights: Tensor, losses: Tensor) -> None:
        owner = micro()
        if owner is not None:
            owner.used = True
        if self.observing:
            self._seen.append((ids, losses.float().cpu().masked_fill(weights == 0, torch.nan)))

    def finish(self, step: int) -> None:
        """Learn from the rows that just trained, once per planned step."""
        self.open = False
        if self._reuse is not None:
            self._reuse.finish()
        if self.observing:
            if not self._seen:
                self.refuse(
                    "losses", "passed through the step's weighted mean", "none",
                    f"{type(self.strategy).__name__} learns from them: call micro.loss(losses) on "
                    "each micro-batch, in Lightning onlinesel.weighted_mean(losses).",
                )  # fmt: skip
            ids, losses = (torch.cat(part) for part in zip(*self._seen, strict=True))
            seen = Signals(ids=ids, loss=losses)
            everywhere, _ = gather_signals(seen, self.device)
            self.selector.observe(everywhere if self.scope == "global" else seen)
            if self._moves_order:
                real = everywhere.take(everywhere.row_ids() != FILLER_ID)
                self.order.observe(real.row_ids(), real.require(self, "loss"))
        if self._default is not None:
            self._default.advance()
        self.reader.advance()
        self.meter.end(step)

    # State ----------------------------------------------------------------------------------

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return everything that a resumed run needs: plain values and CPU tensors."""
        # Half a step cannot be resumed, its gradient being lost: it is decided anew then.
        states = [self.selector.state_dict(self._before if self.open else None)]
        if self.scope != "global" and world_size() > 1:
            states = _gathered(states[0])
        return {
            "format": 1, "step": step, "facts": self.facts(), "selectors": states,
            "data": self.reader.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Continue where :meth:`state_dict` was taken; returns the step.

        Raises:
            ValueError: The state belongs to other settings. Nothing is changed then.
        """
        if state.get("format") != 1:
            self.refuse(
                "state", "of format 1", state.get("format"), "Pass what state_dict() returned."
            )
        for name, value in self.facts().items():
            if state["facts"][name] != value:
                self.refuse(
                    name, f"the checkpoint's ({state['facts'][name]})", value,
                    "Resume with the arguments that wrote it.",
                )  # fmt: skip
        self.reader.load_state_dict(state["data"])
        self.open, self._seen = False, []
        alone = self.scope != "global"
        self.selector.load_states(
            state["selectors"], rank() if alone else 0, world_size() if alone else 1
        )
        return int(state["step"])


def _present(groups: Tensor | None) -> Tensor:
    assert groups is not None
    return groups


def _gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    states: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(states, state)
    return states
