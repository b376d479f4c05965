from __future__ import annotations

from itertools import permutations

import torch

from onlinesel.mixing.sampler import _pick
from onlinesel.mixing.types import domain_means


def test_means_are_of_the_finite_values_of_each_domain() -> None:
    domain = torch.tensor([2, 0, 2, 1, 2, 0])
    values = torch.tensor([1.0, 5.0, float("nan"), float("inf"), 4.0, 6.0])
    means, seen = domain_means(domain, values, 4)
    assert means.dtype == torch.float64
    assert means.tolist() == [5.5, 0.0, 2.5, 0.0] and seen.tolist() == [True, False, True, False]


def test_means_do_not_depend_on_the_order_of_the_rows_in_any_bit() -> None:
    values = torch.tensor([1e17, 1.0, -1e17, 3.0, 1e-9])
    found = {
        domain_means(torch.zeros(5, dtype=torch.int64), values[list(order)], 1)[0].item()
        for order in permutations(range(5))
    }
    assert len(found) == 1


def test_a_number_on_an_edge_falls_into_the_domain_above_it() -> None:
    def pick(uniform: list[float], *proportions: float) -> list[int]:
        kind = torch.float64
        return _pick(
            torch.tensor(uniform, dtype=kind), torch.tensor(proportions, dtype=kind)
        ).tolist()

    assert pick([0.0, 0.25, 0.5, 0.75], 0.25, 0.25, 0.5) == [0, 1, 2, 2]
    assert pick([0.0, 0.5], 0.0, 0.5, 0.0, 0.5) == [1, 3]
    # Sums that rounding left short of 1 or beyond it.
    assert pick([1 - 2**-53], 0.5, 0.5 - 2**-30, 0.0) == [1]
    assert pick([1 - 2**-53], *[0.1] * 10, 0.0) == [9]
