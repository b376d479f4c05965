"""Online selection in TRL's GRPOTrainer: which problems, which groups, which tokens.

A bare ``TrainerCallback`` never sees a generation batch, so this one takes the trainer and wraps a
few bound methods **of that instance** (they are listed in ``seams.py``); each calls the
trainer's own. Repeated is the definition of advantages alone, which is needed again over the final
groups; a test holds it to the trainer's bits. :meth:`RolloutSelection.detach` puts everything back.

- ``_generate_and_score_completions``: choose the problems, generate, let the gate decide, generate
  again at the same weights, and return as many rows on every rank;
- ``_calculate_rewards``: the outcomes, which the trainer has gathered over all ranks already;
- ``_prepare_inputs``, ``compute_loss`` and ``training_step``: what each micro-batch counts where
  rows were dropped (``loss.py``), in the losses of subclasses too;
- ``_compute_loss`` and ``_get_per_token_logps_and_entropies``: token weights, temperatures, and
  with ``fused_logprobs`` the head (``head.py``);
- ``get_train_dataloader``: rows know their number; ``log``, ``_save_rng_state`` and
  ``_inner_training_loop``: metrics and state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from onlinesel.parallel.distributed import world_size
from onlinesel.report.runlog import RunLog
from onlinesel.rl.prompts import PromptPool, PromptSampler
from onlinesel.rl.refill import Refill
from onlinesel.rl.temperature import AdaptiveTemperature
from onlinesel.rl.types import Advantages, TokenWeights
from onlinesel.types import Strategy

try:
    from onlinesel.callbacks._shared.announce import rollout_opening
    from onlinesel.callbacks._shared.attached import AttachedCallback
    from onlinesel.callbacks._shared.record import trainer_settings
    from onlinesel.callbacks._shared.trainers import is_stream, seed_of
    from onlinesel.callbacks._shared.wrapping import overridden
    from onlinesel.callbacks.grpo.checks import check
    from onlinesel.callbacks.grpo.generate import BatchMaker
    from onlinesel.callbacks.grpo.loss import MicroLoss, Window, regroup
    from onlinesel.callbacks.grpo.meter import RolloutMeter
    from onlinesel.callbacks.grpo.order import LoaderOrder
    from onlinesel.callbacks.grpo.outcomes import Outcomes
    from onlinesel.callbacks.grpo.prompts import make_pool
    from onlinesel.callbacks.grpo.rewards import RewardGuard
    from onlinesel.callbacks.grpo.rows import ROWS
    from onlinesel.callbacks.grpo.state import (
        fill_tensors,
        load_run,
        part,
        prefixed,
        restore_fill,
        save_run,
    )
    from onlinesel.callbacks.grpo.tokens import TokenTerm
    from onlinesel.data.rows import NumberedRows
except ImportError as error:
    raise ImportError(
        'onlinesel.callbacks.grpo needs TRL: pip install "onlinesel[trl]".'
    ) from error

__all__ = ["RolloutSelection"]

_WRAPPED = (
    "get_train_dataloader",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_prepare_inputs",
    "training_step",
    "compute_loss",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
    "log",
    "_save_rng_state",
    "_inner_training_loop",
)


class RolloutSelection(AttachedCallback):
    """Choose the problems, the groups and the tokens that GRPO trains on.

    Every part is optional; without any, the trainer does what it did before.

    Args:
        trainer: A TRL ``GRPOTrainer``. It is changed at once; add the callback to the same trainer.
        gate: Strategy on ``reward`` and ``group`` that drops groups after the rollout, as
            :class:`onlinesel.rl.PassRateBand`.
        refill: How a batch that the gate left short is filled: with the problems that come next in
            the loader's order, or with those that ``prompts`` chooses; None never generates twice
            and trains on what is left.
        prompts: Which problems are rolled out, as :class:`onlinesel.rl.SharedDifficulty`; they are
            chosen at the moment of the rollout, and the loader's own rows are then not used. None
            takes the loader's.
        rollouts: Strategy on ``reward`` and ``group`` that picks completions within each kept
            group, as :class:`onlinesel.rl.MaxVariance`.
        advantages: Replaces the trainer's definition, as :class:`onlinesel.rl.TokenAverage`.
        tokens: Weights and clip ranges of single tokens, as :class:`onlinesel.rl.HAPO`.
        temperature: Sampling temperature of every token
            (:class:`onlinesel.rl.AdaptiveTemperature`).
        fused_logprobs: Compute log-probabilities and entropies by
            :func:`onlinesel.kernels.policy_logprobs` instead of TRL's fused head: the same up to
            rounding, with logits kept in float32 where TRL rounds them to bfloat16 (which makes
            ``cast_lm_head_to_fp32`` needless), each token's temperature exact, and a backward pass
            of the head over those tokens alone whose loss has a gradient, without groups of
            advantage 0, clipped tokens and those that ``tokens`` drops. False keeps TRL's bits.
        outcome: What says right or wrong: the name of a reward function (or of an environment that
            gives its own reward), the function itself, several of them, of which the first that
            is not None counts, or a rule ``(rewards by name, row) -> outcome``. Needed if there
            are several functions: gates and samplers must not see a shaped sum. Functions of one
            name are ``"name#1"``, ``"name#2"``.
        success: Outcome above which an answer is right. None takes outcomes as they are: 0, 1, and
            between them graded ones, which count as that fraction of a right answer.
        seed: Of the selection's own generators, the same on all ranks; None takes the trainer's.
        reward_timeout: Seconds after which a reward function that does not answer ends the run,
            on all ranks; None for no bound.
        record: Folder (or an open :class:`onlinesel.report.runlog.RunLog`) for ``onlinesel
            report`` and ``onlinesel prompts``.
        record_text: Write what the first 2,000 prompts say into it, 400 characters of each.

    Raises:
        ValueError: The arguments, the trainer or its settings do not fit together; the message
            says what to change.
        TypeError: A part is not of its kind.

    Example:
        ```python
        trainer = GRPOTrainer(model, reward_funcs=correct, args=args, train_dataset=dataset)
        trainer.add_callback(
            RolloutSelection(
                trainer,
                gate=PassRateBand(0.25, 0.75),
                refill=Refill(max_rounds=3),
                prompts=SharedDifficulty(target=0.5),
            )
        )
        trainer.train()
        ```
    """

    _wrapped = _WRAPPED
    _instead = "Use When(..., stop=step) to end a gate within a run."

    def __init__(
        self,
        trainer: Any,
        *,
        gate: Strategy | None = None,
        refill: Refill | None = None,
        prompts: PromptSampler | None = None,
        rollouts: Strategy | None = None,
        advantages: Advantages | None = None,
        tokens: TokenWeights | None = None,
        temperature: AdaptiveTemperature | None = None,
        fused_logprobs: bool = False,
        outcome: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
        success: float | None = None,
        seed: int | None = None,
        reward_timeout: float | None = None,
        record: str | Path | RunLog | None = None,
        record_text: bool = True,
    ) -> None:
        self.parts: dict[str, Any] = {
            "gate": gate, "refill": refill, "prompts": prompts, "rollouts": rollouts,
            "advantages": advantages, "tokens": tokens, "temperature": temperature,
        }  # fmt: skip
        self.trainer, self.success = trainer, success
        self.seed = seed_of(trainer) if seed is None else seed
        check(trainer, self.parts, success, fused_logprobs)
        deciding = ("gate", "prompts", "rollouts", "advantages")
        self._outcomes = Outcomes(
            trainer,
            outcome,
            success,
            asking=[name for name in deciding if self.parts[name] is not None],
            counting=prompts is not None and bool(prompts.needs),
        )
        self._idle = not any(p is not None for p in self.parts.values()) and record is None
        self._guard = RewardGuard(reward_timeout)
        scores = bool(advantages and advantages.needs_scores)
        self._tokens = TokenTerm(trainer, tokens, temperature, scores, fused_logprobs)
        self.meter = RolloutMeter(record, self._told)
        self.meter.read_texts(trainer, record_text)
        self._maker: BatchMaker | None = None
        self._window = Window()
        log_probs = trainer._get_per_token_logps_and_entropies
        self._loss = MicroLoss(trainer, self.parts, fused_logprobs, log_probs)
        self._attach()

    def prompt_table(self) -> list[dict[str, Any]]:
        """Return what is believed about every problem; empty without a prompt sampler."""
        return [] if self._pooled is None else self._pooled.table()

    @property
    def _pooled(self) -> PromptPool | None:
        return None if self._maker is None else self._maker.filler.pool

    # Generation -----------------------------------------------------------------------------

    def _on_get_train_dataloader(self) -> Any:
        """Build the trainer's own loader, over rows that know their number."""
        trainer, dataset = self.trainer, self.trainer.train_dataset
        if self._idle or is_stream(dataset):
            return self._call["get_train_dataloader"]()
        build = trainer._get_train_sampler

        def sampler(*_: Any) -> Any:
            with overridden(trainer, {"train_dataset": dataset}):
                return build(dataset)  # one's own may read columns of it

        changes = {"train_dataset": NumberedRows(dataset), "_get_train_sampler": sampler}
        with overridden(trainer, changes):
            return self._call["get_train_dataloader"]()

    def _on__generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a generation batch that is worth training on."""
        maker = self._maker
        if maker is None or not self.trainer.model.training:
            return self._call["_generate_and_score_completions"](inputs)
        step = self.trainer.state.global_step
        batch, filled = maker.make(inputs, step)
        self._window.begin(empty=filled.empty, skip=filled.skip)
        self.meter.generated(filled, step)
        return batch

    def _on__calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Let the trainer compute the rewards, and keep what all ranks now know."""
        trainer = self.trainer
        guarded = self._guard.wrap(trainer.reward_funcs, trainer.reward_func_names)
        with overridden(trainer, {"reward_funcs": guarded}):
            rewards: Tensor = self._call["_calculate_rewards"](inputs, *args, **kwargs)
        self._guard.check()
        if self._maker is not None and trainer.model.training:
            self._maker.scored = rewards, self._outcomes.of(rewards, inputs, self._guard)
        return rewards

    # The loss -------------------------------------------------------------------------------

    def _on__get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        call = self._call["_get_per_token_logps_and_entropies"]
        self._loss.asked()
        return self._tokens.log_probs(call, model, *args, **kwargs)

    def _on__prepare_inputs(self, generation_batch: Any) -> Any:
        """Spread the rows that train over the micro-batches of a new generation batch."""
        trainer, before = self.trainer, self.trainer._buffered_inputs
        inputs = self._call["_prepare_inputs"](generation_batch)
        parts = trainer._buffered_inputs
        if self._maker is None or parts is before or not parts or ROWS not in parts[0]:
            return inputs
        trainer._buffered_inputs = regroup(parts, world_size())
        return trainer._buffered_inputs[trainer._step % len(parts)]

    def _on_training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Count what trains of an optimizer step; ``on_pre_optimizer_step`` comes too late."""
        loss = self._call["training_step"](model, *args, **kwargs)
        self._window.add(loss)
        last = self.trainer.accelerator.sync_gradients
        return self._window.close(loss, model) if last else loss

    def _on_compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        call, idle = self._call["compute_loss"], self._maker is None and not self._tokens.fused
        if idle or not self.trainer.model.training:
            return call(model, inputs, *args, **kwargs)
        return self._loss.compute(call, model, inputs, *args, **kwargs)

    def _on__compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        call = self._call["_compute_loss"]
        if not self._tokens.active or not self.trainer.model.training:
            return call(model, inputs)
        return self._tokens.loss(call, model, inputs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a skipped batch leave the weights as they are, momentum and decay included."""
        if self._window.skipped:
            kwargs["optimizer"].zero_grad(set_to_none=True)
        self._window.clear()

    # The run --------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the step."""
        self.meter.step_began()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.meter.step_ended(state.global_step)

    def _on_log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and not self._idle:
            logs.update(self.meter.drain())
            metrics = {} if self._pooled is None else self._pooled.metrics()
            logs.update({f"rollouts/{name}": value for name, value in metrics.items()})
        self._call["log"](logs, *args, **kwargs)
        self.meter.evaluated(self.trainer.state.global_step, logs)

    def _told(self) -> dict[str, Any]:
        """Return what a record says of the run."""
        settings, seed = trainer_settings(self.trainer), self.trainer.args.seed
        name = _name(self.parts["gate"], self.parts["prompts"])
        return self._facts() | {"name": name, "trainer_seed": seed, "settings": settings}

    def _facts(self) -> dict[str, Any]:
        return {name: repr(value) for name, value in self.parts.items()} | {
            "num_generations": self.trainer.num_generations,
            "num_iterations": self.trainer.num_iterations,
            "steps_per_generation": self.trainer.args.steps_per_generation,
            "outcome": self._outcomes.name,
            "success": self.success,
            "seed": self.seed,
            "strategy": ", ".join(
                f"{name}={value!r}" for name, value in self.parts.items() if value is not None
            ),
        }

    def _begin(self, checkpoint: str | None, trial: int | None = None) -> None:
        if self._idle:
            return
        self.meter.step_began()  # embedding the prompts is part of what choosing costs
        found = load_run(self.trainer, checkpoint, self._facts(), type(self).__name__)
        state, facts = found if found is not None else ({}, {})
        refill = self.parts["refill"]
        pool = make_pool(self.trainer, self.parts["prompts"], self.seed, part(state, "pool"))
        again = refill is not None and refill.max_rounds > 0
        self._maker = BatchMaker(
            self.trainer,
            self.parts,
            self._tokens,
            generate=self._call["_generate_and_score_completions"],
            log_probs=self._call["_get_per_token_logps_and_entropies"],
            pool=pool,
            order=LoaderOrder(self.trainer) if again and pool is None else None,
            seed=self.seed,
        )
        if self.trainer._buffered_inputs is None:  # else a batch goes on that was begun before
            self._tokens.statistics = {}
        self._tokens.heat = None
        self._window.restore(facts)
        if found is not None:
            restore_fill(self._maker.filler, self._maker.watch, state)
            self._tokens.statistics = part(state, "statistics")
            self._tokens.heat = part(state, "heat") or None
        resumed = None if found is None else int(facts["step"])
        writes = self.trainer.args.process_index == 0
        self.meter.start(resumed, facts.get("totals", {}), writes, trial)
        self.meter.announce(partial(rollout_opening, self.trainer, self.parts))

    def _end(self) -> None:
        self.meter.table(self.prompt_table())
        self.meter.stop()

    def _on__save_rng_state(self, output_dir: str) -> None:
        """Write the state beside the trainer's own, before the checkpoint counts as complete."""
        self._call["_save_rng_state"](output_dir)
        if self._maker is None:
            return
        tensors = fill_tensors(self._maker.filler, self._maker.watch)
        tensors |= prefixed(self._tokens.statistics, "statistics")
        tensors |= prefixed(self._tokens.heat or {}, "heat")
        facts = {**self._facts(), "totals": self.meter.totals(), **self._window.facts()}
        save_run(self.trainer, output_dir, tensors, facts)
        if self.trainer.args.should_save:
            self.meter.table(self.prompt_table())


def _name(gate: Strategy | None, prompts: PromptSampler | None) -> str:
    """Name a run after what chooses in it."""
    names: Sequence[str] = [type(p).__name__ for p in (gate, prompts) if p is not None]
    return " + ".join(names) or "GRPO"
