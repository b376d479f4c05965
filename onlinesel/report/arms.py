"""What makes an arm: all settings but the seed; and which runs of two arms belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onlinesel.report.records import Run

__all__ = ["Key", "by_seed", "differing", "pair_key", "seed_of", "settings_of"]

# Written at the top of run.json by the callbacks; `settings` holds what the trainer was told.
_OWN = (
    "normalize", "ids", "groups", "mixture", "reference", "shadow", "reuse_forward",
    "num_generations", "num_iterations", "steps_per_generation", "outcome", "success",
)  # fmt: skip

Key = tuple[object, object]
"""Seeds of a run: the trainer's, and the selection's."""


def settings_of(run: Run) -> dict[str, str]:
    """Return everything by which the arm of `run` is known, its name and budget apart.

    Example:
        >>> from pathlib import Path
        >>> run = Run(Path(), "UDS", candidates=4, extra={"settings": {"learning_rate": 0.1}})
        >>> settings_of(run)
        {'candidates': '4', 'learning_rate': '0.1'}
    """
    fields = {"strategy": run.strategy, "candidates": run.candidates, "scope": run.scope}
    own = {name: run.extra.get(name) for name in _OWN}
    told = run.extra.get("settings")
    found = {**fields, **own, **(told if isinstance(told, Mapping) else {})}
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of the settings that are not the same in all of `settings`.

    Example:
        >>> differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}])
        ['b']
    """
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name) for each in settings}) > 1]


def seed_of(run: Run) -> Key:
    """Return the seeds of `run`; the trainer's is the run's own where it is not written.

    Example:
        >>> from pathlib import Path
        >>> seed_of(Run(Path(), "UDS", seed=0, extra={"trainer_seed": 7}))
        (7, 0)
    """
    return run.extra.get("trainer_seed", run.seed), run.seed


def by_seed(runs: Iterable[Run], *, trainer_only: bool = False) -> dict[Key, list[Run]]:
    """Return the runs of each seed.

    Args:
        runs: Runs of one arm.
        trainer_only: Take runs together that differ in the selection's seed only.

    Example:
        >>> from pathlib import Path
        >>> len(by_seed([Run(Path(), "UDS", seed=1), Run(Path(), "UDS", seed=1)])[1, 1])
        2
    """
    found: dict[Key, list[Run]] = {}
    for run in runs:
        trainer, own = seed_of(run)
        found.setdefault((trainer, None if trainer_only else own), []).append(run)
    return found


def pair_key(one: Iterable[Run], other: Iterable[Run]) -> bool:
    """Return whether two arms are paired by the trainer's seed alone.

    They are paired by both seeds where they share any; an arm may have drawn by a fixed seed while
    the trainer's was swept.

    Example:
        >>> from pathlib import Path
        >>> fixed = [Run(Path(), "UDS", seed=0, extra={"trainer_seed": s}) for s in (1, 2)]
        >>> swept = [Run(Path(), "Uniform", seed=s, extra={"trainer_seed": s}) for s in (1, 2)]
        >>> pair_key(fixed, swept), pair_key(fixed, fixed)
        (True, False)
    """
    return not by_seed(one).keys() & by_seed(other).keys()
