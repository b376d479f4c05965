"""An arm is all its settings; its runs are paired by seed, and what is amiss is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.report import curves, doubts, findings, summary
from onlinesel.report.page import render
from onlinesel.report.records import Evaluation, Run, Step

ENDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(1, 3)), min_size=1)
"""Seeds of the trainer and of the selection, and a last loss."""


def run(name: str, seed: int | None, last: float, *, at: Any = (0, 10), **facts: Any) -> Run:
    """A run whose held-out loss falls on a line from 4 to `last`."""
    values = np.interp(at, (0, max(at)), (4.0, last))
    evals = tuple(Evaluation(int(s), 2.0 * s, 8 * s, v) for s, v in zip(at, values, strict=True))
    extra = {k: facts.pop(k) for k in ("trainer_seed", "settings") if k in facts}
    steps = (Step(1, 1.0, 8, 8),)
    return Run(Path(), name, seed=seed, evals=evals, extra=extra, steps=steps, **facts)


def by_name(arms: list[summary.Arm]) -> dict[str, summary.Arm]:
    return {arm.name: arm for arm in arms}


def test_a_sweep_over_the_trainers_seed_is_paired_by_it() -> None:
    """The callback's seed was 0 in all: every run was compared with the first uniform one."""
    ends = {1: (3.0, 3.1), 2: (2.5, 2.6), 3: (2.0, 2.1)}
    runs = [run("Uniform", 0, a, trainer_seed=s) for s, (a, _) in ends.items()]
    runs += [run("RHO", 0, b, trainer_seed=s) for s, (_, b) in ends.items()]
    base, arm = summary.group_arms(runs)
    found = summary.paired_difference(arm, base)
    assert (found.n, round(found.mean, 6), round(found.half, 6)) == (3, 0.1, 0.0)
    swept = [run("Uniform", s, a, trainer_seed=s) for s, (a, _) in ends.items()]
    base, arm = summary.group_arms([*swept, *runs[3:]])  # one arm drew by a fixed seed
    assert summary.paired_difference(arm, base).n == 3
    assert not doubts.about_seeds([arm, base])


@given(ENDS, ENDS)
def test_pairs_are_those_of_a_naive_search(mine: list[Any], theirs: list[Any]) -> None:
    arm, base = (
        summary.Arm("a", None, tuple(run("a", s, end, trainer_seed=t) for t, s, end in runs))
        for runs in (mine, theirs)
    )
    both = {(t, s) for t, s, _ in mine} & {(t, s) for t, s, _ in theirs}
    keys: set[Any] = both or {t for t, *_ in mine} & {t for t, *_ in theirs}

    def mean(runs: list[Any], key: Any) -> float:
        return float(np.mean([end for t, s, end in runs if key in ((t, s), t)]))

    wanted = [mean(mine, key) - mean(theirs, key) for key in keys]
    found = summary.paired_difference(arm, base)
    assert found.n == len(wanted)
    if wanted:
        assert found.mean == pytest.approx(float(np.mean(wanted)), abs=1e-9)


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        ([{"candidates": 4}, {"candidates": 8}], "candidates=8"),
        ([{"scope": "global"}, {"scope": "rank"}], "scope=rank"),
        ([{"settings": {"learning_rate": "0.1"}}, {"settings": {"learning_rate": "0.2"}}],
         "learning_rate=0.2"),
        ([{"settings": {"model": "A"}}, {"settings": {"model": "B"}}], "model=B"),
    ],
)  # fmt: skip
def test_runs_of_other_settings_are_no_seeds(facts: list[Any], label: str) -> None:
    runs = [run("UDS", seed, 2.0, **each) for each in facts for seed in (0, 1)]
    arms = summary.group_arms(runs)
    assert len(arms) == 2 and [len(arm.runs) for arm in arms] == [2, 2]
    assert f"UDS ({label})" in by_name(arms)
    page = render(runs)
    name, value = label.split("=")
    assert "Settings that differ" in page and re.search(f'<th scope="col">{name}</th>', page)
    assert f"<td>{value}</td>" in page
    assert "Settings that differ" not in render(runs[:2])


def test_an_arm_is_compared_with_the_uniform_arm_of_its_settings() -> None:
    slow, fast = ({"settings": {"learning_rate": rate}} for rate in ("0.1", "0.2"))
    runs = [run("Uniform", 0, 3.0, **slow), run("Uniform", 0, 2.0, **fast)]
    runs += [run("UDS", 0, 2.5, **slow), run("UDS", 0, 1.9, **fast)]
    cells = {row[0]: row[7] for row in findings.headline(runs).rows}
    assert cells["UDS (learning_rate=0.1)"] == "−0.500"
    assert cells["UDS (learning_rate=0.2)"] == "−0.100"
    assert not doubts.about_settings(summary.group_arms(runs))
    only = summary.group_arms([runs[0], runs[3]])
    assert doubts.about_settings(only) == [
        "UDS and Uniform differ by more than the choice of rows: learning_rate (0.2 and 0.1)."
    ]


def test_missing_and_double_seeds_are_said() -> None:
    runs = [run("Uniform", s, 3.0) for s in (0, 1, 2)]
    runs += [run("UDS", s, 2.0) for s in (0, 0)] + [run("RHO", None, 2.0) for _ in range(2)]
    notes = findings.caveats(runs)
    assert "UDS lacks seeds that other arms have: 1, 2." in notes
    assert "UDS has 2 runs of seed 0; pairs are made with their mean." in notes
    assert "RHO has 2 runs without a seed; pairs are made with their mean." in notes
    assert not any(note.startswith("Uniform lacks") for note in notes)


def test_markers_stand_where_something_was_evaluated() -> None:
    runs = tuple(run("UDS", s, 2.0 + 0.1 * s, at=(0, 3, 4, 20)) for s in (0, 1))
    arm = summary.Arm("UDS", None, runs)
    for axis, places in (("step", [0, 3, 4, 20]), ("seconds", [0, 6, 8, 40])):
        grid, mean, _ = curves._curve(arm, axis)
        marks = curves._marks(arm, axis, grid)
        assert sorted(grid[marks].tolist()) == places
        wanted = np.interp(places, places, [4 - 1.95 * s / 20 for s in (0, 3, 4, 20)])
        assert sorted(mean[marks].tolist()) == pytest.approx(sorted(wanted.tolist()))
    mixed = (run("UDS", 0, 2.0, at=(0, 5, 20)), run("UDS", 1, 2.0, at=(0, 7, 20)))
    grid, _, _ = curves._curve(summary.Arm("UDS", None, mixed), "step")
    marks = curves._marks(summary.Arm("UDS", None, mixed), "step", grid)
    assert sorted(grid[marks].tolist()) == [0, 20]
    many = summary.Arm("UDS", None, (run("UDS", 0, 2.0, at=range(200)),))
    grid, _, _ = curves._curve(many, "step")
    assert 2 <= len(curves._marks(many, "step", grid)) <= 8


def test_a_single_run_is_told_what_it_lacks() -> None:
    bare = Run(Path(), "UDS", seed=0, steps=(Step(41, 1.0, 8, 32),))
    notes = " ".join(findings.caveats([bare]))
    assert (
        "record a Uniform run with the same settings and seed (OnlineSelection(trainer, U" in notes
    )
    assert "Nothing was evaluated: give the trainer an eval_dataset" in notes
    assert "Records that begin behind their run's first step" in notes
    both = " ".join(findings.caveats([run("Uniform", 0, 3.0), run("UDS", 0, 2.0)]))
    assert "One run shows" not in both and "Nothing was evaluated" not in both
    assert "record a run with a method" in " ".join(findings.caveats([run("Uniform", 0, 3.0)]))
