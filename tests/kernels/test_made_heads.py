"""Every kernel over quantised heads and heads with adapters, which are never whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onlinesel.kernels import (
    HeadGram,
    JLProjector,
    LMHead,
    LowRank,
    TokenScores,
    logit_nuclear_norm,
    policy_logprobs,
    token_scores,
)
from onlinesel.kernels._backend import Measured, choose_backend
from tests.kernels.made_heads import Int8Rows, in_memory, made_head
from tests.kernels.no_logits import LargestTensor
from tests.kernels.test_token_scores import NUMBERS, naive

KINDS = ("rows", "lora", "qlora")
SHAPES = [(False, 1.0, None), (True, -0.5, None), (True, 1.5, 3.0)]
everywhere = pytest.mark.parametrize("kind", KINDS)
shaped = pytest.mark.parametrize(("bias", "scale", "softcap"), SHAPES)


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def labels(*shape: int, v: int = 61) -> Tensor:
    return torch.randint(0, v, shape, generator=torch.Generator().manual_seed(2))


@everywhere
@shaped
def test_token_scores(kind: str, bias: bool, scale: float, softcap: float | None) -> None:
    head = made_head(kind, bias=bias, scale=scale, softcap=softcap)
    hidden, targets = states(12, 10), labels(12)
    true = naive(hidden, in_memory(head), targets)
    torch.testing.assert_close(head.logits(hidden), true["z"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        head.part(20, 99).logits(hidden), true["z"][:, 20:], rtol=1e-12, atol=1e-12
    )
    for chunk in (7, None):
        out = token_scores(hidden, head, targets, vocab_chunk=chunk, token_chunk=5)
        for name in NUMBERS:
            torch.testing.assert_close(getattr(out, name), true[name], rtol=1e-10, atol=1e-11)


@everywhere
@shaped
def test_nuclear_norm_and_projection(
    kind: str, bias: bool, scale: float, softcap: float | None
) -> None:
    head = made_head(kind, bias=bias, scale=scale, softcap=softcap)
    hidden = states(2, 8, 10)
    z = in_memory(head).logits(hidden)
    true = torch.linalg.svdvals(z).sum(1)
    methods = ("stream",) if softcap else ("gram", "svd", "polar", "stream")
    for method in methods:
        ours = logit_nuclear_norm(hidden, head, method=method)
        torch.testing.assert_close(ours, true, rtol=2e-6 if method == "polar" else 1e-8, atol=0)
    projector = JLProjector(61, 8, vocab_dim=6, time_dim=3)
    expected = projector.project(z, LMHead(torch.eye(61).double()))  # the logits themselves
    folds = [head] if softcap else [head, projector.fold(head)]
    for fold in folds:
        torch.testing.assert_close(projector.project(hidden, fold), expected, rtol=1e-10, atol=1e-9)


@everywhere
@shaped
@pytest.mark.parametrize("temperature", [None, 0.6])
def test_policy_logprobs_and_its_gradients(
    kind: str, bias: bool, scale: float, softcap: float | None, temperature: float | None
) -> None:
    head = made_head(kind, bias=bias, scale=scale, softcap=softcap)
    hidden, targets = states(9, 10).requires_grad_(), labels(9)
    wanted = [hidden, *(x.requires_grad_() for low in head.low_rank for x in (low.a, low.b))]
    wanted += [] if head.bias is None else [head.bias.requires_grad_()]
    if kind == "lora":
        wanted.append(head.base.requires_grad_())  # type: ignore[union-attr, arg-type]
    ours = policy_logprobs(hidden, head, targets, temperature, vocab_chunk=17, token_chunk=4)
    exact = naive(hidden, in_memory(head), targets, states(1) * 0 + (temperature or 1.0))
    true = -exact["nll"], exact["entropy"]
    push = [states(9, seed=3), states(9, seed=4)]
    for used in ((0,), (1,), (0, 1)):
        found, expected = (
            torch.autograd.grad(
                [side[i] for i in used], wanted, [push[i] for i in used], retain_graph=True
            )
            for side in (ours, true)
        )
        for i in used:
            torch.testing.assert_close(ours[i], true[i], rtol=1e-12, atol=1e-12)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_tokens_without_gradient_and_frozen_factors_cost_nothing() -> None:
    head = made_head("lora")
    hidden, targets = states(9, 10).requires_grad_(), labels(9)
    logprobs, _ = policy_logprobs(hidden, head, targets)
    logprobs[4].backward()
    assert hidden.grad is not None and (hidden.grad.abs().sum(1) > 0).nonzero().tolist() == [[4]]
    low = head.low_rank[0]
    assert low.a.grad is None
    low.b.requires_grad_()
    zero = torch.autograd.grad(policy_logprobs(hidden, head, targets)[0].sum() * 0.0, low.b)
    assert (zero[0] == 0).all() and zero[0].shape == low.b.shape


def test_bfloat16_bases_under_float32_adapters() -> None:
    # What PEFT makes of a bfloat16 model: the sum would need float32, and is never rounded.
    head = made_head(
        "lora", v=500, d=32, std=6.0, dtype=torch.bfloat16, thin=torch.float32, bias=True
    )
    wide, hidden, targets = in_memory(head, torch.float64), states(40, 32), labels(40, v=500)
    hidden = hidden.bfloat16()
    assert head.weight.dtype == torch.float32 and head.accumulation_dtype(hidden) == torch.float32
    true = naive(hidden, wide, targets)
    out = token_scores(hidden, head, targets)
    top = float(true["z"].abs().max())
    assert out.nll is not None and (out.nll - true["nll"]).abs().max() <= 2e-5 + 1e-6 * top
    rounded = LMHead(wide.weight.bfloat16(), wide.bias)
    worse = token_scores(hidden, rounded, targets).nll
    assert worse is not None and (worse - true["nll"]).abs().max() > 1e-2
    for kind in (None, torch.bfloat16):
        logprobs, _ = policy_logprobs(hidden, head, targets, compute_dtype=kind)
        assert (logprobs + true["nll"]).abs().max() <= 2e-5 + 1e-6 * top


class Calls:
    """What is done with a head, for the tests of what it costs."""

    def __init__(self, v: int) -> None:
        self.hidden, self.targets = states(2, 4, 32).float(), labels(2, 4, v=v)
        self.projector = JLProjector(v, 4, vocab_dim=4, time_dim=2)

    def all(self) -> dict[str, Callable[[LMHead], object]]:
        return {
            "token_scores": lambda head: token_scores(self.hidden, head, self.targets),
            "policy": self.policy,
            "gram": lambda head: HeadGram(head).root(),
            "stream": lambda head: logit_nuclear_norm(self.hidden, head, method="stream"),
            "fold": lambda head: self.projector.fold(head),
            "project": lambda head: self.projector.project(self.hidden, head),
        }

    def policy(self, head: LMHead) -> None:
        hidden = self.hidden.clone().requires_grad_()
        for low in head.low_rank:
            low.a.requires_grad_(), low.b.requires_grad_()
        policy_logprobs(hidden, head, self.targets)[0].sum().backward()


@everywhere
@pytest.mark.parametrize("name", Calls(2).all())
def test_no_kernel_makes_the_whole_weight(kind: str, name: str) -> None:
    v = 20_000
    head = made_head(kind, v=v, d=32, dtype=torch.float32)
    with LargestTensor() as seen:
        Calls(v).all()[name](head)
    # A tile of weight or logits; and D b, H a^T and the gradient of b, as thin as the adapter.
    assert 0 < seen.numel <= 4096 * 36 + 3 * v, seen.where
    if isinstance(head.base, Int8Rows):
        assert 0 < head.base.longest <= 4096


def test_writing_the_weight_out_would_be_seen() -> None:
    head = made_head("qlora", v=20_000, d=32, dtype=torch.float32)
    with LargestTensor() as seen:
        in_memory(head)
    assert seen.numel == 20_000 * 32


@everywhere
def test_the_fused_kernel_is_refused_and_never_chosen(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, hidden, targets = made_head(kind), states(3, 10), labels(3)
    text = (
        r'backend must be "auto", "tile" or "torch" for a head that is quantised or has adapters, '
        "got 'triton'. The fused kernel reads a weight in memory: merge"
    )
    with pytest.raises(ValueError, match="token_scores: " + text):
        token_scores(hidden, head, targets, backend="triton")
    with pytest.raises(ValueError, match="policy_logprobs: " + text):
        policy_logprobs(hidden, head, targets, backend="triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("onlinesel.kernels._backend._TRITON", True)
    table = [Measured((9, 0), torch.bfloat16, 4096, "triton")]
    given: Any = ("f", "auto", torch.device("cuda"), torch.bfloat16, 896, table)
    assert choose_backend(*given) == "triton"
    assert choose_backend(*given, tiled=True) == "tile"


def gram_error(gram: HeadGram, head: LMHead) -> float:
    weight = in_memory(head, torch.float64)
    columns = weight.weight
    if weight.bias is not None:
        columns = torch.cat((columns, weight.bias.unsqueeze(1)), 1)
    true, root = columns.T @ columns, gram.root().double()
    return float((root.T @ root - true).norm() / true.norm())


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("bias", [False, True])
def test_under_moving_adapters_the_gram_of_a_frozen_base_is_kept(kind: str, bias: bool) -> None:
    head = made_head(kind, v=3000, d=40, bias=bias, frozen=True)
    gram, extra = HeadGram(head), 4 + bias
    costs = []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            assert gram_error(gram, head) < 1e-13
        costs.append(counter.flop_counts["Global"][torch.ops.aten.mm])
        gram.invalidate()
        for low in head.low_rank:
            low.a.add_(0.3), low.b.mul_(-1.2)
        if head.bias is not None:
            head.bias.add_(1.0)
    saved = 2 * 3000 * (40 + extra) * 40  # [W, B, b]^T W is not multiplied again
    assert costs[1] == costs[2] == costs[0] - saved
    gram.invalidate(head)  # a head that is given is another one
    with FlopCounterMode(display=False) as counter:
        gram_error(gram, head)
    assert counter.flop_counts["Global"][torch.ops.aten.mm] == costs[0]


def test_the_gram_of_a_base_that_trains_is_not_kept() -> None:
    head = made_head("lora", v=300)
    gram = HeadGram(head)
    assert gram_error(gram, head) < 1e-13
    head.base.mul_(1.5)  # type: ignore[union-attr]
    gram.invalidate()
    assert gram_error(gram, head) < 1e-13


def test_the_form_of_a_made_head() -> None:
    head = made_head("qlora", bias=True, scale=0.5)
    assert head.weight.is_meta and (head.vocab_size, head.hidden_size) == (61, 10)
    outline = head.outline()
    assert outline.made is None and outline.weight.is_meta and outline.scale == 0.5
    assert head.whole() is head and head.device == torch.device("cpu")
    plain = torch.ones(3, 2)
    assert LMHead.from_rows(plain).weight is plain


def short(start: int, stop: int) -> Tensor:
    return torch.ones(stop - start, 3)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"base": torch.ones(4)}, ValueError,
     r"LMHead.from_rows: base must be a non-empty \(V, d\) matrix, got shape \(4,\). Gather"),
    ({"base": Int8Rows(torch.ones(3, 2).char(), torch.ones(3).int())}, TypeError,
     r"LMHead.from_rows: base must give floating point rows, got torch.int32. Pass a source"),
    ({"low_rank": [LowRank(torch.ones(1, 2), torch.ones(2, 1))]}, ValueError,
     r"LMHead.from_rows: low_rank must hold a of shape \(r, 2\) and b of shape \(3, r\), got "
     r"\(1, 2\) and \(2, 1\). Pass the factors"),
    ({"scale": 0.0}, ValueError, "LMHead: scale must be finite and not zero, got 0.0"),
])  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LMHead.from_rows(**{"base": torch.ones(3, 2), **change})


def test_a_source_that_gives_other_rows_is_refused() -> None:
    source = Int8Rows(torch.ones(5, 4).char(), torch.ones(5))
    source.rows = short  # type: ignore[method-assign]
    with pytest.raises(
        ValueError,
        match=r"RowSource: rows\(0, 5\) must give shape \(5, 4\), got \(5, 3\) from Int8R",
    ):
        token_scores(torch.ones(1, 4), LMHead.from_rows(source), torch.tensor([1]))


class Scored(nn.Module):
    """A model in as much as LMHead.from_model looks at it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.lm_head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def scores(self, hidden: Tensor, targets: Tensor) -> TokenScores:
        return token_scores(hidden, LMHead.from_model(self), targets)


@pytest.mark.parametrize(("weight", "found"), [
    (torch.ones(6, 4).char(), "Tensor of torch.int8 in Scored"),
    (torch.ones(6, 4).to(torch.float8_e4m3fn), "Tensor of torch.float8_e4m3fn in Scored"),
    (None, "NoneType in Scored"),
    (torch.ones, "builtin_function_or_method in Scored"),
])  # fmt: skip
def test_an_unknown_quantisation_is_refused(weight: Any, found: str) -> None:
    layer = Scored(nn.Identity())
    layer.weight = weight
    with pytest.raises(TypeError, match=(
        "LMHead.from_model: weight of the head must be floating point, or quantised by "
        f"bitsandbytes or torchao, got {found}. Keep the head out of the quantisation, or pass an"
    )):  # fmt: skip
        LMHead.from_model(Scored(layer))
