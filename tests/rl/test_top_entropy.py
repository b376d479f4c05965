from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.rl.top_entropy import TopEntropy, entropy_threshold
from onlinesel.rl.types import TokenSignals, TokenTerms

NAN = float("nan")


def weigh(entropy: list[list[float]], mask: list[list[int]], share: float) -> TokenTerms:
    h, known = torch.tensor(entropy), torch.tensor(mask) > 0
    method = TopEntropy(share)
    ones = torch.ones_like(h)
    advantages = torch.arange(1.0, h.numel() + 1).view_as(h)
    said = method.statistics(h[known])
    return method.weigh(TokenSignals(h, ones, advantages, known, said, (0.125, 0.25)))


def test_by_hand() -> None:
    # Five tokens carry loss; the 0.6 quantile of 0.1 .. 0.5 lies between the third and the fourth.
    entropy = [[0.1, 0.4, 0.2], [0.5, 0.3, 9.0]]
    terms = weigh(entropy, [[1, 1, 1], [1, 1, 0]], 0.4)
    assert terms.advantages.tolist() == [[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]]
    assert bool((terms.clip_low == 0.125).all() and (terms.clip_high == 0.25).all())


def test_a_flipped_comparison_would_train_certain_tokens() -> None:
    terms = weigh([[3.0, 0.0, 0.0, 0.0, 0.0]], [[1] * 5], 0.2)
    assert terms.advantages.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_the_threshold_itself_trains_and_so_do_all_that_equal_it() -> None:
    assert weigh([[1.0, 2.0, 2.0, 2.0]], [[1] * 4], 0.25).advantages.tolist() == [[0, 2, 3, 4]]
    assert weigh([[0.0] * 4], [[1] * 4], 0.25).advantages.tolist() == [[1, 2, 3, 4]]


def test_the_whole_share_trains_everything_that_carries_loss() -> None:
    terms = weigh([[0.3, 0.1, 0.2, 0.9]], [[1, 1, 1, 0]], 1.0)
    assert terms.advantages.tolist() == [[1.0, 2.0, 3.0, 0.0]]


def test_degenerate_batches() -> None:
    terms = weigh([[0.3, 0.1]], [[0, 0]], 0.2)
    assert terms.advantages.tolist() == [[0.0, 0.0]]
    assert TopEntropy().statistics(torch.empty(0))["threshold"].item() == 0.0
    terms = weigh([[NAN, 0.1, 0.2, 0.3]], [[1] * 4], 0.5)
    assert terms.advantages.tolist() == [[0.0, 0.0, 3.0, 4.0]]


@given(
    values=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=60),
    share=st.floats(0.01, 1.0),
)
def test_against_the_quantile_of_torch(values: list[float], share: float) -> None:
    entropy = torch.tensor(values, dtype=torch.float64)
    found = entropy_threshold(entropy, share)
    torch.testing.assert_close(found, entropy.quantile(1 - share), rtol=1e-9, atol=1e-12)
    # About the share trains, more only among equals, and never nothing.
    trains = int((entropy >= found).sum())
    assert trains >= 1
    if entropy.unique().numel() == entropy.numel():
        assert share * (len(values) - 1) - 1e-6 <= trains <= share * (len(values) - 1) + 1 + 1e-6


def test_low_precision_entropies_are_taken_as_float32() -> None:
    values = torch.tensor([[0.5, 1.0, 2.0, 4.0]]).bfloat16()
    method = TopEntropy(0.5)
    said = method.statistics(values.flatten())
    assert said["threshold"].dtype == torch.float32
    ones = torch.ones(1, 4)
    terms = method.weigh(TokenSignals(values, ones, ones, ones.bool(), said, (0.2, 0.2)))
    assert terms.advantages.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("share", [0.0, 1.5, NAN])
def test_errors(share: float) -> None:
    with pytest.raises(ValueError, match=r"^TopEntropy: share must be in \(0, 1\], got .*\. Use 0"):
        TopEntropy(share)
