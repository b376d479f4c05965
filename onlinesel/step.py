"""One optimizer step: score its candidates, choose, deal the rows out, find the denominator.

This is the single place where counts, weights and the normaliser of a step come from; hosts only
carry its result. Everything competes that ``scope`` names, and nothing about the loss is decided
before the choice is made: subsetting after the normaliser was counted is the classic error, which
halves the gradient when half of the rows are kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onlinesel.batch import count_labels, deal, gather_rows, mute_rows, rows_in, take_rows, trim
from onlinesel.distributed import (
    check_agreement,
    exchange_rows,
    gather_signals,
    rank,
    sum_over_ranks,
)
from onlinesel.selector import Selector
from onlinesel.types import Selection, Signals

__all__ = ["SCOPES", "StepPlan", "StepPlanner"]

SCOPES = ("global", "rank", "batch")

Batch = dict[str, Any]
Place = tuple[int, int]
"""(micro-batch, row) of a candidate."""


@dataclass(frozen=True)
class StepPlan:
    """What one rank trains in one optimizer step.

    Attributes:
        batches: The micro-batches, as many as there were candidates; each has at least one row.
        weights: ``(n,)`` weight of each row of each micro-batch; 0 for a row that only keeps the
            rank in step with the others (its labels are -100).
        ids: ``(n,)`` int64 ids of those rows.
        denominator: Scalar ``D`` of the loss contract over all ranks; 1 where nothing has weight,
            so that the loss is 0 and not 0 / 0.
        normalize: ``"tokens"`` or ``"samples"``.
        decisions: What was decided about which signals, one pair per decision.
        seconds: Time from the candidates to this plan.
    """

    batches: list[Batch]
    weights: list[Tensor]
    ids: list[Tensor]
    denominator: Tensor
    normalize: str
    decisions: list[tuple[Signals, Selection]]
    seconds: float

    def multipliers(self, index: int) -> Tensor | None:
        """Return what each row's summed token loss is multiplied by before dividing by ``D``.

        None means 1 for every row that has labels left: the host's own loss is exact as it is.
        """
        weights = self.weights[index]
        if self.normalize == "samples":
            counts = count_labels(self.batches[index]).to(weights.device)
            return torch.where(counts > 0, weights / counts.clamp(min=1), 0.0)
        return None if bool(((weights == 1) | (weights == 0)).all()) else weights


@dataclass(frozen=True)
class _Share:
    """What one rank holds of a decided step: its batches (arrivals last) and who goes where."""

    batches: list[Batch]
    ids: list[Tensor]
    weights: list[Tensor]
    parts: list[list[Place]]


def _split(rows: list[Place], signals: Sequence[Signals]) -> list[list[Place]]:
    """Split rows over the micro-batches; where all candidates train, leave each in its own."""
    whole = [[(m, r) for r in range(s.size)] for m, s in enumerate(signals)]
    if rows == [place for part in whole for place in part]:
        return whole
    parts = len(signals)
    sizes = [len(rows) // parts + (j < len(rows) % parts) for j in range(parts)]
    bounds = [sum(sizes[:j]) for j in range(parts + 1)]
    return [rows[bounds[j] : bounds[j + 1]] for j in range(parts)]


class StepPlanner:
    """Turn the candidate micro-batches of a step into a :class:`StepPlan`.

    Args:
        selector: Decides.
        score: ``(batch, needs) -> Signals``, called once per micro-batch if anything is needed.
        candidates: Candidates per trained row.
        scope: ``"global"``: all candidates of the step compete, over every micro-batch and rank.
            ``"rank"``: those of this rank. ``"batch"``: each micro-batch alone.
        normalize: ``"tokens"`` or ``"samples"``.
        pad_id: Token that pads ``input_ids`` where rows of different width meet.
        device: Where collectives need their tensors.
    """

    def __init__(
        self,
        selector: Selector,
        score: Callable[[Batch, Sequence[str]], Signals],
        *,
        candidates: int = 1,
        scope: str = "global",
        normalize: str = "tokens",
        pad_id: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.selector = selector
        self._score = score
        self._candidates = candidates
        self._scope = scope
        self._normalize = normalize
        self._pad_id = pad_id
        self._device = device
        self._warned = False

    def plan(self, batches: Sequence[Batch], ids: Sequence[Tensor], step: int) -> StepPlan:
        """Decide about the candidates of one step.

        Args:
            batches: This rank's candidate micro-batches, without ids.
            ids: ``(n,)`` int64 ids of their rows.
            step: Optimizer step, counted from 0.
        """
        start = time.perf_counter()
        needs = self.selector.strategy.needs_at(step)
        signals = [
            self._signals(batch, row_ids, needs)
            for batch, row_ids in zip(batches, ids, strict=True)
        ]
        if self._scope == "batch":
            decisions = [(s, self._select(s, step)) for s in signals]
            weights = [d.weights for _, d in decisions]
            parts = [[(m, int(r)) for r in d.rows] for m, (_, d) in enumerate(decisions)]
            share = _Share(list(batches), list(ids), weights, parts)
        else:
            decision, share = self._compete(batches, ids, signals, step)
            decisions = [decision]
        built = [self._build(share, signals, part) for part in range(len(batches))]
        new_batches, new_weights, new_ids = (list(column) for column in zip(*built, strict=True))
        return StepPlan(
            new_batches,
            new_weights,
            new_ids,
            self._denominator(new_batches, new_weights),
            self._normalize,
            decisions,
            time.perf_counter() - start,
        )

    def _signals(self, batch: Batch, ids: Tensor, needs: Sequence[str]) -> Signals:
        """Score one micro-batch; tokens and ids are known without a forward."""
        size = rows_in(batch, "StepPlanner")
        if "labels" not in batch and "shift_labels" not in batch:
            raise ValueError(
                f"StepPlanner: batch must hold 'labels', got {sorted(batch)}. Let the collator "
                "give the labels of a causal language model, -100 where no loss is taken."
            )
        wanted = [name for name in needs if name not in ("ids", "tokens")]
        found = dict(self._score(batch, wanted).present()) if wanted else {}
        if ids.shape[0] != size:
            raise ValueError(
                f"StepPlanner: ids must have one entry per row ({size}), got {ids.shape[0]}. "
                "The collator merges or splits rows: turn packing and padding-free batches off."
            )
        found.update(ids=ids.cpu(), tokens=count_labels(batch).cpu())
        return Signals(**{name: value.cpu() for name, value in found.items()})

    def _select(self, signals: Signals, step: int) -> Selection:
        keep = -(-signals.size // self._candidates)
        selection = self.selector.select(signals, keep=keep, step=step)
        if selection.weights.dim() != 1:
            raise ValueError(
                "StepPlanner: weights must be one per row, got shape "
                f"{tuple(selection.weights.shape)}. Token weights belong to the RL hosts."
            )
        kept = selection.rows.numel()
        if self._candidates > 1 and kept > keep and not self._warned:
            self._warned = True
            warnings.warn(
                f"{kept} of {signals.size} candidates train where {keep} were asked for: "
                f"{self.selector.strategy} does not drop rows down to one in "
                f"{self._candidates}, and a step needs more memory. Use candidates=1 with methods "
                "that only weigh, and When(..., otherwise=Uniform()).",
                stacklevel=2,
            )
        return selection

    def _compete(
        self, batches: Sequence[Batch], ids: Sequence[Tensor], signals: Sequence[Signals], step: int
    ) -> tuple[tuple[Signals, Selection], _Share]:
        """Let all candidates of the scope compete, and give each rank as many winners."""
        names = signals[0].present()
        local = Signals(**{name: torch.cat([s.present()[name] for s in signals]) for name in names})
        places = [(m, r) for m, s in enumerate(signals) for r in range(s.size)]
        pool, counts = local, [local.size]
        if self._scope == "global":
            pool, counts = gather_signals(local, self._device)
        selection = self._select(pool, step)
        if self._scope == "global":
            check_agreement("StepPlanner", pool.row_ids(), selection.weights, device=self._device)
        me = rank() if len(counts) > 1 else 0
        first = sum(counts[:me])
        kept = selection.rows
        holders = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[kept]
        targets = deal(holders, len(counts))
        mine = [places[int(row) - first] for row in kept[holders == me]]
        arrived, positions = exchange_rows(
            batches, mine, holders, targets, pad_id=self._pad_id, device=self._device
        )
        came = {k: (len(batches), i) for i, k in enumerate(positions)}
        rows = [
            came[k] if k in came else places[int(kept[k]) - first]
            for k in (targets == me).nonzero().flatten().tolist()
        ]
        own = selection.weights[first : first + local.size]
        share = _Share(
            list(batches),
            list(ids),
            list(own.split([s.size for s in signals])),
            _split(rows, signals),
        )
        if arrived is not None:
            share.batches.append(arrived)
            share.ids.append(pool.row_ids()[kept[positions]])
            share.weights.append(selection.weights[kept[positions]])
        return (pool, selection), share

    def _build(
        self, share: _Share, signals: Sequence[Signals], part: int
    ) -> tuple[Batch, Tensor, Tensor]:
        """Make one micro-batch, or a silent one-row batch where nothing is left for it."""
        rows = share.parts[part]
        if not rows:
            # No rank may skip a forward. A row whose scores are finite cannot poison the zero.
            m, r = self._filler(signals)
            batch = mute_rows(trim(take_rows(share.batches[m], [r])), torch.tensor([True]))
            return batch, torch.zeros(1), signals[m].row_ids()[[r]]
        if rows == [(part, r) for r in range(signals[part].size)]:
            return dict(share.batches[part]), share.weights[part], share.ids[part].cpu()
        weights = torch.stack([share.weights[m][r] for m, r in rows])
        ids = torch.stack([share.ids[m][r].cpu() for m, r in rows])
        return gather_rows(share.batches, rows, pad_id=self._pad_id), weights, ids

    @staticmethod
    def _filler(signals: Sequence[Signals]) -> Place:
        for m, s in enumerate(signals):
            good = torch.ones(s.size, dtype=torch.bool)
            for value in s.present().values():
                good &= torch.isfinite(value.reshape(s.size, -1)).all(dim=1)
            if bool(good.any()):
                return m, int(good.nonzero()[0])
        return 0, 0

    def _denominator(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch, row_weights in zip(batches, weights, strict=True):
            counts = count_labels(batch).cpu()
            per_row = counts if self._normalize == "tokens" else counts > 0
            total += (row_weights.double() * per_row).sum()
        total = sum_over_ranks(total.to(self._device))
        return torch.where(total > 0, total, 1.0).to(torch.float32)
