"""What a GRPO run generated, kept and threw away, for the log and for the report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from onlinesel.callbacks._shared.announce import counted, percent
from onlinesel.callbacks._shared.meter import Meter
from onlinesel.callbacks.grpo.decide import Filled
from onlinesel.report.runlog import RunLog

__all__ = ["RolloutMeter"]

_COUNTED = ("rollouts", "tokens", "rejected_tokens", "seconds", "cpu_seconds", "rows")


def _counted(filled: Filled) -> bool:
    """Whether outcomes are shares of a right answer, so that they can be counted."""
    outcome = torch.cat([group.outcome for group in filled.scored])
    return bool((((outcome >= 0) & (outcome <= 1)) | torch.isnan(outcome)).all())


@dataclass
class _Tally:
    """What one run, from its start or from a checkpoint on, generated and threw away.

    Attributes:
        batches: Generation batches.
        groups: That were generated.
        idle: Of these, how many did not train.
        rollouts: Completions generated.
        tokens: Of these.
        wasted: Tokens of groups that did not train.
        prepared: Seconds before the first step, on embedding the prompts.
    """

    batches: int = 0
    groups: int = 0
    idle: int = 0
    rollouts: int = 0
    tokens: int = 0
    wasted: int = 0
    prepared: float = 0.0


class RolloutMeter(Meter):
    """Count generation batches and their cost."""

    _began: tuple[float, float] | None = None
    seconds: float
    cpu_seconds: float
    rollouts = tokens = rejected_tokens = 0

    def start(
        self,
        resume_step: int | None,
        totals: dict[str, float],
        writes: bool,
        trial: int | None = None,
    ) -> None:
        """Begin a run, or go on with one whose ``totals`` a checkpoint remembers.

        What was spent since :meth:`step_began`, on embedding the prompts, is part of a new run.
        """
        spent = (0.0, 0.0)
        if self._began is not None and not totals:
            wall, cpu = self._began
            spent = time.perf_counter() - wall, time.process_time() - cpu
        self._means.drain()
        self._began = None
        self._tally = _Tally(prepared=spent[0])
        for name in _COUNTED:
            setattr(self, name, totals.get(name, 0))
        self.seconds += spent[0]
        self.cpu_seconds += spent[1]
        self.open(resume_step, writes, trial)

    def totals(self) -> dict[str, float]:
        """Return what must survive a checkpoint."""
        return {name: getattr(self, name) for name in _COUNTED}

    def step_began(self) -> None:
        """Note that an optimizer step begins."""
        self._began = time.perf_counter(), time.process_time()

    def step_ended(self, step: int) -> None:
        """Note that it has trained; evaluation and saving come after it."""
        if self._began is None:
            return
        wall, cpu = self._so_far()
        self._began = None
        self._means.add(step_seconds=wall - self.seconds)
        self.seconds, self.cpu_seconds = wall, cpu
        if self._log is not None:
            self._log.step(
                step=step,
                seconds=wall,
                cpu_seconds=cpu,
                rows=self.rows,
                candidates=self.rollouts,
            )

    def _so_far(self) -> tuple[float, float]:
        if self._began is None:
            return self.seconds, self.cpu_seconds
        wall, cpu = self._began
        return (
            self.seconds + time.perf_counter() - wall,
            self.cpu_seconds + time.process_time() - cpu,
        )

    def generated(self, filled: Filled, step: int) -> None:
        """Note one generation batch."""
        scored, kept = filled.scored, [group for group in filled.scored if group.kept]
        idle = [group for group in scored if group.number not in filled.training]
        wasted = sum(int(group.lengths.sum()) for group in idle)
        self.rollouts += filled.rollouts
        self.tokens += filled.tokens
        self.rejected_tokens += wasted
        tally = self._tally
        tally.batches, tally.rollouts = tally.batches + 1, tally.rollouts + filled.rollouts
        tally.groups, tally.idle = tally.groups + len(scored), tally.idle + len(idle)
        tally.tokens, tally.wasted = tally.tokens + filled.tokens, tally.wasted + wasted
        self.rows += sum(len(group.weights) for group in filled.groups)
        rates = [group.outcome.nanmean().item() for group in scored]
        dropped = [r for r, g in zip(rates, scored, strict=True) if not g.kept]
        known = [rate for rate in rates if rate == rate]
        values = {
            "kept_share": len(kept) / len(scored),
            "rounds": len(filled.batches),
            "rollouts": filled.rollouts,
            "short": filled.short,
            "surplus": sum(group.kept for group in idle) / len(scored),
            "unscorable": (len(rates) - len(known)) / len(scored),
            "rejected_token_share": wasted / max(filled.tokens, 1),
        }
        if _counted(filled):
            values["too_easy"] = sum(rate > 0.5 for rate in dropped) / len(scored)
            values["too_hard"] = sum(rate <= 0.5 for rate in dropped) / len(scored)
        if known:
            values["outcome_all"] = sum(known) / len(known)
        if kept:
            values["rollouts_per_kept"] = filled.rollouts / len(kept)
        kept_rates = [r for r, g in zip(rates, scored, strict=True) if g.kept and r == r]
        if kept_rates:
            values["outcome_kept"] = sum(kept_rates) / len(kept_rates)
        self._means.add(**values)
        if self._log is not None:
            self._write(self._log, filled, step)

    def closing(self) -> str | None:
        """Return what was generated and did not train; None before the first batch."""
        tally = self._tally
        if not tally.batches:
            return None
        line = (
            f"{self._said['name']} generated {counted(tally.rollouts, 'completion')} of "
            f"{counted(tally.groups, 'group')} for {tally.batches:,} generation "
            f"batch{'es' * (tally.batches > 1)}; {counted(tally.idle, 'group')} did not train, "
            f"{percent(tally.wasted / max(tally.tokens, 1))} of the tokens"
        )
        if tally.prepared >= 0.1:
            line += f"; preparing took {tally.prepared:,.3g} s"
        return line

    def _write(self, log: RunLog, filled: Filled, step: int) -> None:
        known = [~torch.isnan(group.outcome) for group in filled.scored]
        trials = [int(mask.sum()) for mask in known]
        pairs = zip(filled.scored, known, trials, strict=True)
        counts = _counted(filled)
        wall, cpu = self._so_far()
        log.generation(
            step=step,
            seconds=wall,
            cpu_seconds=cpu,
            rollouts=self.rollouts,
            tokens=self.tokens,
            rejected_tokens=self.rejected_tokens,
            rounds=len(filled.batches),
            prompts=[group.prompt for group in filled.scored],
            successes=[g.outcome[m].sum().item() if n and counts else None for g, m, n in pairs],
            trials=trials,
            kept=[group.number in filled.training for group in filled.scored],
        )
        if self.texts is not None:
            ids = [group.prompt for group in filled.scored]
            self.texts.prompts(ids)
            trains = [group.number in filled.training for group in filled.scored]
            rates = [group.outcome.nanmean().item() for group in filled.scored]
            self.texts.count(ids, trains, rates)

    def evaluated(self, step: int, logs: dict[str, float]) -> None:
        """Note a held-out reward, or what the trainer logged of its training."""
        if self._log is not None and {"loss", "reward"} <= logs.keys():
            self._log.logged(
                step=step,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                rows=self.rows,
                rollouts=self.rollouts,
                loss=logs["loss"],
                reward=logs["reward"],
            )
        if self._log is not None and "eval_reward" in logs:
            self._log.evaluation(
                step=step,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                rows=self.rows,
                rollouts=self.rollouts,
                loss=None,
                reward=logs["eval_reward"],
            )

    def table(self, rows: list[dict[str, Any]]) -> None:
        """Write what is believed about the problems."""
        if self._log is not None:
            self._log.prompt_table(rows)

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, under ``rollouts/``, and forget them."""
        return {f"rollouts/{name}": value for name, value in self._means.drain().items()}
