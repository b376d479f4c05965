"""What became of the groups that runs generated: fates, pass rates, and what the rollouts gave.

A group is the completions of one prompt; its pass rate is the share of those that could be scored
which succeeded. Imported by the report only; NumPy comes with matplotlib.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onlinesel.report.records import Generation, Run
from onlinesel.report.summary import Arm, Interval, t_interval

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = [
    "FATES",
    "Groups",
    "Rates",
    "Yield",
    "fates_over_steps",
    "groups",
    "pass_rates",
    "yields",
]

FATES = (
    "kept",
    "kept, though all or none succeeded",
    "too hard",
    "too easy",
    "not needed",
    "no outcome",
)
"""What can become of a group: kept to train, or rejected and why."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Groups:
    """All scored groups of an arm, one entry each.

    `fates` are places in `FATES`; `rates` are NaN where no outcome is known.

    Example:
        >>> groups(Arm("UDS", None, ())).rates.size
        0
    """

    steps: _Ints
    prompts: _Ints
    rates: _Floats
    kept: _Bools
    fates: _Ints

    @property
    def mixed(self) -> _Bools:
        """Whether a group has both successes and failures."""
        return (self.rates > 0) & (self.rates < 1)


@dataclass(frozen=True)
class Rates:
    """Mean measured pass rate of bands of prompts in windows of steps, NaN where none was seen.

    Attributes:
        x: (W + 1,) edges of the windows, in optimizer steps.
        y: (B + 1,) edges of the bands, in prompts, from the lowest mean pass rate.
        rates: (B, W) mean over the groups.

    Example:
        >>> Rates(np.array([0, 1]), np.array([0, 1]), np.array([[0.5]])).rates.shape
        (1, 1)
    """

    x: _Floats
    y: _Ints
    rates: _Floats


@dataclass(frozen=True)
class Yield:
    """What the rollouts of an arm gave, over its seeds.

    Attributes:
        kept: Share of the scored groups that train.
        mixed: Share of the groups with a known outcome that have both successes and failures.
        per_kept: Rollouts for each group that trains.
        rejected: Share of the generated tokens that lie in groups which do not train.
        tokens: Those tokens of each run.

    Example:
        >>> yields(Arm("UDS", None, ())).kept.n
        0
    """

    kept: Interval
    mixed: Interval
    per_kept: Interval
    rejected: Interval
    tokens: tuple[int, ...]


def groups(arm: Arm) -> Groups:
    """Return every scored group of every run of `arm`.

    A rejected group is too hard if its pass rate lies below those of the mixed groups that its
    batch keeps, too easy if above, and not needed in between: the batch was full. Where no mixed
    group is kept, 1/2 parts the hard from the easy.

    Example:
        >>> groups(Arm("UDS", None, ())).mixed.any()
        np.False_
    """
    batches = [batch for run in arm.runs for batch in run.generations]
    parts = [_flatten(batch) for batch in batches] or [_flatten(Generation(0, 0, 0, 0, 0, 0, 0))]
    return Groups(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def fates_over_steps(found: Groups, windows: int = 20) -> tuple[_Floats, _Floats]:
    """Return the edges of windows of steps, and the share of each of `FATES` in each window.

    Args:
        found: Groups of an arm, its seeds pooled.
        windows: Number of windows of equal length; fewer if fewer batches were generated.

    Example:
        >>> fates_over_steps(groups(Arm("UDS", None, ())))[1].shape
        (6, 0)
    """
    edges, place = _windows(found.steps, windows)
    counts = np.zeros((len(FATES), max(edges.size - 1, 0)))
    np.add.at(counts, (found.fates, place), 1)
    return edges, counts / np.maximum(counts.sum(axis=0), 1)


def pass_rates(found: Groups, most: int = 60, each: int = 4) -> Rates | None:
    """Return how the pass rates of the prompts moved, or None if no prompt was measured.

    Args:
        found: Groups of an arm; those of its seeds are pooled.
        most: Largest number of windows of steps, and of bands of prompts of nearly equal size,
            sorted by their mean pass rate.
        each: Groups that a cell holds on average, at least; else a blank could be chance.

    Example:
        >>> pass_rates(groups(Arm("UDS", None, ()))) is None
        True
    """
    known = np.isfinite(found.rates) & (found.prompts != -1)
    if not known.any():
        return None
    side = min(most, max(1, math.isqrt(int(known.sum()) // each)))
    rates = found.rates[known]
    x, window = _windows(found.steps[known], side)
    ids, prompt = np.unique(found.prompts[known], return_inverse=True)
    means = np.bincount(prompt, rates) / np.bincount(prompt)
    rank = np.empty(ids.size, np.int64)
    rank[np.lexsort((ids, means))] = np.arange(ids.size)
    bands = min(side, ids.size)
    cell = (rank * bands // ids.size)[prompt] * (x.size - 1) + window
    size = bands * (x.size - 1)
    seen, total = np.bincount(cell, minlength=size), np.bincount(cell, rates, minlength=size)
    cells = np.where(seen > 0, total / np.maximum(seen, 1), np.nan)
    # The first rank of band b is the smallest r with r * bands // size = b.
    return Rates(x, -(-np.arange(bands + 1) * ids.size // bands), cells.reshape(bands, -1))


def yields(arm: Arm) -> Yield:
    """Return what the rollouts of `arm` gave.

    Example:
        >>> yields(Arm("UDS", None, ())).tokens
        ()
    """
    runs = [run for run in arm.runs if run.generations]
    shares = np.array([_shares(run) for run in runs]).reshape(len(runs), 4)
    kept, mixed, per_kept, rejected = (t_interval(column) for column in shares.T.tolist())
    tokens = tuple(run.generations[-1].rejected_tokens for run in runs)
    return Yield(kept, mixed, per_kept, rejected, tokens)


def _shares(run: Run) -> tuple[float, float, float, float]:
    found, end = groups(Arm(run.name, run.budget, (run,))), run.generations[-1]
    kept = int(found.kept.sum())
    return (
        _over(kept, found.kept.size),
        _over(int(found.mixed.sum()), int(np.isfinite(found.rates).sum())),
        _over(end.rollouts, kept),
        _over(end.rejected_tokens, end.tokens),
    )


def _over(part: int, whole: int) -> float:
    return part / whole if whole else np.nan


def _flatten(batch: Generation) -> tuple[_Ints, _Ints, _Floats, _Bools, _Ints]:
    trials, kept = np.array(batch.trials), np.array(batch.kept, dtype=np.bool_)
    known = trials > 0
    rates = np.where(known, np.array(batch.successes) / np.where(known, trials, 1), np.nan)
    steps = np.full(trials.size, batch.step, dtype=np.int64)
    return steps, np.array(batch.prompts), rates, kept, _fates(rates, kept)


def _fates(rates: _Floats, kept: _Bools) -> _Ints:
    useful = rates[kept & (rates > 0) & (rates < 1)]
    low, high = (useful.min(), useful.max()) if useful.size else (0.5, 0.5)
    flat = (rates == 0) | (rates == 1)
    cases = [kept & flat, kept, np.isnan(rates), rates < low, rates > high]
    return np.select(cases, [1, 0, 5, 2, 3], default=4)


def _windows(steps: _Ints, most: int) -> tuple[_Floats, _Ints]:
    """Return the edges of at most `most` equal windows of `steps`, and the window of each."""
    if not steps.size:
        return np.empty(0), np.empty(0, np.int64)
    batches = np.unique(steps)
    # A window no shorter than the way from one batch to the next, so that none is empty in between.
    gap = (batches[-1] - batches[0]) / (batches.size - 1) if batches.size > 1 else 1
    edges = np.linspace(batches[0], batches[-1] + gap, min(most, batches.size) + 1)
    place = np.searchsorted(edges, steps, side="right") - 1
    return edges, np.minimum(place, edges.size - 2)
