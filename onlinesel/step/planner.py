"""One optimizer step: score its candidates, choose, deal the rows out, find the denominator.

This is the single place where counts, weights and the normaliser of a step come from; hosts only
carry its result. Everything competes that ``scope`` names, and nothing about the loss is decided
before the choice is made: subsetting after the normaliser was counted is the classic error, which
halves the gradient when half of the rows are kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from onlinesel.data.batch import (
    count_labels,
    deal,
    label_width,
    mute_rows,
    rows_in,
)
from onlinesel.data.rows import FILLER_ID
from onlinesel.parallel.distributed import (
    Gathering,
    begin_gather,
    check_agreement,
    exchange_rows,
    gather_signals,
    largest_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from onlinesel.selector import Selector
from onlinesel.step.micro import MicroBatches, united
from onlinesel.step.places import Place, join, picked, split_evenly
from onlinesel.step.plan import Batch, Decision, StepPlan
from onlinesel.types import Normalize, Scope, Selection, Signals
from onlinesel.weights import total_weight

__all__ = ["SCOPES", "StepPlanner"]

SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class _Share:
    """What one rank holds of a decided step: its batches (arrivals last) and who goes where."""

    micro: MicroBatches
    ids: list[Tensor]
    weights: list[Tensor]
    parts: list[list[Place]]


class StepPlanner:
    """Turn the candidate micro-batches of a step into a :class:`StepPlan`.

    Args:
        selector: Decides.
        score: ``(batch, needs, hosted) -> Signals``, called once per micro-batch if anything is
            needed. ``hosted`` has those labels and masks of the batch, on the host, that lie on a
            device.
        candidates: Candidates per trained row.
        scope: ``"global"``: all candidates of the step compete, over every micro-batch and rank.
            ``"rank"``: those of this rank. ``"batch"``: each micro-batch alone.
        normalize: ``"tokens"``, ``"samples"`` or ``"rows"``.
        pad_id: Token that pads ``input_ids`` where rows of different width meet.
        device: Where collectives need their tensors.
        count: Labelled tokens of each row of a batch, or None for a batch of whole items.
        width: Tokens of each row of a batch that may have a loss.
        mute: Take the labels off a row that only keeps its rank in step. A host whose loss goes
            through :meth:`StepPlan.weighing` does not need it.
    """

    def __init__(
        self,
        selector: Selector,
        score: Callable[[Batch, Sequence[str], Batch], Signals],
        *,
        candidates: int = 1,
        scope: Scope = "global",
        normalize: Normalize = "tokens",
        pad_id: int = 0,
        device: torch.device | str = "cpu",
        count: Callable[[Batch], Tensor | None] = count_labels,
        width: Callable[[Batch], int] = label_width,
        mute: bool = True,
    ) -> None:
        self.selector = selector
        self._score = score
        self._candidates = candidates
        self._scope = scope
        self._normalize = normalize
        self._pad_id = pad_id
        self._device = device
        self._count, self._width, self._mute = count, width, mute
        self._warned = False

    def plan(
        self,
        batches: Sequence[Batch],
        ids: Sequence[Tensor],
        step: int,
        groups: Sequence[Tensor] | None = None,
        given: Sequence[Batch] | None = None,
    ) -> StepPlan:
        """Decide about the candidates of one step.

        Args:
            batches: This rank's candidate micro-batches, without ids.
            ids: ``(n,)`` int64 ids of their rows; rows of ``FILLER_ID`` are not candidates.
            step: Optimizer step, counted from 0.
            groups: ``(n,)`` int64 source or domain of their rows, for strategies that need it.
            given: The micro-batches as they were on the host, if the caller has them; else their
                labels and masks are brought back from the device, in one copy.
        """
        start = time.perf_counter()
        micro, (ids, kinds) = MicroBatches.of(batches, ids, groups or (), given=given)
        known = [
            self._known(micro.readable(m), ids[m], kinds[m] if kinds else None)
            for m in range(len(batches))
        ]
        # What needs no score travels while the model scores.
        together = self._scope == "global" and world_size() > 1
        started = begin_gather(join(known), self._device) if together else None
        needs = self._needs(known, started, step)
        signals = self._scored(micro, known, needs)
        if self._scope == "batch":
            chosen = [self._select(s, step) for s in signals]
            decisions = [d for found, _ in chosen for d in found]
            weights = [w for _, w in chosen]
            parts = [[(m, int(r)) for r in w.nonzero()] for m, w in enumerate(weights)]
            share = _Share(micro, ids, weights, parts)
        else:
            decisions, share = self._compete(micro, ids, signals, started, step)
        built = [self._build(share, signals, part) for part in range(len(batches))]
        new_batches, counts, new_weights, new_ids = map(list, zip(*built, strict=True))
        total = self._total(decisions, new_weights, counts)
        return StepPlan(
            new_batches,
            new_weights,
            new_ids,
            counts,
            [c if c is None else self._width(b) for b, c in zip(new_batches, counts, strict=True)],
            torch.where(total > 0, total, 1.0).to(torch.float32),
            self._normalize,
            decisions,
            time.perf_counter() - start,
            undefined=not float(total) and _all_unscored(decisions, needs),
        )

    def _counted(self, readable: Batch) -> Tensor | None:
        counts = self._count(readable)
        return None if counts is None else counts.cpu()

    def _known(self, batch: Batch, ids: Tensor, groups: Tensor | None) -> Signals:
        """Return what is known about one micro-batch without a forward."""
        size = rows_in(batch, "StepPlanner")
        counts = self._counted(batch)
        if ids.shape[0] != size:
            raise ValueError(
                f"StepPlanner: ids must have one entry per row ({size}), got {ids.shape[0]}. "
                "The collator merges or splits rows: turn packing and padding-free batches off."
            )
        tokens = torch.ones_like(ids) if counts is None else counts
        return Signals(ids=ids, tokens=tokens, group=groups)

    def _needs(
        self, known: Sequence[Signals], started: Gathering | None, step: int
    ) -> Sequence[str]:
        """Return what must be scored: the same on every rank, since all forward equally often."""
        strategy = self.selector.strategy
        needs = tuple(strategy.needs_at(step))
        if needs == tuple(strategy.needs_for(step, 1)):
            return needs  # whatever their number is, and nobody waits to learn it
        if started is not None:
            everywhere, _ = started.wait()
            return strategy.needs_for(step, int((everywhere["ids"] != FILLER_ID).sum()))
        sizes = [int((part.row_ids() != FILLER_ID).sum()) for part in known]
        most = max(sizes) if self._scope == "batch" else sum(sizes)
        return strategy.needs_for(step, largest_over_ranks(most, self._device))

    def _scored(
        self, micro: MicroBatches, known: Sequence[Signals], needs: Sequence[str]
    ) -> list[Signals]:
        """Score all micro-batches, and bring their scores to the host in one copy."""
        wanted = [name for name in needs if name not in known[0].present()]
        if not wanted:
            return list(known)
        pairs = zip(micro.batches, micro.hosted, strict=True)
        return united([self._score(batch, wanted, part) for batch, part in pairs], known)

    def _select(self, signals: Signals, step: int) -> tuple[list[Decision], Tensor]:
        """Decide about the rows that are candidates; returns the weights of all rows as well."""
        real = signals.row_ids() != FILLER_ID
        weights = torch.zeros(signals.size)
        if not bool(real.any()):
            return [], weights
        pool = signals if bool(real.all()) else signals.take(real)
        keep = -(-pool.size // self._candidates)
        selection = self.selector.select(pool, keep=keep, step=step)
        if selection.weights.dim() != 1:
            raise ValueError(
                "StepPlanner: weights must be one per row, got shape "
                f"{tuple(selection.weights.shape)}. Token weights belong to the RL hosts."
            )
        self._warn_if_many(selection, pool.size, keep)
        return [(pool, selection)], weights.masked_scatter(real, selection.weights)

    def _warn_if_many(self, selection: Selection, size: int, keep: int) -> None:
        kept = selection.rows.numel()
        if self._candidates > 1 and kept > keep and not self._warned:
            self._warned = True
            warnings.warn(
                f"{kept} of {size} candidates train where {keep} were asked for: "
                f"{self.selector.strategy} does not drop rows down to one in "
                f"{self._candidates}, and a step needs more memory. Use candidates=1 with methods "
                "that only weigh, and When(..., otherwise=Uniform()).",
                stacklevel=2,
            )

    def _compete(
        self,
        micro: MicroBatches,
        ids: Sequence[Tensor],
        signals: Sequence[Signals],
        started: Gathering | None,
        step: int,
    ) -> tuple[list[Decision], _Share]:
        """Let all candidates of the scope compete, and give each rank as many winners."""
        local = join(signals)
        places = [(m, r) for m, s in enumerate(signals) for r in range(s.size)]
        pool, counts = local, [local.size]
        if started is not None:
            pool, counts = gather_signals(local, self._device, started=started)
        decisions, weights = self._select(pool, step)
        if self._scope == "global":
            check_agreement("StepPlanner", pool.row_ids(), weights, device=self._device)
        sizes = [s.size for s in signals]
        if len(counts) == 1:  # nothing travels
            rows = [places[row] for row in weights.nonzero().flatten().tolist()]
            shared = list(weights.split(sizes))
            return decisions, _Share(micro, list(ids), shared, split_evenly(rows, signals))
        me = rank()
        first = sum(counts[:me])
        kept = weights.nonzero().flatten()
        holders = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[kept]
        targets = deal(holders, len(counts))
        mine = [places[int(row) - first] for row in kept[holders == me]]
        arrived, positions = exchange_rows(
            micro.batches, mine, holders, targets, pad_id=self._pad_id, device=self._device
        )
        came = {k: (len(signals), i) for i, k in enumerate(positions)}
        rows = [
            came[k] if k in came else places[int(kept[k]) - first]
            for k in (targets == me).nonzero().flatten().tolist()
        ]
        own = weights[first : first + local.size]
        share = _Share(micro, list(ids), list(own.split(sizes)), split_evenly(rows, signals))
        if arrived is not None:
            micro.append(arrived)
            share.ids.append(pool.row_ids()[kept[positions]])
            share.weights.append(weights[kept[positions]])
        return decisions, share

    def _build(
        self, share: _Share, signals: Sequence[Signals], part: int
    ) -> tuple[Batch, Tensor | None, Tensor, Tensor]:
        """Make one micro-batch, or a silent one-row batch where nothing is left for it.

        Returns:
            The micro-batch, the labelled tokens of its rows, their weights and ids.
        """
        rows = share.parts[part]
        if not rows:
            # No rank may skip a forward. A row whose scores are finite cannot poison the zero.
            m, r = self._filler(signals)
            batch, readable = share.micro.gathered([(m, r)], self._pad_id)
            counts = self._counted(readable)
            if self._mute and counts is not None:
                batch, counts = mute_rows(batch, torch.tensor([True])), torch.zeros_like(counts)
            return batch, counts, torch.zeros(1), signals[m].row_ids()[[r]]
        if rows == [(part, r) for r in range(signals[part].size)]:
            counts = self._counted(share.micro.readable(part))
            return dict(share.micro.batches[part]), counts, share.weights[part], share.ids[part]
        weights, ids = picked(share.weights, rows), picked(share.ids, rows)
        batch, readable = share.micro.gathered(rows, self._pad_id)
        return batch, self._counted(readable), weights, ids

    @staticmethod
    def _filler(signals: Sequence[Signals]) -> Place:
        for m, s in enumerate(signals):
            good = s.finite(tuple(s.present()))
            if s.tokens is not None:  # a mean over no tokens is not a number
                good &= s.tokens > 0
            if bool(good.any()):
                return m, int(good.nonzero()[0])
        return 0, 0

    def _total(
        self,
        decisions: Sequence[Decision],
        weights: Sequence[Tensor],
        counts: Sequence[Tensor | None],
    ) -> Tensor:
        if self._scope == "global":
            # Every rank has decided about all rows, and knows the sum without asking.
            whole = [(d.weights, None if counts[0] is None else s.tokens) for s, d in decisions]
            return _sum(whole, self._normalize)
        total = _sum(zip(weights, counts, strict=True), self._normalize)
        return sum_over_ranks(total.to(self._device)).cpu() if world_size() > 1 else total


def _all_unscored(decisions: Sequence[Decision], needs: Sequence[str]) -> bool:
    """Whether no candidate that has labels has finite numbers in all that the method reads."""
    labelled = [(s.tokens > 0, s.finite(needs)) for s, _ in decisions if s.tokens is not None]
    there = any(bool(own.any()) for own, _ in labelled)
    return there and not any(bool((own & good).any()) for own, good in labelled)


def _sum(parts: Iterable[tuple[Tensor, Tensor | None]], normalize: Normalize) -> Tensor:
    sums = [total_weight(weights, counts, normalize) for weights, counts in parts]
    return torch.stack(sums).sum()
