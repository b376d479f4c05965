from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel.mixing import DoReMi

SIZES = torch.tensor([30, 10])


def rows(*values: float) -> Tensor:
    return torch.tensor(values)


def test_one_step_by_hand() -> None:
    mixture = DoReMi(eta=1.0, smoothing=0.1)
    state = mixture.observe(
        rows(0, 1, 0).long(), rows(2.0, 1.0, 4.0), mixture.init(SIZES),
        reference_loss=rows(1.0, 2.0, 2.0),
    )  # fmt: skip
    # Excesses 1 and 2 of domain 0 have mean 1.5; that of domain 1 is below 0 and clipped.
    # e^1.5 / (e^1.5 + 1) = 0.8175744762; 0.9 of it and 0.1 of 1/2 are 0.7858170285.
    assert state["excess"].tolist() == [1.5, 0.0]
    assert mixture.proportions(state).tolist() == pytest.approx([0.7858170285, 0.2141829715])


def test_eta_multiplies_the_excess_and_the_start_is_multiplied() -> None:
    mixture = DoReMi(reference=(1.0, 1.0), eta=0.5, smoothing=1e-3, initial="size")
    assert mixture.proportions(mixture.init(SIZES)).tolist() == [0.75, 0.25]
    excess = 2 * math.log(3)  # times eta is a factor of 3
    state = mixture.observe(rows(0, 1).long(), rows(1.0, 1.0 + excess), mixture.init(SIZES))
    # 0.75 to 0.75: even.
    assert mixture.proportions(state).tolist() == pytest.approx([0.5, 0.5])


def test_rows_are_clipped_one_by_one_but_numbers_are_compared_with_the_mean() -> None:
    loss, domain = rows(1.0, 4.0, 2.0, 2.0), rows(0, 0, 1, 1).long()
    by_row = DoReMi()
    state = by_row.observe(
        domain, loss, by_row.init(SIZES), reference_loss=rows(3.0, 3.0, 1.5, 1.5)
    )
    assert state["excess"].tolist() == [0.5, 0.5]  # 0 and 1; 0.5 twice
    by_number = DoReMi(reference=(3.0, 1.5))
    state = by_number.observe(domain, loss, by_number.init(SIZES))
    assert state["excess"].tolist() == [0.0, 0.5]  # 2.5 is below 3
    # Numbers win over losses of rows, so that a host may pass what it has.
    again = by_number.observe(domain, loss, by_number.init(SIZES), reference_loss=rows(0, 0, 0, 0))
    assert again["excess"].tolist() == [0.0, 0.5]


def test_a_domain_without_rows_keeps_its_last_excess() -> None:
    mixture = DoReMi(reference=(0.0, 0.0), smoothing=1e-9)
    state = mixture.init(SIZES)
    state = mixture.observe(rows(0).long(), rows(1.0), state)  # factors e and 1
    state = mixture.observe(rows(1).long(), rows(3.0), state)  # factors e and e^3
    assert state["excess"].tolist() == [1.0, 3.0]
    ratio = state["weights"][1] / state["weights"][0]
    assert ratio.item() == pytest.approx(math.e**3 / math.e**2, rel=1e-6)


def test_a_row_without_a_finite_reference_says_nothing() -> None:
    mixture = DoReMi()
    state = mixture.observe(
        rows(0, 0, 1).long(), rows(2.0, 2.0, 2.0), mixture.init(SIZES),
        reference_loss=rows(1.0, float("nan"), float("inf")),
    )  # fmt: skip
    assert state["excess"].tolist() == [1.0, 0.0]


def test_no_domain_falls_below_its_part_of_the_smoothing() -> None:
    mixture = DoReMi(reference=(0.0, 0.0), smoothing=0.02)
    state = mixture.init(SIZES)
    for _ in range(200):
        state = mixture.observe(rows(0, 1).long(), rows(30.0, 0.0), state)
    assert mixture.proportions(state).tolist() == pytest.approx([0.99, 0.01])
    for _ in range(3):  # and it comes back
        state = mixture.observe(rows(0, 1).long(), rows(0.0, 30.0), state)
    assert mixture.proportions(state).tolist() == pytest.approx([0.01, 0.99])


def test_the_average_is_that_of_the_steps_taken() -> None:
    mixture = DoReMi(reference=(0.0, 0.0))
    state = mixture.init(SIZES)
    assert mixture.average(state).tolist() == [0.5, 0.5]
    seen = []
    for loss in (rows(1.0, 0.0), rows(0.0, 2.0), rows(0.5, 0.5)):
        state = mixture.observe(rows(0, 1).long(), loss, state)
        seen.append(mixture.proportions(state))
    torch.testing.assert_close(mixture.average(state), torch.stack(seen).mean(dim=0))


def test_the_papers_settings() -> None:
    assert DoReMi.paper((1.0, 2.0)) == DoReMi((1.0, 2.0), eta=1.0, smoothing=0.001)


def test_it_says_what_it_needs() -> None:
    assert DoReMi().needs == ("loss", "reference_loss")
    assert DoReMi(reference=[1.0]).needs == ("loss",)
    message = (
        r"^DoReMi: reference_loss must come with every row where reference is None, got None\. "
        r"Pass one number per domain as reference, or observe reference losses\.$"
    )
    with pytest.raises(ValueError, match=message):
        DoReMi().observe(rows(0).long(), rows(1.0), DoReMi().init(SIZES))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference": (1.0, float("nan"))}, r"reference must be finite losses, got \(1\.0, nan\)"),
        ({"eta": 0.0}, r"eta must be finite and above 0, got 0\.0\. Use the paper's 1\.$"),
        ({"eta": float("nan")}, "eta must be finite and above 0, got nan"),
        (
            {"smoothing": 0.0},
            r"smoothing must be in \(0, 1\], got 0\.0\. Use 0\.05, or the paper's 1e-3\.$",
        ),
        ({"smoothing": 1.5}, r"smoothing must be in \(0, 1\], got 1\.5"),
        (
            {"initial": (1.0, 0.0)},
            r"initial must be positive numbers, got \(1\.0, 0\.0\)\. A share",
        ),
        ({"initial": "even"}, "initial must be 'size', 'uniform' or one number per domain"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^DoReMi: {message}"):
        DoReMi(**kwargs)


def test_settings_must_fit_the_domains() -> None:
    message = r"^DoReMi: reference must be one loss per domain \(2\), got 3\. Give them in "
    with pytest.raises(ValueError, match=message):
        DoReMi(reference=(1.0, 1.0, 1.0)).init(SIZES)
    with pytest.raises(ValueError, match=r"^DoReMi: initial must be one number per domain \(2\)"):
        DoReMi(initial=(1.0, 1.0, 1.0)).init(SIZES)
