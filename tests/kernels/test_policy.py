"""policy_logprobs against log_softmax of whole logits, its gradients, and the work it skips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from onlinesel.kernels import LMHead, policy, policy_logprobs
from onlinesel.kernels._shards import held
from tests.kernels.no_logits import LargestTensor


def plain(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Both quantities from whole logits, by autograd."""
    z = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    if temperature is not None:
        z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def sample(
    *, bias: bool = True, scale: float = 1.0, softcap: float | None = None,
    shape: tuple[int, ...] = (3, 7), d: int = 6, v: int = 29,
    dtype: torch.dtype = torch.float64, std: float = 2.0,
) -> tuple[Tensor, LMHead, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, d, generator=g).to(dtype).requires_grad_()
    weight = (std * torch.randn(v, d, generator=g) / d**0.5).to(dtype).requires_grad_()
    offset = torch.randn(v, generator=g).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, v, shape, generator=g)
    return hidden, LMHead(weight, offset, scale, softcap), labels


def leaves(hidden: Tensor, head: LMHead) -> list[Tensor]:
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (-0.5, None), (1.5, 3.0)])
@pytest.mark.parametrize("temperature", [None, 0.7, "each"])
def test_values_and_gradients(
    bias: bool, scale: float, softcap: float | None, temperature: Any
) -> None:
    hidden, head, labels = sample(bias=bias, scale=scale, softcap=softcap)
    if temperature == "each":
        temperature = torch.linspace(0.3, 2.5, 21).double().reshape(3, 7)
    ours = policy_logprobs(hidden, head, labels, temperature, vocab_chunk=10, token_chunk=4)
    true = plain(hidden, head, labels, temperature)
    g = torch.Generator().manual_seed(1)
    push = [torch.randn(3, 7, generator=g).double() for _ in range(2)]
    for used in ((0,), (1,), (0, 1)):
        for at in used:
            torch.testing.assert_close(ours[at], true[at], rtol=1e-12, atol=1e-12)
        wanted = leaves(hidden, head)
        found, expected = (
            torch.autograd.grad(
                [side[at] for at in used], wanted, [push[at] for at in used], retain_graph=True
            )
            for side in (ours, true)
        )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    hidden, head, labels = sample(shape=(4,), d=3, v=7, softcap=4.0, scale=1.3)
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)

    def run(states: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        part = LMHead(weight, bias, head.scale, head.softcap)
        return policy_logprobs(states, part, labels, temperature, vocab_chunk=3, token_chunk=3)

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


def test_float32_and_bfloat16_against_float64() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        hidden, head, labels = sample(shape=(40,), d=32, v=500, std=6.0, dtype=dtype)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves(hidden, head)]
        exact = LMHead(wide[1], wide[2])
        ours, true = policy_logprobs(hidden, head, labels), plain(wide[0], exact, labels)
        top = float(exact.logits(wide[0]).detach().abs().max())
        assert ours[0].dtype == torch.float32
        assert (ours[0] - true[0]).abs().max() <= 2e-5 + 1e-6 * top
        assert (ours[1] - true[1]).abs().max() <= 3e-5
        found = torch.autograd.grad(ours[0].sum() + ours[1].sum(), leaves(hidden, head))
        expected = torch.autograd.grad(true[0].sum() + true[1].sum(), wide)
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == dtype  # bfloat16: the rounding of the result itself
            assert (one.double() - two).norm() <= bound * two.norm()


def test_the_gradient_of_a_certain_label_does_not_cancel() -> None:
    # Logits (30, 0, 0): 1 - p is 2e-13, which float32 cannot tell from 0.
    hidden = torch.tensor([[30.0]], requires_grad=True)
    head = LMHead(torch.tensor([[1.0], [0.0], [0.0]]))
    policy_logprobs(hidden, head, torch.tensor([0]))[0].sum().backward()
    rest = 2 * torch.exp(torch.tensor(-30.0).double())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), (rest / (1 + rest)).reshape(1, 1), rtol=1e-5,
                               atol=0)  # fmt: skip


def test_ignored_tokens_give_zero_and_get_no_gradient() -> None:
    hidden, head, labels = sample()
    labels[0, 2:5] = labels[2] = -100
    logprobs, entropy = policy_logprobs(hidden, head, labels)
    true = plain(hidden, head, labels)
    counted = labels >= 0
    for ours, theirs in ((logprobs, true[0]), (entropy, true[1])):
        torch.testing.assert_close(ours[counted], theirs[counted])
        assert (ours[~counted] == 0).all()
    (found,) = torch.autograd.grad((logprobs + entropy).sum(), hidden)
    assert (found[~counted] == 0).all() and (found[counted] != 0).all()
    nothing = policy_logprobs(hidden, head, torch.full_like(labels, -100))
    for leaf in torch.autograd.grad(nothing[0].sum() + nothing[1].sum(), leaves(hidden, head)):
        assert (leaf == 0).all()


@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
def test_rows_without_upstream_gradient_cost_nothing(through: str) -> None:
    hidden, head, labels = sample(shape=(50,), d=8, v=64)
    weights = torch.zeros(50, dtype=torch.float64)
    weights[::5] = torch.linspace(-1, 2, 10).double()
    work, gradients = [], []
    for push in (torch.ones(50).double(), weights, torch.zeros(50).double()):
        logprobs, entropy = policy_logprobs(hidden, head, labels, vocab_chunk=20, token_chunk=7)
        pick = {"logprobs": logprobs, "entropy": entropy, "both": logprobs + entropy}[through]
        with FlopCounterMode(display=False) as counter:
            gradients.append(torch.autograd.grad(pick, leaves(hidden, head), push))
        work.append(counter.get_total_flops())
    assert work[0] == 3 * 2 * 50 * 8 * 64  # logits, gradient of hidden, gradient of the weight
    assert work[1] == work[0] // 5 and work[2] == 0
    true = plain(hidden, head, labels)
    pick = {"logprobs": true[0], "entropy": true[1], "both": true[0] + true[1]}[through]
    expected = torch.autograd.grad(pick, leaves(hidden, head), weights)
    for one, two, none in zip(gradients[1], expected, gradients[2], strict=True):
        torch.testing.assert_close(one, two)
        assert (none == 0).all()
    assert (gradients[1][0][weights == 0] == 0).all()


def test_what_needs_no_gradient_costs_nothing() -> None:
    hidden, head, labels = sample(shape=(20,), d=8, v=64, bias=False)
    frozen = LMHead(head.weight.detach())
    logprobs, _ = policy_logprobs(hidden, frozen, labels)
    with FlopCounterMode(display=False) as counter:
        logprobs.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 20 * 8 * 64
    assert not policy_logprobs(hidden.detach(), frozen, labels)[0].requires_grad


def test_a_nan_upstream_is_not_skipped() -> None:
    hidden, head, labels = sample(shape=(4,), bias=False)
    logprobs, _ = policy_logprobs(hidden, head, labels)
    push = torch.tensor([0.0, torch.nan, 0.0, 1.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(logprobs, hidden, push)
    assert found.isnan().all(1).tolist() == [False, True, False, False]


def test_an_entry_at_minus_infinity_is_removed() -> None:
    hidden, head, labels = sample(bias=False)
    wide = LMHead(
        torch.cat((head.weight, torch.ones(3, 6).double())),
        torch.cat((torch.zeros(29), torch.full((3,), -torch.inf))).double(),
    )
    ours, true = policy_logprobs(hidden, wide, labels), plain(hidden, head, labels)
    for one, two in zip(ours, true, strict=True):
        torch.testing.assert_close(one, two)
    found, expected = (
        torch.autograd.grad(side[0].sum() + side[1].sum(), (hidden, head.weight))
        for side in (ours, true)
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_no_logits_in_either_direction() -> None:
    hidden, head, labels = sample(shape=(256,), d=16, v=20000, dtype=torch.float32)
    with LargestTensor() as seen:
        logprobs, entropy = policy_logprobs(hidden, head, labels)
        (logprobs + entropy).sum().backward()
    assert 0 < seen.numel <= 2**20 < 256 * 20000, seen.where  # a tile of 4 MiB


def test_autocast_does_not_reach_the_sums() -> None:
    hidden, head, labels = sample(shape=(9,), dtype=torch.float32)
    before = policy_logprobs(hidden, head, labels)
    expected = torch.autograd.grad(before[0].sum(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        ours = policy_logprobs(hidden, head, labels)
        found = torch.autograd.grad(ours[0].sum(), hidden)
    assert torch.equal(ours[0], before[0]) and torch.equal(found[0], expected[0])


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_are_rounded_as_autocast_does_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, rounded: torch.dtype, bias: bool
) -> None:
    """Float32 weights in 16-bit products: what comes out is exact for the rounded factors."""
    monkeypatch.setattr(policy, "_ROUNDED_ENTRIES", 64)  # the cast is done in several parts
    hidden, head, labels = sample(shape=(40,), d=32, v=500, std=6.0, dtype=torch.float32, bias=bias)
    wide = [leaf.detach().to(rounded).double().requires_grad_() for leaf in leaves(hidden, head)]
    exact = LMHead(wide[1], wide[2] if bias else None)
    temperature = torch.linspace(0.5, 2, 40)
    ours = policy_logprobs(hidden, head, labels, temperature, compute_dtype=rounded, vocab_chunk=90)
    true = plain(wide[0], exact, labels, temperature.double())
    for one, two in zip(ours, true, strict=True):
        assert (one - two).abs().max() <= 3e-5
    assert (ours[0] - policy_logprobs(hidden, head, labels, temperature)[0]).abs().max() > 1e-3
    push = torch.linspace(-1, 1, 40)
    found = torch.autograd.grad(ours, leaves(hidden, head), [push, push.flip(0)])
    expected = torch.autograd.grad(true, wide, [push.double(), push.flip(0).double()])
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32  # of the parameter, and not rounded on the way
        assert (one.double() - two).norm() <= 1e-5 * two.norm()


def test_narrow_heads_and_states_may_be_of_two_kinds() -> None:
    """Under autocast a float32 state meets a bfloat16 head, and the other way round."""
    hidden, head, labels = sample(shape=(30,), d=16, v=200, dtype=torch.bfloat16, bias=False)
    both = policy_logprobs(hidden, head, labels)
    expected = torch.autograd.grad(both[0].sum() + both[1].sum(), leaves(hidden, head))
    for states, weight in ((hidden.float(), head.weight), (hidden, head.weight.float())):
        leaf = [states.detach().requires_grad_(), weight.detach().requires_grad_()]
        mixed = policy_logprobs(leaf[0], LMHead(leaf[1]), labels, compute_dtype=torch.bfloat16)
        for one, two in zip(mixed, both, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(mixed[0].sum() + mixed[1].sum(), leaf)
        for one, two, given in zip(found, expected, leaf, strict=True):
            assert one.dtype == given.dtype
            assert (one.float() - two.float()).norm() <= 5e-3 * two.float().norm()


class TakenApart:
    """Stands for DeepSpeed's marks on a parameter that ZeRO-3 has taken apart."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.whole, self.calls = weight, weight.data, []
        weight.all_gather = self.all_gather  # type: ignore[attr-defined]
        weight.partition = self.partition  # type: ignore[attr-defined]
        self.partition([weight])

    def all_gather(self, param_list: list[Any]) -> None:
        assert [id(p) for p in param_list] == [id(self.weight)]  # once, tied or not
        self.calls.append("gather")
        self.weight.data = self.whole
        self.weight.ds_status = SimpleNamespace(name="AVAILABLE")  # type: ignore[attr-defined]

    def partition(self, param_list: list[Any]) -> None:
        self.calls.append("partition")
        self.weight.data = torch.empty(0, dtype=self.whole.dtype)
        self.weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")  # type: ignore[attr-defined]


@pytest.mark.parametrize("push", [0.0, 1.0])
def test_a_head_that_was_taken_apart_is_gathered_for_the_backward(push: float) -> None:
    """By every rank: also by one whose tokens have no gradient."""
    hidden, head, labels = sample(bias=False)
    logprobs, _ = policy_logprobs(hidden, head, labels)
    expected = torch.autograd.grad(logprobs.sum() * push, hidden)
    weight = torch.nn.Parameter(head.weight.detach().clone())
    apart = TakenApart(weight)
    with held(weight, weight):
        logprobs, _ = policy_logprobs(hidden, LMHead(weight), labels)
    assert weight.numel() == 0
    assert torch.equal(torch.autograd.grad(logprobs.sum() * push, hidden)[0], expected[0])
    assert apart.calls == ["partition", *["gather", "partition"] * 2]


def test_the_head_of_a_model_can_keep_its_parameters() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(6, 29)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

    model, (hidden, _, labels) = Model(), sample(dtype=torch.float32)
    head = LMHead.from_model(model, detach=False)
    policy_logprobs(hidden, head, labels)[0].sum().backward()
    found = model.lm_head.weight.grad
    assert found is not None
    again = LMHead(model.lm_head.weight, model.lm_head.bias)
    (expected,) = torch.autograd.grad(plain(hidden, again, labels)[0].sum(), model.lm_head.weight)
    torch.testing.assert_close(found, expected)
    assert not LMHead.from_model(model).weight.requires_grad


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"hidden": torch.ones(3, 5)}, ValueError, r"hidden must be of shape \(\.\.\., d\) with d=6"),
    ({"labels": torch.ones(3)}, TypeError, r"labels must be integers, got torch.float32. Pass"),
    ({"labels": torch.tensor([0, 29, 1])}, ValueError, r"labels must be in \[0, 29\) or ignore"),
    ({"temperature": -1.0}, ValueError, r"temperature must be positive and finite, got -1.0. P"),
    ({"backend": "tile"}, ValueError, r'backend must be "torch" for float64 inputs, got'),
    ({"compute_dtype": torch.float32}, ValueError,
     "compute_dtype must be torch.bfloat16, torch.float16 or None, got torch.float32. Cast"),
    ({"compute_dtype": torch.bfloat16}, ValueError,
     "compute_dtype must be None for float64 inputs, got torch.bfloat16. Pass float32"),
    ({"backend": "eager"}, ValueError, r"backend must be one of auto, torch, tile, triton, got"),
])  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    hidden, head, labels = sample(shape=(3,))
    with pytest.raises(error, match="policy_logprobs: " + text):
        policy_logprobs(**{"hidden": hidden, "head": head, "labels": labels, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "tile", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_on_a_gpu(dtype: torch.dtype, bound: float, bias: bool, backend: str) -> None:
    hidden, head, labels = sample(shape=(200,), bias=bias, d=64, v=5000, std=6.0, dtype=dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves(hidden, head)]
    near = [leaf.detach().cuda().requires_grad_() for leaf in leaves(hidden, head)]
    on, exact = (LMHead(*side[1:]) for side in (near, wide))
    ours = policy_logprobs(near[0], on, labels.cuda(), backend=backend)
    true = plain(wide[0], exact, labels)
    found = torch.autograd.grad(ours[0].sum() + ours[1].sum(), near)
    expected = torch.autograd.grad(true[0].sum() + true[1].sum(), wide)
    for one, two in zip(found, expected, strict=True):
        assert (one.cpu().double() - two).norm() <= bound * two.norm()
