from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.hapo import HAPO
from onlinesel.rl.temperature import AdaptiveTemperature, adaptive_temperature

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "hapo.json").read_text("utf-8"))
NAN = float("nan")
METHODS = {
    "T_from_h_hat": AdaptiveTemperature(),
    # The golden numbers have no lowest temperature; 0.02 is below all of them.
    "T_from_z_tau_0p1": AdaptiveTemperature(tau=0.1, rule="unbounded", lowest=0.02),
    "T_from_h_hat_as_released": AdaptiveTemperature.released(),
}

each_case = pytest.mark.parametrize("case", ["main", "fallback"])


def golden_entropies(case: str, dtype: torch.dtype) -> Tensor:
    given = GOLDEN[case]["inputs"]
    assert given["tau"] == 0.05 and given["T_base"] == 1.0
    return torch.tensor(given["entropy"], dtype=dtype)[torch.tensor(given["mask"]) > 0]


@each_case
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden_vectors(case: str, name: str, dtype: torch.dtype, rtol: float) -> None:
    golden, method = GOLDEN[case]["temperature"], METHODS[name]
    said = method.statistics(golden_entropies(case, dtype))
    probe = torch.tensor(golden["probe_entropy"], dtype=dtype)
    wanted = torch.tensor(golden[name], dtype=dtype)
    found = method.temperatures(probe, said, 1.0)
    assert found.dtype == dtype
    # Near 0 the difference 1 + tau z loses digits in float32.
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 10)
    # Another base temperature scales all of them.
    torch.testing.assert_close(method.temperatures(probe, said, 0.5), found / 2, rtol=0, atol=0)


@each_case
def test_the_paper_is_guarded_from_below(case: str) -> None:
    golden = GOLDEN[case]["temperature"]
    method = AdaptiveTemperature.paper()
    said = method.statistics(golden_entropies(case, torch.float64))
    found = method.temperatures(torch.tensor(golden["probe_entropy"]).double(), said, 1.0)
    wanted = [max(value, 0.1) for value in golden["T_from_z_tau_0p1"]]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    strong = AdaptiveTemperature(tau=10.0, rule="unbounded", lowest=0.25)
    coldest = strong.temperatures(torch.tensor([0.0]), said, 0.5)
    assert coldest.tolist() == [0.125]


def test_by_hand() -> None:
    # Log entropies -2, 0, 1 about the pivot 0: h = -1, 0, 1; clamped beyond.
    entropy = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64).exp()
    method = AdaptiveTemperature(tau=0.25, rho=0.5)
    said = method.statistics(entropy)
    probe = torch.tensor([-9.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64).exp()
    found = method.temperatures(probe, said, 2.0)
    assert found.tolist() == pytest.approx([1.5, 1.75, 2.0, 2.25, 2.5], rel=1e-5)
    unbounded = AdaptiveTemperature(tau=0.25, rho=0.5, rule="unbounded")
    sigma = (5 / 3) ** 0.5
    wanted = [2 * (1 + 0.25 * z / sigma) for z in (-1.0, 0.0, 0.5, 3.0)]
    found = unbounded.temperatures(probe[1:], said, 2.0)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_flipped_sign_would_cool_uncertain_tokens() -> None:
    method = AdaptiveTemperature()
    said = method.statistics(torch.tensor([0.01, 0.1, 0.5, 1.0, 1.5, 3.0]))
    cold, hot = method.temperatures(torch.tensor([0.01, 3.0]), said, 1.0).tolist()
    assert cold < 0.96 and hot > 1.04
    # As released, the most certain token is as hot as the most uncertain one.
    cold, hot = AdaptiveTemperature.released().temperatures(torch.tensor([0.01, 3.0]), said, 1.0)
    assert cold > 1.04 and hot > 1.04


def test_without_statistics_the_base_temperature_holds() -> None:
    entropy = torch.tensor([0.0, 1.0, NAN])
    for method in METHODS.values():
        assert method.temperatures(entropy, None, 0.75).tolist() == [0.75] * 3
        empty = method.statistics(torch.empty(0))
        assert method.temperatures(entropy, empty, 0.75).tolist() == [0.75] * 3
    said = AdaptiveTemperature().statistics(torch.tensor([0.1, 1.0]))
    assert AdaptiveTemperature().temperatures(entropy, said, 0.75)[2].item() == 0.75


def test_the_statistics_are_those_of_hapo() -> None:
    entropy = torch.tensor([0.1, 0.7, 0.2, 2.0])
    ours, theirs = AdaptiveTemperature().statistics(entropy), HAPO().statistics(entropy)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@given(
    values=st.lists(st.floats(0, 20, width=32), max_size=30),
    probe=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=10),
    tau=st.floats(0, 5),
    rule=st.sampled_from(["clamped", "unbounded"]),
)
def test_temperatures_are_positive_and_rise_with_entropy(
    values: list[float], probe: list[float], tau: float, rule: str
) -> None:
    method = AdaptiveTemperature(tau=tau, rule=rule)
    said = method.statistics(torch.tensor(values))
    found = method.temperatures(torch.tensor(sorted(probe)), said, 0.8)
    assert bool(torch.isfinite(found).all() and (found >= 0.8 * 0.0999).all())
    assert bool((found.diff() >= 0).all())
    if rule == "clamped":
        assert bool((found <= 0.8 * (1 + tau) * 1.0001).all())


def test_the_function_has_the_defaults_of_the_class() -> None:
    entropy = torch.tensor([0.1, 1.0, 3.0])
    said = AdaptiveTemperature().statistics(entropy)
    found = adaptive_temperature(entropy, said, 1.0)
    assert torch.equal(found, AdaptiveTemperature().temperatures(entropy, said, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, r"tau must be at least 0 and finite, got -0\.1\. Use 0\.05"),
        ({"rule": "v2"}, r"rule must be one of clamped, unbounded, got 'v2'\. Leave"),
        ({"lowest": 0.0}, r"lowest must be in \(0, 1\], got 0\.0\. It is a share"),
        ({"rho": -0.5}, r"rho must be in \[0, 1\], got -0\.5\. Use 0\.8"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^AdaptiveTemperature: " + message):
        AdaptiveTemperature(**arguments)
