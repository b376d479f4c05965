"""What is amiss with the runs of a report: their seeds and settings, and what they lack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onlinesel.report.arms import by_seed, differing, seed_of
from onlinesel.report.goals import REWARD, goal_of, scored
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm, baseline
from onlinesel.report.wording import DASH, Table, listed

__all__ = ["about_runs", "about_seeds", "about_settings", "other_settings", "settings_table"]

_CHOICE = ("strategy", "candidates", "scope", "normalize", "groups", "mixture", "reference")
"""Settings of the choice of rows, by which an arm is meant to differ from uniform."""


def settings_table(arms: Sequence[Arm]) -> Table:
    """Return the settings that are not the same in all arms, a row per arm.

    Example:
        >>> settings_table([]).rows
        ()
    """
    names = differing([arm.settings for arm in arms])
    if not names:
        return Table(("Arm", "Budget"), ())
    rows = ((a.name, a.budget or "none", *(a.settings.get(n, DASH) for n in names)) for a in arms)
    return Table(("Arm", "Budget", *names), tuple(rows))


def other_settings(arm: Arm, base: Arm) -> list[str]:
    """Return the settings beside the choice of rows that two arms both tell, and not the same.

    Example:
        >>> other_settings(Arm("UDS", None, ()), Arm("Uniform", None, ()))
        []
    """
    names = [n for n in differing([arm.settings, base.settings]) if n not in _CHOICE]
    return [n for n in names if n in arm.settings and n in base.settings]


def about_settings(arms: Sequence[Arm]) -> list[str]:
    """Return which arms differ from their baseline by more than the choice of rows.

    Example:
        >>> about_settings([])
        []
    """
    notes = []
    for arm in arms:
        base = baseline(arms, arm.budget, arm)
        if base is None or base is arm:
            continue
        if told := other_settings(arm, base):
            values = ", ".join(
                f"{name} ({arm.settings[name]} and {base.settings[name]})" for name in told
            )
            notes.append(
                f"{arm.name} and {base.name} differ by more than the choice of rows: {values}."
            )
    return notes


def about_seeds(arms: Sequence[Arm]) -> list[str]:
    """Return which arms lack seeds that others of their budget have, or have some twice.

    Example:
        >>> about_seeds([])
        []
    """
    notes = []
    for arm in arms:
        others = {seed_of(r)[0] for a in arms if a.budget == arm.budget for r in a.runs}
        mine = {seed_of(run)[0] for run in arm.runs}
        if lacking := [str(seed) for seed in sorted(others - mine, key=str) if seed is not None]:
            notes.append(f"{arm.name} lacks seeds that other arms have: {listed(lacking)}.")
        for (seed, own), runs in by_seed(arm.runs).items():
            if len(runs) == 1:
                continue
            which = "without a seed" if seed is None else f"of seed {seed}"
            if seed != own and own is not None:
                which += f" (selection {own})"
            notes.append(
                f"{arm.name} has {len(runs)} runs {which}; pairs are made with their mean."
            )
    return notes


def about_runs(runs: Iterable[Run]) -> list[str]:
    """Return which records begin in the middle, and what a single run can and cannot show.

    Example:
        >>> about_runs([])
        []
    """
    runs = list(runs)
    late = [run.name for run in runs if run.steps and run.steps[0].step > 1]
    notes = []
    if late:
        notes.append(
            "Records that begin behind their run's first step, so that seconds and rows before it "
            f"are not in them: {listed(late)}. Resume with the folder that the run was recorded in."
        )
    if len(runs) == 1:
        (run,) = runs
        uniform = run.name.casefold().startswith("uniform")
        lacks = "a run with a method" if uniform else "a Uniform run"
        how = "OnlineSelection(trainer, Uniform(), record=FOLDER)"
        if goal_of(run) == REWARD:
            how = "RolloutSelection(trainer, prompts=UniformPrompts(), record=FOLDER)"
        how = "" if uniform else f" ({how})"
        notes.append(
            f"One run shows what it did with its data, not whether that paid: record {lacks} with "
            f"the same settings and seed{how}, and give the report both folders."
        )
    if runs and not any(scored(run) for run in runs):
        notes.append(
            "Nothing was evaluated: give the trainer an eval_dataset and eval_strategy='steps' "
            "(in a loop, call steps.evaluated(loss); in Lightning, log val_loss)."
        )
    return notes
