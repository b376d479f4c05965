"""What an arm kept of its candidates: scores, sources, lengths, repeats, examples.

Imported by the report only; NumPy comes with matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onlinesel.report.records import Row, Run
from onlinesel.report.summary import Arm, Interval, t_interval

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = [
    "REPEATS",
    "Decisions",
    "Example",
    "decisions",
    "examples",
    "pool_shares",
    "pool_size",
    "repeats",
    "share_over_steps",
    "source_shares",
    "sources_of",
    "times_trained",
]

REPEATS = ("never a candidate", "never trained", "once", "twice", "3 or 4 times", "5 times or more")
"""Classes of `repeats`, from the rows that were never looked at to those trained most often."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Decisions:
    """All candidates of an arm, one entry each; a score or token count not logged is NaN.

    Example:
        >>> decisions(Arm("UDS", None, ())).ids.size
        0
    """

    ids: _Ints
    steps: _Ints
    trained: npt.NDArray[np.bool_]
    scores: _Floats
    tokens: _Floats


@dataclass(frozen=True)
class Example:
    """A row of the pool, how often it was a candidate and how often it trained, over all seeds.

    Example:
        >>> Example(Row(1, None, "One."), candidate=4, trained=1).trained
        1
    """

    row: Row
    candidate: int
    trained: int


def decisions(arm: Arm) -> Decisions:
    """Return every candidate of every run of `arm`.

    Example:
        >>> decisions(Arm("UDS", None, ())).trained.any()
        np.False_
    """
    parts = [_flatten(run) for run in arm.runs if run.choices]
    if not parts:
        empty = np.empty(0)
        return Decisions(
            empty.astype(np.int64), empty.astype(np.int64), empty.astype(bool), empty, empty
        )
    return Decisions(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.steps for p in parts]),
        np.concatenate([p.trained for p in parts]),
        np.concatenate([p.scores for p in parts]),
        np.concatenate([p.tokens for p in parts]),
    )


def sources_of(runs: Iterable[Run]) -> list[str]:
    """Return the sources named in the pools of `runs`, the smallest first.

    Example:
        >>> sources_of([])
        []
    """
    pool = pool_shares(runs)
    return sorted(pool, key=lambda source: (pool[source], source))


def pool_shares(runs: Iterable[Run]) -> dict[str, float]:
    """Return the share of each source in the pool; empty where no source is known.

    Example:
        >>> from pathlib import Path
        >>> pool_shares([Run(Path(), "UDS", rows={1: Row(1, "a", ""), 2: Row(2, "b", "")})])
        {'a': 0.5, 'b': 0.5}
    """
    pool = {row.id: row.source for run in runs for row in run.rows.values()}
    if all(source is None for source in pool.values()):
        return {}
    counts: dict[str, int] = {}
    for source in pool.values():
        counts[source or _UNKNOWN] = counts.get(source or _UNKNOWN, 0) + 1
    return {source: count / len(pool) for source, count in counts.items()}


def source_shares(arm: Arm) -> dict[str, Interval]:
    """Return the share of each source among the rows that trained, over the seeds of `arm`.

    Example:
        >>> source_shares(Arm("UDS", None, ()))
        {}
    """
    shares: dict[str, list[float]] = {source: [] for source in sources_of(arm.runs)}
    for run in arm.runs:
        flat = _flatten(run)
        if not run.rows or not flat.trained.any():
            continue
        sources = _sources(flat.ids[flat.trained], run.rows)
        for source in shares:
            shares[source].append(float(np.mean(sources == source)))
    return {source: t_interval(values) for source, values in shares.items() if values}


def share_over_steps(arm: Arm, windows: int = 20) -> tuple[_Floats, dict[str, _Floats]]:
    """Return the middle of each window of steps, and each source's share of what trained there.

    Args:
        arm: The arm; its seeds are pooled.
        windows: Number of windows of equal length; fewer if there are fewer steps.

    Example:
        >>> share_over_steps(Arm("UDS", None, ()))[1]
        {}
    """
    flats = [(run, _flatten(run)) for run in arm.runs if run.choices and run.rows]
    last = max((int(flat.steps.max()) for _, flat in flats if flat.steps.size), default=0)
    sources = sources_of(arm.runs)
    if last < 1 or not sources:
        return np.empty(0), {}
    edges = np.linspace(0, last, min(windows, last) + 1)
    totals = np.zeros(edges.size - 1)
    hits = {source: np.zeros(edges.size - 1) for source in sources}
    for run, flat in flats:
        names = _sources(flat.ids[flat.trained], run.rows)
        # Windows are open on the left: step k closes the window whose edge is k.
        place = np.searchsorted(edges, flat.steps[flat.trained], side="left") - 1
        place = np.clip(place, 0, edges.size - 2)
        totals += np.bincount(place, minlength=totals.size)
        for source in sources:
            hits[source] += np.bincount(place, weights=names == source, minlength=totals.size)
    some = totals > 0
    middle = (edges[1:] + edges[:-1]) / 2
    return middle[some], {source: hits[source][some] / totals[some] for source in sources}


def pool_size(run: Run) -> int | None:
    """Return the number of rows that `run` could choose from, None if it is not known.

    Example:
        >>> from pathlib import Path
        >>> pool_size(Run(Path(), "UDS", extra={"settings": {"rows": 40}}))
        40
    """
    told = run.extra.get("settings")
    size = told.get("rows") if isinstance(told, Mapping) else None
    return max(int(size or 0), len(run.rows)) or None


def repeats(arm: Arm) -> _Floats:
    """Return the share of the pool in each class of `REPEATS`, averaged over the seeds of `arm`.

    The pool is as large as the training set whose size the record tells, or as `rows.jsonl`;
    without both it is the rows seen as candidates, so that none is "never a candidate".

    Example:
        >>> repeats(Arm("UDS", None, ())).size
        0
    """
    shares = []
    for run in arm.runs:
        flat = _flatten(run)
        if not flat.ids.size:
            continue
        trained = times_trained(flat)[1]
        pool = max(pool_size(run) or 0, trained.size)
        edges = [pool - trained.size] + [
            int(np.sum((trained >= low) & (trained < high)))
            for low, high in ((0, 1), (1, 2), (2, 3), (3, 5), (5, np.inf))
        ]
        shares.append(np.array(edges) / pool)
    return np.mean(shares, axis=0) if shares else np.empty(0)


def examples(arm: Arm, count: int = 5) -> tuple[list[Example], list[Example]]:
    """Return the rows that `arm` chose most and least, with text.

    Most: trained most often, then at the highest rate. Least: at the lowest rate per time it was a
    candidate, then the one passed over most often. No row is in both lists.

    Example:
        >>> examples(Arm("UDS", None, ()))
        ([], [])
    """
    pool: dict[int, Row] = {}
    for run in arm.runs:
        pool |= run.rows
    flat = decisions(arm)
    if not pool or not flat.ids.size or flat.trained.all():
        return [], []
    ids, trained, candidate = times_trained(flat)
    known = [
        Example(pool[row], int(seen), int(kept))
        for row, kept, seen in zip(ids.tolist(), trained, candidate, strict=True)
        if row in pool and pool[row].text
    ]
    most = sorted(known, key=lambda e: (-e.trained, e.candidate, e.row.id))
    least = sorted(known, key=lambda e: (e.trained / e.candidate, -e.candidate, e.row.id))
    count = min(count, len(known) // 2)
    return most[:count], [e for e in least if e not in most[:count]][:count]


def times_trained(flat: Decisions) -> tuple[_Ints, _Ints, _Ints]:
    """Return the distinct ids, how often each trained, and how often each was a candidate.

    Example:
        >>> times_trained(decisions(Arm("UDS", None, ())))[0].size
        0
    """
    ids, place, candidate = np.unique(flat.ids, return_inverse=True, return_counts=True)
    trained = np.bincount(place, weights=flat.trained, minlength=ids.size).astype(np.int64)
    return ids, trained, candidate


def _flatten(run: Run) -> Decisions:
    sizes = [len(choice.ids) for choice in run.choices]
    blank = np.full(sum(sizes), np.nan)
    scores, tokens = blank, blank.copy()
    start = 0
    for choice, size in zip(run.choices, sizes, strict=True):
        if choice.scores is not None:
            scores[start : start + size] = choice.scores
        if choice.tokens is not None:
            tokens[start : start + size] = choice.tokens
        start += size
    # The empty array in front lets a run without choices through.
    ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(c.ids) for c in run.choices)])
    weights = np.concatenate([np.empty(0), *(np.asarray(c.weights) for c in run.choices)])
    steps = np.repeat(np.array([c.step for c in run.choices], dtype=np.int64), sizes)
    return Decisions(ids, steps, weights > 0, scores, tokens)


def _sources(ids: _Ints, rows: Mapping[int, Row]) -> npt.NDArray[np.object_]:
    blank = Row(0, None, "")
    names = [rows.get(i, blank).source or _UNKNOWN for i in ids.tolist()]
    return np.array(names, dtype=object)
