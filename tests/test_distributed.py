"""What the ranks tell each other and which rows move, on three real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Signals
from onlinesel.data.batch import deal
from onlinesel.parallel.distributed import begin_gather, gather_signals
from tests.launching import PATIENCE
from tests.three_ranks import RANKS, SCENES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what each of the processes said."""
    store = tmp_path_factory.mktemp("three_ranks") / "store"
    command = [sys.executable, "-m", "tests.three_ranks", str(store)]
    started = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [err[-2000:] for (_, err), p in zip(ended, started, strict=True) if p.returncode]
    assert not failed, "\n".join(failed)
    return [out for out, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize("scene", [scene.__name__ for scene in SCENES])
def test_on_three_ranks(printed: list[str], scene: str) -> None:
    assert [f"passed {scene}" in text.splitlines() for text in printed] == [True] * RANKS


def dealt_one_by_one(owners: list[int], ranks: int) -> list[int]:
    """What `deal` promises, row by row."""
    quota = [len(owners) // ranks + (r < len(owners) % ranks) for r in range(ranks)]
    held = [[k for k, owner in enumerate(owners) if owner == r] for r in range(ranks)]
    spare = [k for r in range(ranks) for k in held[r][quota[r] :]]
    target = list(owners)
    for r in range(ranks):
        for _ in range(quota[r] - len(held[r])):
            target[spare.pop(0)] = r
    return target


@given(st.integers(1, 9), st.data())
def test_dealing_gives_the_last_rows_to_the_first_who_lack(ranks: int, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, ranks - 1), max_size=60))
    held = torch.tensor(owners, dtype=torch.long)
    assert deal(held, ranks).tolist() == dealt_one_by_one(owners, ranks)
    assert held.tolist() == owners


def test_alone_a_gathering_is_what_was_handed_in() -> None:
    signals = Signals(ids=torch.tensor([5, 2]), loss=torch.tensor([1.0, 3.0]))
    found, counts = gather_signals(Signals(loss=signals.loss), started=begin_gather(signals))
    assert found.ids.tolist() == [5, 2] and found.loss.tolist() == [1.0, 3.0] and counts == [2]
    with pytest.raises(ValueError, match=r"started must be of the same rows \(2\), got 1 of them"):
        gather_signals(signals, started=begin_gather(signals.take(torch.tensor([0]))))
