"""token_scores against its definition in float64, and its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.kernels import LMHead, TokenScores, shift_labels, token_scores

NUMBERS = ("nll", "entropy", "el2n", "sum_sq", "margin")


def naive(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: Tensor | None = None
) -> dict[str, Tensor]:
    """The definitions, in float64, on whole logits. All labels must count."""
    z = head.scale * (hidden.double() @ head.weight.double().T)
    if head.bias is not None:
        z = z + head.scale * head.bias.double()
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    if temperature is not None:
        z = z / temperature.double().unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    at = labels.unsqueeze(-1)
    onehot = torch.zeros_like(p).scatter_(-1, at, 1.0)
    others = z.scatter(-1, at, -torch.inf).amax(-1)
    return {
        "z": z,
        "nll": -log_p.gather(-1, at).squeeze(-1),
        "entropy": -(p * log_p.clamp(min=-1e9)).sum(-1),
        "el2n": (p - onehot).norm(dim=-1),
        "sum_sq": p.square().sum(-1),
        "margin": z.gather(-1, at).squeeze(-1) - others,
        "p": p.gather(-1, at).squeeze(-1),
    }


def sample(
    n: int, d: int, v: int, *, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LMHead, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * std / d**0.5).to(dtype)
    return hidden, LMHead(weight), torch.randint(0, v, (n,), generator=g)


@pytest.mark.parametrize("std", [2.0, 7.0, 14.0])
def test_accuracy_on_bfloat16_inputs(std: float) -> None:
    hidden, head, labels = sample(192, 96, 5000, std=std, dtype=torch.bfloat16)
    true = naive(hidden, head, labels)
    best = true["z"].argmax(-1)
    labels = torch.where(torch.arange(192) % 2 == 0, best, labels)  # half of them confident
    true = naive(hidden, head, labels)
    out = token_scores(hidden, head, labels)
    top = float(true["z"].abs().max())
    assert out.nll is not None and out.entropy is not None and out.el2n is not None
    assert out.nll.dtype == torch.float32
    assert (out.nll - true["nll"]).abs().max() <= 2e-5 + 1e-6 * top
    assert (out.entropy - true["entropy"]).abs().max() <= 3e-5
    kept = true["p"] < 1 - 1e-6
    assert ((out.el2n - true["el2n"]) / true["el2n"])[kept].abs().max() <= 1e-4
    clear = true["margin"].abs() > 1e-4
    assert out.top1 is not None and torch.equal(out.top1[clear], (true["margin"] >= 0)[clear])


def test_errors_a_hundred_times_below_those_of_bfloat16_logits() -> None:
    # What a head does that rounds its tile of logits to the dtype of the model before it sums.
    hidden, head, labels = sample(192, 96, 5000, std=7.0, dtype=torch.bfloat16)
    true, out = naive(hidden, head, labels), token_scores(hidden, head, labels)
    log_p = torch.log_softmax(true["z"].bfloat16().float(), -1)
    rounded = {
        "nll": -log_p.gather(1, labels.unsqueeze(1)).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
    }
    for name, theirs in rounded.items():
        ours = (getattr(out, name) - true[name]).abs()
        assert ours.max() * 100 <= (theirs - true[name]).abs().max()
        assert ours.mean() * 100 <= (theirs - true[name]).abs().mean()


@pytest.mark.parametrize("vocab_chunk", [1, 7, 64, 129, None])
@pytest.mark.parametrize("token_chunk", [1, 5, None])
def test_chunks_do_not_matter(vocab_chunk: int | None, token_chunk: int | None) -> None:
    hidden, head, labels = sample(11, 8, 129, std=5.0)
    whole = token_scores(hidden, head, labels, vocab_chunk=129, token_chunk=11)
    parts = token_scores(hidden, head, labels, vocab_chunk=vocab_chunk, token_chunk=token_chunk)
    true = naive(hidden, head, labels)
    for name in NUMBERS:
        ours = getattr(parts, name)
        torch.testing.assert_close(ours, getattr(whole, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double(), true[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(parts.top1, whole.top1)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bias_scale_and_softcap_in_float64(bias: bool, scale: float, softcap: float | None) -> None:
    hidden, head, labels = sample(6, 5, 23, std=3.0, dtype=torch.float64)
    offset = torch.linspace(-2, 2, 23).double() if bias else None
    head = LMHead(head.weight, offset, scale, softcap)
    out, true = token_scores(hidden, head, labels, vocab_chunk=10), naive(hidden, head, labels)
    for name in NUMBERS:
        torch.testing.assert_close(getattr(out, name), true[name], rtol=1e-11, atol=1e-12)


@given(
    n=st.integers(1, 9), d=st.integers(1, 6), v=st.integers(2, 40), chunk=st.integers(1, 45),
    std=st.sampled_from([0.0, 0.1, 3.0, 50.0]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_laws(n: int, d: int, v: int, chunk: int, std: float, seed: int) -> None:
    hidden, head, labels = sample(n, d, v, std=std, seed=seed)
    out, true = token_scores(hidden, head, labels, vocab_chunk=chunk), naive(hidden, head, labels)
    top = float(true["z"].abs().max())
    for name in NUMBERS:
        error = (getattr(out, name) - true[name]).abs().max()
        assert error <= 3e-5 + 2e-6 * top, name
    assert out.nll is not None and out.entropy is not None
    assert out.el2n is not None and out.sum_sq is not None
    assert (out.nll >= 0).all() and (out.entropy >= 0).all()
    assert (out.entropy <= math.log(v) * (1 + 1e-5) + 1e-5).all()
    assert (out.el2n >= 0).all() and (out.el2n <= 2**0.5 + 1e-5).all()
    assert (out.sum_sq >= 1 / v - 1e-5).all() and (out.sum_sq <= 1 + 1e-5).all()


def test_no_cancellation_when_the_label_is_certain() -> None:
    # Logits (a, 0, 0): with a = 30, 1 - p is about 2e-13, which float32 cannot tell from 0.
    head = LMHead(torch.tensor([[1.0], [0.0], [0.0]]))
    hidden = torch.tensor([[10.0], [30.0], [60.0], [80.0]])
    labels = torch.zeros(4, dtype=torch.long)
    true, out = naive(hidden, head, labels), token_scores(hidden, head, labels, vocab_chunk=2)
    rest = 2 * torch.exp(-hidden[:, 0].double())
    torch.testing.assert_close(out.nll, torch.log1p(rest).float(), rtol=1e-5, atol=0)
    exact = rest / (1 + rest) * math.sqrt(1.5)
    torch.testing.assert_close(out.el2n, exact.float(), rtol=1e-5, atol=0)
    plain = torch.logsumexp(head.logits(hidden), 1) - hidden[:, 0]
    assert plain[1] == 0.0 and true["nll"][1] > 0  # what the formula is there for
    assert out.entropy is not None and (out.entropy[:3] > out.nll[:3]).all()  # type: ignore[index]


def test_logits_in_the_thousands() -> None:
    hidden, head, labels = sample(20, 8, 50, std=1.0)
    head = LMHead(head.weight, scale=3000.0)
    true, out = naive(hidden, head, labels), token_scores(hidden, head, labels, vocab_chunk=16)
    assert true["z"].abs().max() > 3000
    for name in NUMBERS:
        ours = getattr(out, name)
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), true[name], rtol=1e-5, atol=3e-3)


def test_minus_infinity_in_the_bias_is_a_removed_entry() -> None:
    hidden, head, labels = sample(7, 4, 12, std=2.0)
    bias = torch.zeros(15)
    bias[12:] = -torch.inf
    weight = torch.cat((head.weight, torch.ones(3, 4)))
    expected = token_scores(hidden, head, labels)
    for chunk in (2, 3, None):  # 3: a part with no finite entry
        out = token_scores(hidden, LMHead(weight, bias), labels, vocab_chunk=chunk)
        for name in NUMBERS:
            torch.testing.assert_close(getattr(out, name), getattr(expected, name))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chunk", [3, None])
def test_a_bad_row_stays_alone(bad: float, chunk: int | None) -> None:
    hidden, head, labels = sample(6, 4, 10)
    clean = token_scores(hidden, head, labels, vocab_chunk=chunk)
    hidden[2, 1] = bad
    out = token_scores(hidden, head, labels, vocab_chunk=chunk)
    others = torch.arange(6) != 2
    for name in ("nll", "entropy", "el2n", "sum_sq"):
        assert not torch.isfinite(getattr(out, name)[2])
        assert torch.equal(getattr(out, name)[others], getattr(clean, name)[others])


def test_ignored_tokens_are_zero_and_not_read() -> None:
    hidden, head, labels = sample(6, 4, 10)
    hidden, labels = hidden.reshape(2, 3, 4).clone(), labels.reshape(2, 3)
    full = token_scores(hidden, head, labels)
    labels = labels.clone()
    labels[0, 1] = labels[1, 2] = -1
    hidden[0, 1] = math.nan
    out = token_scores(hidden, head, labels, ignore_index=-1)
    assert torch.equal(out.mask, labels != -1)
    for name in (*NUMBERS, "top1"):
        ours = getattr(out, name)
        assert torch.equal(ours[out.mask], getattr(full, name)[out.mask])
        assert (ours[~out.mask] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_nothing_to_score(shape: tuple[int, ...]) -> None:
    head = LMHead(torch.ones(5, 4))
    out = token_scores(torch.ones(*shape, 4), head, torch.full(shape, -100))
    assert out.nll is not None and out.nll.shape == shape and out.nll.dtype == torch.float32
    assert out.top1 is not None and out.top1.dtype == torch.bool and not out.mask.any()


def test_only_the_outputs_asked_for() -> None:
    hidden, head, labels = sample(3, 4, 10)
    out, full = (
        token_scores(hidden, head, labels, outputs=("el2n",)),
        token_scores(hidden, head, labels),
    )
    assert torch.equal(out.el2n, full.el2n)  # type: ignore[arg-type]
    assert [name for name in TokenScores._fields if getattr(out, name) is not None] == [
        "mask",
        "el2n",
    ]


def test_no_autograd_and_no_autocast() -> None:
    hidden, head, labels = sample(32, 64, 100, std=5.0)
    plain = token_scores(hidden, head, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_scores(hidden.requires_grad_(), head, labels)
    assert torch.equal(cast.nll, plain.nll)  # type: ignore[arg-type]
    assert cast.nll is not None and not cast.nll.requires_grad


def test_a_tie_counts_as_top() -> None:
    out = token_scores(torch.ones(1, 1), LMHead(torch.ones(3, 1)), torch.tensor([2]))
    assert out.top1 is not None and out.top1.all() and out.margin == torch.zeros(1)


def test_shift_labels() -> None:
    labels = torch.tensor([[5, 6, 7], [1, 2, 3]])
    assert shift_labels(labels, ignore_index=-1).tolist() == [[6, 7, -1], [2, 3, -1]]
    assert labels.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert shift_labels(labels[:, :0]).shape == (2, 0)
    with pytest.raises(ValueError, match="shift_labels: labels must have a time dimension"):
        shift_labels(torch.tensor(1))


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"hidden": torch.ones(3, 5)}, ValueError,
     r"token_scores: hidden must be of shape \(\.\.\., d\) with d=4, got \(3, 5\). Pass the"),
    ({"hidden": torch.ones(3, 4).long()}, TypeError,
     r"token_scores: hidden must be floating point, got torch.int64. Pass the"),
    ({"labels": torch.ones(2).long()}, ValueError,
     r"token_scores: labels must be of shape \(3,\), got \(2,\). Align"),
    ({"labels": torch.ones(3)}, TypeError,
     r"token_scores: labels must be integers, got torch.float32. Pass token ids"),
    ({"labels": torch.tensor([1, 10, 2])}, ValueError,
     r"token_scores: labels must be in \[0, 10\) or ignore_index, got a label 10. Check"),
    ({"labels": torch.tensor([1, -1, 2])}, ValueError, r"got a label -1. Check"),
    ({"outputs": ("nll", "perplexity")}, ValueError,
     r"token_scores: outputs must be a sequence of names among nll, .*, got \('nll', 'perp"),
    ({"outputs": "nll"}, ValueError, r"got 'nll'. Remove"),
    ({"vocab_chunk": 0}, ValueError, r"token_scores: vocab_chunk must be at least 1, got 0. Pass"),
    ({"token_chunk": -1}, ValueError, r"token_scores: token_chunk must be at least 1, got -1."),
])  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    hidden, head, labels = sample(3, 4, 10)
    with pytest.raises(error, match=text):
        token_scores(**{"hidden": hidden, "head": head, "labels": labels, **change})
