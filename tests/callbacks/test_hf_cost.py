"""What the callback itself costs, where it has nothing to choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.callbacks.costs import uniform_run


@pytest.mark.slow
def test_uniform_with_one_candidate_costs_at_most_two_percent_of_a_step(tmp_path: Path) -> None:
    """CPU time spent in our own code over that of the whole run."""
    cost = uniform_run(tmp_path)
    assert cost["ours"] < 0.02 * cost["whole"], cost
    assert cost["collectives"] == 0
