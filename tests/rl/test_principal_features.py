from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onlinesel.rl.shared_difficulty import principal_features


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "width", "components", "found"),
    [(50, 6, 24, 6), (50, 6, 4, 4), (6, 40, 24, 5), (2, 5, 24, 1), (1, 5, 24, 0), (40, 3000, 8, 8)],
)
def test_components_are_standardised_and_uncorrelated(
    size: int, width: int, components: int, found: int
) -> None:
    x = principal_features(randn(size, width) * 3 + 100, components)
    assert x.shape == (size, found + 1) and x.dtype == torch.float32
    second = x.T @ x / size
    torch.testing.assert_close(second, torch.eye(found + 1), rtol=0, atol=1e-4)
    assert x[:, -1].tolist() == [1.0] * size


def test_components_are_the_widest_directions_of_standardised_columns() -> None:
    # Three columns follow one cause, a fourth is alone, on whatever scales.
    cause, other = randn(200, 1), randn(200, 1, seed=1)
    raw = torch.cat([cause, -cause, cause, other], dim=1) * torch.tensor([1.0, 1e-3, 1e4, 1e8])
    x = principal_features(raw, 2)
    for component, truth in ((x[:, 0], cause), (x[:, 1], other)):
        assert torch.corrcoef(torch.stack([component, truth[:, 0]]))[0, 1].abs() > 0.98
    assert principal_features(raw, 24).shape == (200, 3)  # there are no more directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3.3e6, 1e30])
@pytest.mark.parametrize("size", [1, 7, 49])
def test_constant_features_say_nothing(size: int, value: float, dtype: torch.dtype) -> None:
    # In float64 the mean of equal numbers is not quite that number.
    constant = torch.full((size, 3), value, dtype=dtype)
    assert principal_features(constant).tolist() == [[1.0]] * size
    # A constant column beside one that varies is left out.
    varied = torch.cat([constant, torch.arange(size)[:, None].to(dtype)], dim=1)
    assert principal_features(varied).shape == (size, 1 if size == 1 else 2)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_features_does_not_matter(scale: float) -> None:
    raw = randn(30, 4)
    found, wanted = principal_features(raw * scale), principal_features(raw)
    torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-3, atol=1e-4)


def test_large_pools_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = randn(70, 5) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + 7
    whole = principal_features(raw)
    monkeypatch.setattr("onlinesel.rl.shared_difficulty._BLOCK", 16)
    torch.testing.assert_close(principal_features(raw).abs(), whole.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1025, 2048, 3000])
def test_wide_features_keep_what_is_common(width: int) -> None:
    cause = randn(100, 3)
    raw = cause @ randn(3, width, seed=1) + 0.3 * randn(100, width, seed=2)
    x = principal_features(raw, 3)[:, :3].double()
    # The three causes lie in the three components.
    known = cause.double() - cause.double().mean(dim=0)
    left = known - x @ (x.T @ known) / 100
    assert (left.square().sum(dim=0) / known.square().sum(dim=0)).max() < 0.02
    assert torch.equal(principal_features(raw, 3)[:, :3].double(), x)  # no randomness of its own


def test_columns_that_are_added_up_do_not_cancel_or_vanish() -> None:
    cause = randn(100, 1)
    loaded = cause @ randn(1, 1024, seed=1) + 0.1 * randn(100, 1024, seed=2)
    opposite, constant = torch.cat([loaded, -loaded], dim=1), torch.ones(100, 1024)
    for raw in (
        opposite, torch.cat([loaded, constant], dim=1), torch.cat([constant, loaded], dim=1)
    ):  # fmt: skip
        x = principal_features(raw, 1)
        assert torch.corrcoef(torch.stack([x[:, 0], cause[:, 0]]))[0, 1].abs() > 0.98
