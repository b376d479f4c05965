"""What plain loops and Lightning share: candidates in, planned micro-batches out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from onlinesel.callbacks._shared.announce import epoch_steps, opening
from onlinesel.callbacks._shared.belonging import check_settings
from onlinesel.callbacks._shared.labels import LabelRule, ask_model
from onlinesel.callbacks._shared.meter import Place, StepMeter
from onlinesel.callbacks._shared.micro_batch import MicroBatch
from onlinesel.callbacks._shared.record import model_settings, reference_kind
from onlinesel.callbacks._shared.replay import HELD, SCORER, check_limit
from onlinesel.callbacks._shared.replay import refuse as refuse_reuse
from onlinesel.callbacks._shared.scorer import RowScorer
from onlinesel.data.columns import map_tensors
from onlinesel.data.loader import CandidateLoader, Candidates
from onlinesel.data.randomness import seed_of_rank
from onlinesel.data.rows import FILLER_ID
from onlinesel.parallel.agreement import check_arguments, check_candidates, check_scorer
from onlinesel.parallel.agreement import check_settings as check_ranks
from onlinesel.parallel.distributed import gather_signals, rank, world_size
from onlinesel.scoring.own import Score
from onlinesel.selector import Selector
from onlinesel.step import StepPlan, StepPlanner
from onlinesel.types import Normalize, Scope, Signals, Strategy

__all__ = ["Score", "StepSource"]


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
        self.selector = (
            strategy if isinstance(strategy, Selector) else Selector(strategy, seed=seed)
        )
        self.strategy = self.selector.strategy
        self.candidates, self.scope, self.seed = candidates, scope, seed
        self.normalize = self.strategy.normalize if normalize is None else normalize
        self.ids, self.groups, self.order = ids, groups, order
        check_arguments(owner, candidates, scope, self.normalize)
        check_scorer(owner, "score", self.strategy, score)
        self._scorer = RowScorer(self.strategy, score, reference, self.refuse)
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
        settings = model_settings(self._scorer.core) | self.reader.facts() | self._told
        return self.facts() | {
            "name": type(self.strategy).__name__,
            "trainer_seed": torch.initial_seed(),
            "reference": reference_kind(self._scorer.reference),
            "settings": settings,
        }

    def facts(self) -> dict[str, Any]:
        """Return the settings that a checkpoint is held against and that ranks must share."""
        plain = ("candidates", "scope", "normalize", "ids", "seed")
        return {"strategy": repr(self.strategy)} | {name: getattr(self, name) for name in plain}

    def refuse(self, argument: str, rule: str, got: object, remedy: str) -> NoReturn:
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
        self.device = torch.device(device)
        self._scorer.take(model, core, call, self.device)
        core, self._labels = self._scorer.core, LabelRule()
        if self._reuse_wanted:
            from onlinesel.callbacks._shared.reuse import ReusedForward  # needs transformers

            self._scorer.reuse = ReusedForward(core, self._reuse_limit, model)
        pad_id = getattr(getattr(core, "config", None), "pad_token_id", None) or 0
        asked = thins and self.scope == "global"  # then all ranks draw the same epoch
        self.reader = CandidateLoader(
            loader, candidates=self.candidates, accumulate=accumulate, seed=self.seed,
            ids=self.ids, groups=self.groups, plan=self.strategy.epoch_plan, order=self.order,
            pad_id=pad_id, device=self.device, thin=self.selector.rows_of_epoch if asked else None,
        )  # fmt: skip
        check_ranks(self.owner, self.facts() | self.reader.facts(), self.device)
        check_candidates(self.owner, self.strategy, self.candidates)
        if self.scope != "global" and world_size() > 1 and self.selector.step == 0:
            self.selector = Selector(self.strategy, seed=seed_of_rank(self.seed, rank()))
        self._planner = StepPlanner(
            self.selector, self._scorer, candidates=self.candidates, scope=self.scope,
            normalize=self.normalize, pad_id=pad_id, device=self.device,
            count=self._labels.count, width=self._labels.width, mute=False,
        )  # fmt: skip
        return self.reader

    def _opening(self) -> str:
        """Return the line with which a run starts."""
        (steps, without), scorer = epoch_steps(self.reader), self._scorer
        return opening(
            self.strategy, scorer.core, candidates=self.candidates, rows=self.reader.step_rows(),
            steps=steps, without=without, ids=self.reader.identity, reference=scorer.reference,
            own_scorer=scorer.own, reused=scorer.reuse is not None,
            checkpointing=bool(getattr(scorer.core, "is_gradient_checkpointing", False)),
        )  # fmt: skip

    # One step -------------------------------------------------------------------------------

    def plan(self, window: Sequence[Candidates], step: int) -> StepPlan:
        """Decide about the candidates of one step, on the model's device."""
        self.meter.announce(self._opening)
        for part in window:
            self._scorer.check_columns(part.columns)
        self._scorer.rebuild, self._before = window[0].rebuild, self.selector.mark()
        batches = [self._moved(part.columns) for part in window]
        self._settle_labels(batches)
        groups = None if window[0].groups is None else [_present(part.groups) for part in window]
        ids = [part.ids for part in window]
        given = [part.columns for part in window]
        decide = partial(self._planner.plan, batches, ids, step, groups, given)
        plan = self.meter.deciding(decide, self._scorer.reuse, batches)
        self._seen, self.open = [], True
        return plan

    def _settle_labels(self, batches: Sequence[dict[str, Any]]) -> None:
        """Find out which labels count, before the first step."""
        if not self._labels.settled:
            scorer = self._scorer
            probe, facts = ask_model(batches[0], scorer.model, scorer.core, scorer.call)
            scorer.check_loss(probe, facts)
            self._labels.settle(batches, facts, self.device)
        for columns in batches:
            self._labels.check(self.owner, columns)

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
            micro = MicroBatch(self._scorer.rebuild(batch), plan.ids[m], plan.weights[m], m == last)
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
        if self._scorer.reuse is not None:
            self._scorer.reuse.finish()
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
        self._scorer.advance()
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
        check_settings(self.refuse, state["facts"], self.facts())
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
