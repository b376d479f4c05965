"""Checks of the policy's kernels in Triton's interpreter; see ``interpreted.py``."""

from __future__ import annotations

import pytest
import torch

from onlinesel.kernels import LMHead, policy_logprobs
from tests.kernels.interpreted import BACKENDS, pytestmark, small_blocks
from tests.kernels.made_heads import made_head
from tests.kernels.test_token_scores import sample

__all__ = ["pytestmark", "small_blocks"]  # which pytest takes from here


@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_logprobs_over_each_backend(backend: str) -> None:
    hidden, head, labels = sample(9, 16, 90, std=4.0)
    hidden.requires_grad_()
    ours = policy_logprobs(hidden, head, labels, 0.7, backend=backend)
    oracle = policy_logprobs(hidden, head, labels, 0.7)
    gradients = [torch.autograd.grad((side[0] + side[1]).sum(), hidden) for side in (ours, oracle)]
    for one, two in zip((*ours, *gradients[0]), (*oracle, *gradients[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 1.0), (-0.5, 0.3)])
def test_the_gradient_of_a_tile_is_that_of_autograd(
    through: tuple[float, float], softcap: float | None
) -> None:
    hidden, head, labels = sample(9, 16, 90, std=4.0)
    g = torch.Generator().manual_seed(5)
    exact = [hidden.double(), head.weight.double(), torch.randn(90, generator=g).double()]
    temperature, push = torch.linspace(0.5, 2.0, 9), torch.randn(2, 9, generator=g)
    push = push * torch.tensor(through)[:, None]
    push[:, 3] = 0.0  # no part of the backward pass
    found = []
    for leaves, backend in ((exact, "plain"), ([x.float() for x in exact], "tile")):
        leaves = [x.requires_grad_() for x in leaves]
        states, weight, bias = leaves
        if backend == "plain":
            z = 1.5 * (states @ weight.T + bias)
            z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature[:, None]
            log_p = torch.log_softmax(z, 1)
            both = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
        else:
            on = LMHead(weight, bias, 1.5, softcap)
            both = policy_logprobs(
                states, on, labels, temperature, backend=backend, vocab_chunk=40, token_chunk=4
            )
        total = sum((x * w).sum() for x, w in zip(both, push.to(both[0].dtype), strict=True))
        found.append(torch.autograd.grad(total, leaves))
    for true, ours in zip(*found, strict=True):
        assert (ours - true).norm() <= 1e-5 * true.norm()


def test_a_nan_reaches_the_gradient_of_its_token_alone() -> None:
    hidden, head, labels = sample(9, 16, 90, std=4.0)
    hidden[2, 0] = float("nan")
    hidden.requires_grad_()
    logprobs, _ = policy_logprobs(hidden, head, labels, backend="tile", vocab_chunk=40)
    (found,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert found[2].isnan().all() and found[torch.arange(9) != 2].isfinite().all()


@pytest.mark.parametrize("kind", ["rows", "lora", "qlora"])
def test_policy_logprobs_over_heads_that_are_made(kind: str) -> None:
    head = made_head(kind, v=90, d=16, dtype=torch.float32)
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
    wanted = [hidden, *(x.requires_grad_() for low in head.low_rank for x in (low.a, low.b))]
    found = []
    for backend in ("tile", "torch"):
        both = policy_logprobs(hidden, head, torch.arange(9), 0.7, backend=backend)
        found.append([*both, *torch.autograd.grad(both[0].sum() + both[1].sum(), wanted)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-5)
