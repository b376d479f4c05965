from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.refill import Refill, fill_up

NAN = float("nan")


def ask(refill: Refill, **changed: Any) -> int:
    given = {
        "wanted": 16, "kept": 4, "acceptance": 0.5, "rounds": 0, "rollouts": 128, "generations": 8
    }  # fmt: skip
    return refill.ask(**{**given, **changed})


def fill(policy: str, kept: int, spread: list[float], wanted: int) -> tuple[list[int], list[int]]:
    return fill_up(policy, kept, torch.tensor(spread), wanted, torch.Generator().manual_seed(0))


def test_asks_for_what_the_acceptance_predicts() -> None:
    # 12 missing at 1 in 2 are 24, and a tenth more; but never more than a batch at once.
    assert ask(Refill()) == 16
    assert ask(Refill(), kept=12) == 9  # 4 / 0.5 * 1.1 = 8.8
    assert ask(Refill(oversample=1.0), kept=12) == 8
    assert ask(Refill(oversample=1.6), kept=12) == 13
    assert ask(Refill(), kept=15, acceptance=1.0) == 2
    assert ask(Refill(oversample=1.0), kept=15, acceptance=1.0) == 1
    # An acceptance near 0 is not believed: 0.1 is the least, or one missing asks for everything.
    assert ask(Refill(oversample=1.0), kept=15, acceptance=0.0) == 10
    assert ask(Refill(oversample=1.0), kept=15, acceptance=0.1) == 10


def test_ends_with_a_full_batch_or_the_last_round() -> None:
    assert ask(Refill(), kept=16) == ask(Refill(), kept=20) == 0
    assert ask(Refill(max_rounds=3), rounds=2) == 16
    assert ask(Refill(max_rounds=3), rounds=3) == ask(Refill(max_rounds=0)) == 0


def test_ends_where_the_rollouts_do() -> None:
    assert ask(Refill(max_rollouts=256)) == 16
    assert ask(Refill(max_rollouts=255)) == 15
    assert ask(Refill(max_rollouts=136)) == 1
    assert ask(Refill(max_rollouts=135)) == ask(Refill(max_rollouts=1)) == 0
    assert ask(Refill(max_rollouts=167), multiple=2) == 4
    assert ask(Refill(max_rollouts=151), multiple=4) == 0


def test_ranks_share_equally() -> None:
    assert ask(Refill(), kept=12, multiple=4) == 12
    assert ask(Refill(), wanted=5, kept=4, acceptance=0.1, multiple=4) == 8
    assert ask(Refill(), wanted=6, kept=1, acceptance=0.1, multiple=4) == 8


@given(
    refill=st.builds(
        Refill,
        max_rounds=st.integers(0, 5),
        max_rollouts=st.none() | st.integers(1, 500),
        oversample=st.floats(1.0, 3.0),
    ),
    wanted=st.integers(1, 20),
    generations=st.integers(2, 16),
    multiple=st.integers(1, 5),
    acceptance=st.floats(0, 1),
    found=st.lists(st.integers(0, 100), min_size=8, max_size=8),
)
def test_every_bound_holds_until_the_end(
    refill: Refill, wanted: int, generations: int, multiple: int, acceptance: float,
    found: list[int],
) -> None:  # fmt: skip
    first = -(-wanted // multiple) * multiple
    kept, rounds, rollouts = found[0] * first // 100, 0, first * generations
    while True:
        count = refill.ask(
            wanted=wanted,
            kept=kept,
            acceptance=acceptance,
            rounds=rounds,
            rollouts=rollouts,
            generations=generations,
            multiple=multiple,
        )
        assert 0 <= count <= first and count % multiple == 0
        if not count:
            break
        assert kept < wanted
        rounds, rollouts = rounds + 1, rollouts + count * generations
        assert rounds <= refill.max_rounds
        assert refill.max_rollouts is None or rollouts <= refill.max_rollouts
        kept += found[rounds] * count // 100
    # It ends for a reason.
    full = kept >= wanted or rounds == refill.max_rounds
    more = rollouts + multiple * generations
    assert full or (refill.max_rollouts is not None and more > refill.max_rollouts)


def test_partial_trains_what_was_kept() -> None:
    assert fill("partial", 3, [0.2, 0.1], 8) == ([0, 1, 2], [])
    assert fill("partial", 0, [0.2, 0.1], 8) == ([], [])
    assert fill("raise", 3, [0.2, 0.1], 8) == ([0, 1, 2], [])  # the host raised before


def test_skip_trains_nothing() -> None:
    assert fill("skip", 7, [0.2], 8) == ([], [])


def test_top_up_takes_the_most_varied_first() -> None:
    spread = [0.0, 0.1, NAN, 0.2, 0.1]
    assert fill("top_up", 4, spread, 6) == ([0, 1, 2, 3], [3, 1])
    assert fill("top_up", 1, spread, 6) == ([0], [3, 1, 4, 0, 2])  # nothing known comes last
    assert fill("top_up", 0, spread, 9) == ([], [3, 1, 4, 0, 2])  # as many as there are
    assert fill("top_up", 2, [], 4) == ([0, 1], [])


@pytest.mark.parametrize(("kept", "repeats"), [(0, False), (2, False), (3, True), (7, True)])
def test_replace_needs_more_than_a_third(kept: int, repeats: bool) -> None:
    mine, added = fill("replace", kept, [0.0] * 8, 8)
    assert (mine != []) == repeats and added == []


def test_a_third_exactly_is_not_enough() -> None:
    assert fill("replace", 3, [], 9) == ([], [])
    assert len(fill("replace", 4, [], 9)[0]) == 9


@given(wanted=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_replace_repeats_kept_groups_evenly(wanted: int, data: st.DataObject, seed: int) -> None:
    kept = data.draw(st.integers(wanted // 3 + 1, wanted))
    if kept == wanted:
        return  # nothing is missing, and fill_up is not asked
    generator = torch.Generator().manual_seed(seed)
    mine, added = fill_up("replace", kept, torch.zeros(wanted), wanted, generator)
    assert len(mine) == wanted and mine[:kept] == list(range(kept)) and added == []
    extra = mine[kept:]
    assert all(0 <= i < kept for i in extra)
    if len(extra) <= kept:  # enough to repeat none of them twice
        assert len(set(extra)) == len(extra)
    again = fill_up(
        "replace", kept, torch.zeros(wanted), wanted, torch.Generator().manual_seed(seed)
    )
    assert again == (mine, added)


def test_replace_chooses_at_random() -> None:
    generator = torch.Generator().manual_seed(0)
    counts: Tensor = torch.zeros(4)
    for _ in range(500):
        mine, _ = fill_up("replace", 4, torch.zeros(7), 11, generator)  # 7 of 4: some twice
        counts += torch.bincount(torch.tensor(mine[4:]), minlength=4)
    assert counts.sum() == 3500 and (counts / 875 - 1).abs().max() < 0.1


def test_the_choice_is_the_generators() -> None:
    # The other policies do not draw.
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for policy in ("partial", "skip", "top_up"):
        fill_up(policy, 2, torch.zeros(3), 4, generator)
    assert torch.equal(generator.get_state(), before)
    fill_up("replace", 2, torch.zeros(3), 4, generator)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rounds": -1}, r"max_rounds must be at least 0, got -1\. Leave it out"),
        ({"patience": 0}, r"patience must be at least 1, got 0\. Leave it out"),
        ({"oversample": 0.9}, r"oversample must be at least 1\.0, got 0\.9\. Leave it out"),
        ({"oversample": NAN}, r"oversample must be at least 1\.0, got nan\. Leave it out"),
        ({"max_rollouts": 0}, r"max_rollouts must be at least 1, got 0\. Use None for no bound"),
        (
            {"on_short": "pad"},
            r"on_short must be one of partial, replace, top_up, skip, raise, got 'pad'\. Leave",
        ),
        ({"leftover": "keep"}, r"leftover must be one of discard, carry, got 'keep'\. Leave"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^Refill: " + message):
        Refill(**arguments)
