"""Runs that generate completions: the numbers made from their record, and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.report import (
    findings,
    goals,
    rollout_figures,
    rollout_findings,
    rollouts,
    summary,
)
from onlinesel.report.curves import headline_png
from onlinesel.report.page import table_markdown, write_report
from onlinesel.report.records import Generation
from onlinesel.report.runlog import Run, RunLog, read_run
from onlinesel.report.summary import Arm

NBSP = "\u00a0"
Group = tuple[int, float | None, int, bool]


def generate(log: RunLog, step: int, groups: Sequence[Group], **facts: Any) -> None:
    """Log a batch of (prompt, successes, trials, kept) that cost nothing unless `facts` say so."""
    prompts, successes, trials, kept = zip(*groups, strict=True)
    cost = {"seconds": 0.0, "cpu_seconds": 0.0, "rollouts": 0, "tokens": 0, "rejected_tokens": 0}
    log.generation(
        step=step, rounds=1, prompts=prompts, successes=successes, trials=trials, kept=kept,
        **cost | facts,
    )  # fmt: skip


def write(
    path: Path,
    name: str,
    seed: int,
    rewards: Sequence[float],
    per_step: int = 8,
    groups: Sequence[Sequence[Group]] = (),
) -> Run:
    """A run evaluated every 10 steps; a step takes 0.4 CPU seconds and `per_step` rollouts.

    Of its tokens, two for each rollout, a quarter lies in rejected groups.
    """
    with RunLog(path / f"{name}-{seed}") as log:
        log.start(name=name, seed=seed, budget="steps", clock="cpu")
        for place, reward in enumerate(rewards):
            k = 10 * place
            log.evaluation(
                step=k, seconds=1.0 * k, cpu_seconds=0.4 * k, rows=0, reward=reward,
                rollouts=per_step * k,
            )  # fmt: skip
        for place, batch in enumerate(groups):
            made = per_step * 10 * (len(rewards) - 1) * (place + 1) // len(groups)
            generate(
                log, 5 * place, batch, rollouts=made, tokens=2 * made, rejected_tokens=made // 2
            )
    return read_run(path / f"{name}-{seed}")


UNIFORM: Sequence[Sequence[Group]] = (
    [(1, 0, 8, True), (2, 4, 8, True), (3, 8, 8, True), (4, 8, 8, True)],
    [(1, 0, 8, True), (2, 6, 8, True), (3, 8, 8, True), (5, 0, 8, True)],
)
BAND: Sequence[Sequence[Group]] = (
    [(1, 0, 8, False), (2, 2, 8, True), (3, 8, 8, False), (4, None, 0, False)],
    [(1, 4, 8, True), (2, 6, 8, True), (-1, 5, 8, False), (3, 7, 8, False)],
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Uniform is best in the middle (seed 0) and at the end (seed 1); band is dear, and fast."""
    return [
        write(tmp_path, "uniform", 0, [0.2, 0.4, 0.3], groups=UNIFORM),  # 0.4: step 10, 80 rollouts
        write(tmp_path, "uniform", 1, [0.2, 0.3, 0.5], groups=UNIFORM),  # 0.5: step 20, 160
        write(tmp_path, "band", 0, [0.2, 0.6, 0.7], 24, BAND),  # 0.4: step 5, 120 rollouts
        write(tmp_path, "band", 1, [0.2, 0.5, 0.4], 24, BAND),  # 0.5: step 10, 240
    ]


def test_what_runs_are_judged_by(runs: list[Run], tmp_path: Path) -> None:
    with RunLog(tmp_path / "sft") as log:
        log.start(name="sft")
        log.evaluation(step=0, seconds=0.0, rows=0, loss=3.0)
    assert goals.goal_of(runs[0]) == goals.REWARD
    assert goals.goal_of(read_run(tmp_path / "sft")) == goals.LOSS
    # A plain evaluation between those that measured the reward is not a reward.
    with RunLog(runs[0].path, resume_step=20) as log:
        log.evaluation(step=20, seconds=20.0, rows=0, loss=1.0)
    assert [value for _, value in goals.scored(read_run(runs[0].path))] == [0.2, 0.4, 0.3]


def test_the_way_to_a_reward_leads_upwards(runs: list[Run]) -> None:
    # From 0.2 at step 0 to 0.6 at step 10: 0.3 lies at a quarter of the way.
    assert goals.reach(runs[2], 0.3, "step") == pytest.approx(2.5)
    assert goals.reach(runs[2], 0.3, "rollouts") == pytest.approx(60.0)
    assert goals.reach(runs[2], 0.1, "rollouts") == 0.0
    assert math.isnan(goals.reach(runs[2], 0.8, "rollouts"))
    assert [goals.mark_of(run) for run in runs] == [0.4, 0.5, 0.7, 0.5]
    uniform, band = summary.group_arms(runs)
    assert summary.ways(band, uniform, "rollouts") == [pytest.approx((120, 80)), (240, 160)]
    assert summary.relative_reach(band, uniform, "cpu_seconds").mean == pytest.approx(0.5)
    assert summary.ends(band, "rollouts") == [480, 480] and summary.ends(band, "step") == [20, 20]


def test_headline_values(runs: list[Run]) -> None:
    table = rollout_findings.headline(runs)
    assert table.columns == (
        "Arm", "Budget", "Seeds", "Steps", "Rollouts", "CPU seconds", "Held-out reward",
        "Minus uniform", "Rollouts to uniform's best", "CPU seconds to uniform's best",
    )  # fmt: skip
    # Ends 0.7, 0.4 and 0.3, 0.5; differences 0.4, -0.1: halves t(1) * 0.15, 0.1 and 0.25. CPU
    # seconds to the mark: 2 and 4 of uniform's 4 and 8.
    assert table.rows == (
        ("band", "steps", "2", "20", "480", "8", "0.550 ± 1.906", "+0.150 ± 3.177",
         "180 (150 ± 0 %)", "3 (50 ± 0 %)"),
        ("uniform", "steps", "2", "20", "160", "8", "0.400 ± 1.271", "–",
         "120 (100 %)", "6 (100 %)"),
    )  # fmt: skip


def test_what_the_rollouts_gave(runs: list[Run]) -> None:
    # Band keeps 3 of 8 groups; of the 7 with an outcome 5 are mixed; 480 rollouts for 3 groups.
    # Uniform keeps 8 groups, 2 of them mixed, of 160 rollouts: 20 for each.
    table = rollout_findings.spent(runs)
    assert table.rows == (
        ("band", "steps", "37.5 ± 0.0 %", "71.4 ± 0.0 %", "160.0 ± 0.0", "240", "25.0 ± 0.0 %"),
        ("uniform", "steps", "100.0 ± 0.0 %", "25.0 ± 0.0 %", "20.0 ± 0.0", "80", "25.0 ± 0.0 %"),
    )
    assert table_markdown(runs).count("| uniform | steps |") == 2


def test_sentences_say_what_is_more_and_what_is_less(runs: list[Run]) -> None:
    assert findings.verdicts(runs) == [
        "At equal steps, band ends highest (held-out reward 0.550 ± 1.906), 0.150 above uniform "
        "(± 3.177, paired by seed): the seeds do not separate the two."
    ]
    assert rollout_findings.costs(runs) == [
        "At equal steps, band needs 150 ± 0 % of the rollouts (more) and 50 ± 0 % of the CPU "
        "seconds (less) that uniform takes to its best reward."
    ]
    assert findings.verdicts(runs[:2]) == [
        "At equal steps, no arm ends above uniform (held-out reward 0.400 ± 1.271)."
    ]


def test_sentences_about_arms_that_do_not_get_there(runs: list[Run], tmp_path: Path) -> None:
    uniform = runs[:2]
    never = [write(tmp_path, "idle", s, [0.2, 0.3, 0.3], groups=BAND) for s in (0, 1)]
    assert rollout_findings.costs([*uniform, *never]) == [
        "At equal steps, idle never gets to uniform's best held-out reward."
    ]
    assert rollout_findings.headline([*uniform, *never]).rows[1][-2:] == ("not reached",) * 2
    half = [write(tmp_path, "half", s, [0.2, 0.4, 0.4], groups=BAND) for s in (0, 1)]
    assert rollout_findings.costs([*uniform, *half]) == [
        "At equal steps, half needs 100 % of the rollouts and 100 % of the CPU seconds that "
        "uniform takes to its best reward, in the 1 of 2 runs that get there."
    ]
    row = rollout_findings.headline([*uniform, *half]).rows[1]
    assert row[0] == "half" and row[-2] == "80 (100 %), 1 of 2 runs"
    noisy = [write(tmp_path, "noisy", 0, [0.2, 0.6, 0.6]), write(tmp_path, "noisy", 1, [0.2, 0.5])]
    assert rollout_findings.costs([*uniform, *noisy]) == [
        "At equal steps, noisy needs 50 ± 0 % of the rollouts (less) and 50 ± 0 % of the CPU "
        "seconds (less) that uniform takes to its best reward."
    ]
    one = rollout_findings.costs([uniform[0], noisy[0]])[0]
    assert "50 % of the rollouts (one run)" in one
    slower = [noisy[0], write(tmp_path / "slow", "noisy", 1, [0.2, 0.2, 0.2, 0.5])]
    assert "(the seeds do not separate the two)" in rollout_findings.costs([*uniform, *slower])[0]


def test_caveats(runs: list[Run], tmp_path: Path) -> None:
    few = "Intervals rest on as few as 2 seeds; five or more are usual."
    assert findings.caveats(runs) == [few]
    flat = [write(tmp_path, "uniform", s, [0.5, 0.4, 0.3]) for s in (7, 8)]
    other = [write(tmp_path, "band", s, [0.5, math.nan], groups=BAND) for s in (7, 8)]
    notes = findings.caveats([*flat, *other])
    assert "Not an equal steps comparison: band used 10 steps, uniform 20." in notes
    assert "Runs whose last reward is not finite are left out of the means: band." in notes
    assert "No generations in 2 of 4 runs: uniform." in notes
    assert (
        "uniform does not get above its start at budget steps: how much of its way the others "
        "need has no meaning there."
    ) in notes
    assert rollout_findings.costs([*flat, *other]) == []
    assert rollout_findings.headline([*flat, *other]).rows[1][-2:] == ("–", "–")


def test_what_became_of_each_group(runs: list[Run]) -> None:
    found = rollouts.groups(Arm("band", "steps", (runs[2],)))
    assert [rollouts.FATES[fate] for fate in found.fates] == [
        "too hard", "kept", "too easy", "no outcome", "kept", "kept", "not needed", "too easy",
    ]  # fmt: skip
    assert found.steps.tolist() == [0] * 4 + [5] * 4
    edges, shares = rollouts.fates_over_steps(found)
    assert edges.tolist() == [0, 5, 10]
    assert (4 * shares).T.tolist() == [[1, 0, 1, 1, 0, 1], [2, 0, 0, 1, 1, 0]]
    whole = rollouts.groups(Arm("uniform", "steps", tuple(runs[:2])))
    assert rollouts.fates_over_steps(whole, 1)[1].T.tolist() == [[0.25, 0.75, 0, 0, 0, 0]]
    # Where nothing is kept, half of the completions is the border.
    with RunLog(runs[0].path, resume_step=0) as log:
        generate(log, 0, [(1, 3, 8, False), (2, 5, 8, False), (3, 4, 8, False)])
    alone = rollouts.groups(Arm("uniform", "steps", (read_run(runs[0].path),)))
    assert [rollouts.FATES[f] for f in alone.fates] == ["too hard", "too easy", "not needed"]


def test_pass_rates_of_prompts_over_time(runs: list[Run]) -> None:
    found = rollouts.pass_rates(rollouts.groups(Arm("band", "steps", (runs[2],))), each=1)
    assert found is not None
    # Six groups have an id and an outcome: two windows, two bands of prompts {1, 2} and {3}, whose
    # mean pass rates are 1/4, 1/2 and 15/16. Two of three prompts lie in the lower band.
    assert (found.x.tolist(), found.y.tolist()) == ([0, 5, 10], [0, 2, 3])
    assert found.rates.tolist() == [[0.125, 0.625], [1.0, 0.875]]
    # Five prompts, 16 groups: four bands {1, 5}, {2}, {3} and {4}, which the last batch lacks.
    whole = rollouts.groups(Arm("uniform", "steps", tuple(runs[:2])))
    found = rollouts.pass_rates(whole, each=1)
    assert found is not None and found.y.tolist() == [0, 2, 3, 4, 5]
    assert found.rates[:, 0].tolist() == [0, 0.5, 1, 1]
    assert found.rates[:3, 1].tolist() == [0, 0.75, 1] and math.isnan(found.rates[3, 1])


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(-1, 30), st.integers(0, 8)),
        min_size=1, max_size=60,
    ),
    st.integers(1, 10), st.integers(1, 4),
)  # fmt: skip
def test_pass_rates_lose_no_group(seen: list[tuple[int, int, int]], most: int, each: int) -> None:
    steps, prompts, wins = (np.array(column) for column in zip(*seen, strict=True))
    kept = np.zeros(len(seen), dtype=bool)
    groups = rollouts.Groups(steps, prompts, wins / 8, kept, np.full(len(seen), 2))
    found = rollouts.pass_rates(groups, most, each)
    known = prompts != -1
    if found is None:
        assert not known.any()
        return
    assert (found.y[0], found.y[-1]) == (0, len(set(prompts[known])))
    assert (np.diff(found.y) > 0).all()
    assert found.x[0] == steps[known].min() and found.x[-1] > steps[known].max()
    assert found.rates.shape == (found.y.size - 1, found.x.size - 1)
    assert max(found.rates.shape) <= most
    cells = found.rates[np.isfinite(found.rates)]
    assert (groups.rates[known].min() <= cells.min()) and cells.max() <= groups.rates[known].max()
    # Each band holds a prompt that was measured.
    assert np.isfinite(found.rates).any(axis=1).all()
    _, shares = rollouts.fates_over_steps(groups, most)
    assert set(shares.sum(axis=0).round(9)) <= {0.0, 1.0} and shares[2].any()


def test_figures_name_what_they_show(runs: list[Run]) -> None:
    found = rollouts.groups(Arm("band", "steps", tuple(runs[2:])))
    fates = rollout_figures.fates(found, "band", "f1")
    assert fates is not None and (
        "band: what became of 16 groups. kept 38%, kept, though all or none succeeded 0%, too hard "
        "12%, too easy 25%, not needed 12%, no outcome 12%." in fates
    )
    assert "var(--s5)" in fates and "var(--c2)" in fates
    rates = rollout_figures.pass_rates(found, "band", "f2")
    assert rates is not None and "band: pass rates of 3 prompts" in rates
    # 12 measured groups make one cell, mean (0 + 1/4 + 1 + 1/2 + 3/4 + 7/8) / 6 = 0.56.
    assert "mean at start and end 56%, 56%" in rates
    drawn = set(re.findall(r"fill: var\(--(s\d)\)", rates))
    assert drawn == {"s3"}


SECTIONS = {"loss": ("results", "loss", "kept"), "reward": ("rewards", "reward", "groups", "rates")}


def test_the_page_has_a_part_for_each_kind_of_run(runs: list[Run], tmp_path: Path) -> None:
    with RunLog(tmp_path / "sft") as log:
        log.start(name="UDS", seed=0)
        log.evaluation(step=0, seconds=0.0, rows=0, loss=3.0)
    folders = {"reward": [run.path for run in runs], "loss": [tmp_path / "sft"]}
    folders["both"] = folders["reward"] + folders["loss"]
    for kind, paths in folders.items():
        text = write_report(paths, tmp_path / "r.html").read_text()
        ids = re.findall(r'\sid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        for part, names in SECTIONS.items():
            assert ({*names} <= {*ids}) is (kind in (part, "both")), (kind, part)
        used = set(re.findall(r'href="#([^"]+)"', text))
        assert used <= set(ids)
        assert "facts" in used
    assert "4 arms" not in text and "3 arms, 5 runs" in text
    assert "Arms are timed by training seconds (wall clock) and CPU seconds" in text


def test_the_page_says_it_all(runs: list[Run], tmp_path: Path) -> None:
    never = write(tmp_path, "idle", 0, [0.2, 0.3, 0.3], groups=BAND)
    paths = [run.path for run in (*runs, never)]
    text = write_report(paths, tmp_path / "r.html").read_text()
    assert "150 ± 0 % of the rollouts (more)" in text and "<td>180 (150 ± 0 %)</td>" in text
    assert "idle never gets to uniform&#39;s best" in text and "<td>not reached</td>" in text
    labels = re.findall(r'role="img" aria-label="([^"]*)"', text)
    # Three curves, and two figures of each of three arms.
    assert len(labels) == 3 + 6 and all(labels)
    # What runs of equal steps have equally much of comes first.
    final = "Final: uniform 0.400 ± 1.271"
    assert labels[0].startswith(f"Held-out reward against optimizer steps. {final}")
    assert labels[1].startswith(f"Held-out reward against rollouts. {final}")
    assert "Held-out loss" not in text and "No run logged" not in text


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a") as log:
        log.start(name="band")
        generate(log, 0, [(-1, 1, 2, True)])
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "No run logged a held-out reward" not in text
    label = "Training reward against training seconds (wall clock). Final: band 0.500."
    assert f'aria-label="{label}"' in text
    assert "No run logged the outcomes of prompts that have an id" in text
    assert "No held-out reward in 1 of 1 runs: band." in text
    (tmp_path / "a" / "rollouts.jsonl").unlink()
    with RunLog(tmp_path / "a") as log:
        log.evaluation(step=0, seconds=0.0, rows=0, reward=0.5)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "No run logged its groups" in text and "No generations in 1 of 1 runs: band." in text


def test_headline_png_of_rewards(runs: list[Run], tmp_path: Path) -> None:
    data = headline_png(runs, tmp_path / "h.png", axis="rollouts").read_bytes()
    assert data[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="a held-out loss or reward, got 4 runs without one agai"):
        headline_png(runs, tmp_path / "h.png", axis="no such thing")


def test_groups_of_no_run() -> None:
    empty = rollouts.groups(Arm("band", None, ()))
    assert empty.fates.size == 0 and rollout_figures.fates(empty, "band", "f1") is None
    assert rollouts.yields(Arm("band", None, ())).rejected.n == 0
    assert Generation(0, 0.0, 0.0, 0, 0, 0, 1).kept.tolist() == []
