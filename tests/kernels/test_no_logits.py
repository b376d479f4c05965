"""No scoring path allocates anything as large as the logits."""

from __future__ import annotations

import pytest
import torch

from onlinesel.kernels import HeadGram, JLProjector, LMHead, logit_nuclear_norm, token_scores
from tests.kernels.no_logits import assert_no_logits, naive_logits

B, T, D, V = 8, 64, 24, 6000
G = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(B, T, D, generator=G)
WEIGHT = torch.randn(V, D, generator=G)
BIAS = torch.randn(V, generator=G)
LABELS = torch.randint(0, V, (B, T), generator=G)
HEADS = [LMHead(WEIGHT), LMHead(WEIGHT, BIAS, scale=0.5), LMHead(WEIGHT, BIAS, softcap=3.0)]


@pytest.mark.parametrize("head", HEADS)
def test_no_scoring_path_builds_the_logits(head: LMHead) -> None:
    def project() -> None:
        projector = JLProjector(V, T, vocab_dim=16)
        projector.project(HIDDEN, head if head.softcap else projector.fold(head))

    assert_no_logits(lambda: token_scores(HIDDEN, head, LABELS), B, T, V)
    assert_no_logits(lambda: logit_nuclear_norm(HIDDEN, head), B, T, V)
    assert_no_logits(lambda: logit_nuclear_norm(HIDDEN, head, method="stream"), B, T, V)
    assert_no_logits(project, B, T, V)
    if head.softcap is None:
        for method in ("gram", "polar", "svd"):
            gram = HeadGram(head)
            assert_no_logits(
                lambda m=method, g=gram: logit_nuclear_norm(HIDDEN, head, method=m, gram=g), B, T, V
            )


def test_the_check_catches_logits() -> None:
    with pytest.raises(AssertionError, match="as large as the logits"):
        assert_no_logits(lambda: naive_logits(HIDDEN, WEIGHT), B, T, V)


def test_the_check_catches_measuring_nothing() -> None:
    with pytest.raises(AssertionError, match="nothing was allocated"):
        assert_no_logits(lambda: HIDDEN.view(-1), B, T, V)
