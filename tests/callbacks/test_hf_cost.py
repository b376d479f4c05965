"""What the callback itself costs where it has nothing to choose, counted."""

from __future__ import annotations

from pathlib import Path

from tests.callbacks.costs import uniform_run


def test_uniform_with_one_candidate_costs_at_most_two_percent_of_a_step(tmp_path: Path) -> None:
    """610 calls and 61 operations on small tensors took 0.9 ms of a core, and a step of 8 rows of
    128 tokens through 1.1 million parameters 150 ms, of which 2 % is three times as much.

    The tiny model here has 25,000 elements: more than the bound, so none of ours reads them.
    """
    found = uniform_run(tmp_path)
    assert 0 < found["calls"] <= 1000 and 0 < found["operations"] <= 100, found
    assert found["elements"] <= 1000 and found["collectives"] == 0, found
