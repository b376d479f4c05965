"""What a GRPO run says of itself at its start and its end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from onlinesel.callbacks.grpo import RolloutSelection  # noqa: E402
from onlinesel.report import read_run  # noqa: E402
from onlinesel.rl import HAPO, PassRateBand, Refill, UniformPrompts  # noqa: E402
from tests.callbacks.grpo_hosts import make_grpo_trainer  # noqa: E402


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "onlinesel"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            {"gate": PassRateBand(0.25, 0.75), "refill": Refill(max_rounds=2)},
            "onlinesel: PassRateBand: a generation batch is 2 of 8 problems, in the "
            "loader's order, with 4 completions each; an epoch has as many steps as without; ids: "
            "row numbers; PassRateBand drops groups that were generated, and up to 2 further calls "
            "take their place",
        ),
        (
            {"prompts": UniformPrompts(), "tokens": HAPO()},
            "onlinesel: UniformPrompts + HAPO: a generation batch is 2 of 8 problems, "
            "chosen by UniformPrompts, with 4 completions each; an epoch has as many steps as "
            "without; ids: row numbers; every group trains",
        ),
    ],
)
def test_both_lines(
    parts: dict[str, Any], expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onlinesel")
    trainer = make_grpo_trainer(tmp_path, [2, 0, 4, 1, 2, 0, 2, 2], max_steps=3)
    trainer.add_callback(RolloutSelection(trainer, **parts, record=tmp_path / "run"))
    trainer.train()
    first, last = lines(caplog)
    assert first == expected
    made = read_run(tmp_path / "run").generations
    groups = sum(len(one.kept) for one in made)
    idle = sum(not kept for one in made for kept in one.kept)
    share = made[-1].rejected_tokens / made[-1].tokens
    name = read_run(tmp_path / "run").name
    start = (
        f"onlinesel: {name} generated {made[-1].rollouts} completions of {groups} groups for "
        f"{len(made)} generation batches; {idle} group{'s' * (idle != 1)} did not train, "
        f"{100 * share:.0f} % of the tokens"
    )
    assert last.startswith(start)
    assert (idle > 0) == ("gate" in parts)


def test_a_callback_without_a_part_has_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onlinesel")
    trainer = make_grpo_trainer(tmp_path, max_steps=1)
    trainer.add_callback(RolloutSelection(trainer))
    trainer.train()
    assert lines(caplog) == []
