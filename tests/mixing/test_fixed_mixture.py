from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinesel.mixing import FixedMixture

SIZES = torch.tensor([1600, 100, 400])


def shares(**kwargs: Any) -> list[float]:
    mixture = FixedMixture(**kwargs)
    return mixture.proportions(mixture.init(SIZES)).tolist()


def test_the_three_kinds_of_weights() -> None:
    assert shares() == pytest.approx([16 / 21, 1 / 21, 4 / 21])
    assert shares(weights="uniform") == pytest.approx([1 / 3] * 3)
    assert shares(weights=(6, 3, 1)) == pytest.approx([0.6, 0.3, 0.1])
    assert shares(weights=[1.0, 0.0, 3.0]) == [0.25, 0.0, 0.75]


def test_a_temperature_takes_roots_of_the_weights() -> None:
    # Roots of 1600, 100, 400 are 40, 10, 20.
    assert shares(temperature=2.0) == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    # Squares of 1, 2, 3 sum to 14.
    assert shares(weights=(1, 2, 3), temperature=0.5) == pytest.approx([1 / 14, 4 / 14, 9 / 14])
    assert shares(weights="uniform", temperature=5.0) == pytest.approx([1 / 3] * 3)
    assert shares(weights=(1, 0, 1), temperature=9.0) == [0.5, 0.0, 0.5]
    assert shares(temperature=1e9) == pytest.approx([1 / 3] * 3)
    assert shares(temperature=1e-4) == [1.0, 0.0, 0.0]  # powers of 10,000 do not overflow


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "sizes"}, r"weights must be 'size', 'uniform' or one .* got 'sizes'\. Use "),
        ({"weights": (1.0, -1.0)}, r"weights must be finite numbers >= 0 .* got \(1\.0, -1\.0\)"),
        ({"weights": (0.0, 0.0)}, r"weights must be finite numbers >= 0 with a positive sum, got"),
        ({"weights": ()}, r"weights must be finite numbers >= 0 with a positive sum, got \(\)"),
        ({"weights": (float("nan"),)}, r"weights must be finite numbers >= 0 .* got \(nan,\)"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0\.0\. Use 1 for"),
        ({"temperature": float("inf")}, r"temperature must be finite and above 0, got inf\."),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^FixedMixture: {message}"):
        FixedMixture(**kwargs)


def test_weights_must_fit_the_domains() -> None:
    message = r"^FixedMixture: weights must be one number per domain \(3\), got 2\. Give them in "
    with pytest.raises(ValueError, match=message):
        FixedMixture((1.0, 1.0)).init(SIZES)
