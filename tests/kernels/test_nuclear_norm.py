"""logit_nuclear_norm against singular values of whole logits in float64, and its edges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from onlinesel.kernels import HeadGram, LMHead, logit_nuclear_norm, nuclear_norm
from onlinesel.kernels.nuclear_norm import (
    _POLAR_CUSHION,
    _POLAR_LOWER,
    _POLAR_STEPS,
    _polar_coefficients,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "uds.json").read_text())
# Relative error allowed to each method in float32.
METHODS = {"auto": 1e-6, "gram": 1e-6, "svd": 1e-6, "polar": 2e-6, "stream": 1e-6}


CASES = ["base", "steep", "deep", "mean", "duplicated", "zeros", "one", "tall", "short"]


def true_norm(hidden: Tensor, head: LMHead, rows: Tensor | None = None) -> Tensor:
    """Singular values of the logits of each sample, in float64."""
    z = head.scale * (hidden.double() @ head.weight.double().T)
    if head.bias is not None:
        z = z + head.scale * head.bias.double()
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    if rows is not None:
        z = z * rows.unsqueeze(2)
    return torch.linalg.svdvals(z).sum(1)


def relative(ours: Tensor, true: Tensor) -> float:
    return float(((ours.double() - true) / true.clamp(min=1e-30)).abs().max())


def synthetic(case: str) -> tuple[Tensor, Tensor]:
    """Hidden states and weight in bfloat16, with the spectra of the acceptance list."""
    g = torch.Generator().manual_seed(0)
    d, v, t = 96, 1500, {"one": 1, "tall": 150, "short": 8}.get(case, 64)
    power = {"steep": 1.6, "deep": 2.2}.get(case, 0.5)  # logits of condition 5e4, 4e6, 900
    steep = torch.arange(1, d + 1).double() ** -power
    hidden = torch.randn(2, t, d, generator=g).double() * steep
    weight = 0.05 * torch.randn(v, d, generator=g).double() * steep.sqrt()
    if case == "mean":
        hidden += 10 * torch.randn(d, generator=g) * steep
    if case == "duplicated":
        hidden[:, t // 2 :] = hidden[:, : t // 2]
    if case == "zeros":
        hidden[0, ::2] = hidden[1, 5:] = 0
    return hidden.bfloat16(), weight.bfloat16()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str, method: str) -> None:
    hidden, weight = synthetic(case)
    head = LMHead(weight)
    ours = logit_nuclear_norm(hidden, head, method=method)
    assert ours.dtype == torch.float32
    assert relative(ours, true_norm(hidden, head)) <= METHODS[method]


@pytest.mark.parametrize(("rows", "name"), [
    (None, "all_rows"), ("attention_mask", "unpadded_rows"), ("response_mask", "response_rows")
])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(rows: str | None, name: str, method: str, dtype: torch.dtype) -> None:
    inputs, expected = GOLDEN["inputs"], GOLDEN["expected"]
    hidden = torch.tensor(inputs["hidden"], dtype=dtype)
    head = LMHead(torch.tensor(inputs["W_lm_head"], dtype=dtype))
    mask = None if rows is None else torch.tensor(inputs[rows])
    ours = logit_nuclear_norm(hidden, head, mask, method=method)
    true = torch.tensor(expected[f"nuclear_norm_{name}"], dtype=torch.float64)
    limit = 2e-5 if dtype == torch.float32 else 1e-9 if method != "polar" else 1e-6
    assert ours.dtype == dtype and relative(ours, true) <= limit


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("time", [5, 30])
def test_bias_scale_and_garbage_rows(method: str, bias: bool, scale: float, time: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, time, 12, generator=g)
    rows = torch.rand(3, time, generator=g) < 0.6
    rows[0], rows[1, 1:] = True, False
    offset = torch.randn(40, generator=g) if bias else None
    head = LMHead(torch.randn(40, 12, generator=g), offset, scale)
    true = true_norm(hidden, head, rows)
    garbage = hidden.masked_fill(~rows.unsqueeze(2), math.nan)
    assert relative(logit_nuclear_norm(garbage, head, rows, method=method), true) <= 3e-6
    if bias:
        assert relative(logit_nuclear_norm(hidden, LMHead(head.weight), rows), true) > 1e-3


def test_softcap_is_streamed_and_matters() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8, generator=g), torch.randn(5000, 8, generator=g)
    head = LMHead(weight, torch.randn(5000, generator=g), 0.7, 2.0)
    rows = torch.arange(9) < torch.tensor([[9], [4]])
    ours, true = logit_nuclear_norm(hidden, head, rows), true_norm(hidden, head, rows)
    assert relative(ours, true) <= 1e-6
    linear = logit_nuclear_norm(hidden, LMHead(weight, head.bias, 0.7), rows)
    assert relative(linear, true) > 0.05
    for method in ("gram", "svd", "polar"):
        with pytest.raises(ValueError, match=r'method must be "stream" or "auto" under a soft cap'):
            logit_nuclear_norm(hidden, head, rows, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_sample_stays_alone(method: str, bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 5, 8, generator=g), LMHead(torch.randn(20, 8, generator=g))
    clean = logit_nuclear_norm(hidden, head, method=method)
    hidden[1, 2, 3] = bad
    ours = logit_nuclear_norm(hidden, head, method=method)
    assert ours[1].isnan() and torch.equal(ours[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_measure(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(20, 8, generator=g), torch.randn(20, generator=g))
    hidden = torch.randn(2, 4, 8, generator=g)
    rows = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1]])
    ours = logit_nuclear_norm(hidden, head, rows, method=method)
    assert ours[0] == 0 and ours[1] > 0
    assert logit_nuclear_norm(hidden[:0], head, method=method).shape == (0,)
    zero = LMHead(head.weight)
    assert (logit_nuclear_norm(torch.zeros(2, 4, 8), zero, method=method) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_vocabulary_below_the_width_has_a_singular_gram(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 20, 8, generator=g), LMHead(torch.randn(3, 8, generator=g))
    ours = logit_nuclear_norm(hidden, head, method=method)
    assert relative(ours, true_norm(hidden, head)) <= 2e-5
    zero = logit_nuclear_norm(hidden, LMHead(torch.zeros(3, 8)), method=method)
    assert (zero.abs() < 1e-6).all()


def test_a_nan_in_the_weight_gives_nan() -> None:
    weight = torch.ones(5, 2)
    weight[1, 1] = math.nan
    for method in METHODS:
        assert logit_nuclear_norm(torch.ones(1, 3, 2), LMHead(weight), method=method).isnan().all()


@given(t=st.integers(1, 12), d=st.integers(1, 8), v=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_laws(t: int, d: int, v: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, t, d, generator=g, dtype=torch.float64)
    head = LMHead(torch.randn(v, d, generator=g, dtype=torch.float64))
    norm = logit_nuclear_norm(hidden, head)
    frobenius = head.logits(hidden).norm()
    assert frobenius * (1 - 1e-9) <= norm <= math.sqrt(min(t, d, v)) * frobenius * (1 + 1e-6)
    shuffled = hidden[:, torch.randperm(t, generator=g)]
    torch.testing.assert_close(logit_nuclear_norm(shuffled, head), norm, rtol=1e-6, atol=1e-9)
    padded = torch.cat((hidden, torch.zeros(1, 3, d).double()), 1)
    torch.testing.assert_close(logit_nuclear_norm(padded, head), norm, rtol=1e-6, atol=1e-6)


def test_the_gram_is_kept_until_invalidated() -> None:
    weight, hidden = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
    head = LMHead(weight)
    gram = HeadGram(head)
    assert logit_nuclear_norm(hidden, head, gram=gram) == 3.0
    weight.mul_(2.0)
    assert logit_nuclear_norm(hidden, head, gram=gram) == 3.0  # by contract: nothing is detected
    gram.invalidate()
    assert logit_nuclear_norm(hidden, head, gram=gram) == 6.0
    other = LMHead(3.0 * weight)
    gram.invalidate(other)
    assert gram.head is other and logit_nuclear_norm(hidden, other, gram=gram) == 18.0


def test_the_gram_follows_an_optimizer() -> None:
    weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
    hidden = torch.eye(3, dtype=torch.float64)[None]
    head = LMHead(weight.detach())
    gram, optimizer = HeadGram(head), torch.optim.SGD([weight], lr=1.0)
    handle = gram.follow(optimizer, every=2)
    found = []
    for step in range(6):
        found.append(float(logit_nuclear_norm(hidden, head, gram=gram)))
        weight.grad = -torch.eye(3, dtype=torch.float64)
        if step == 4:
            handle.remove()
        optimizer.step()
    assert found == pytest.approx([3.0, 3.0, 9.0, 9.0, 15.0, 15.0])  # before steps 1 to 6
    assert float(logit_nuclear_norm(hidden, head, gram=gram)) == pytest.approx(15.0)
    with pytest.raises(ValueError, match="HeadGram.follow: every must be at least 1, got 0. Pass"):
        gram.follow(optimizer, every=0)


def test_autocast_does_not_reach_the_products() -> None:
    hidden, weight = synthetic("base")
    head = LMHead(weight.float())
    plain = logit_nuclear_norm(hidden.float(), head, method="polar")
    with torch.autocast("cpu", torch.bfloat16):
        ours = logit_nuclear_norm(hidden.float().requires_grad_(), head, method="polar")
    assert torch.equal(ours, plain) and not ours.requires_grad


def test_polar_takes_fewer_products_where_float64_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for doubles in (False, True):
        monkeypatch.setattr(nuclear_norm, "_doubles", lambda device, answer=doubles: answer)
        for shape in ((2, 8, 32), (2, 8, 11)):  # wide, and nearly square
            matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            with FlopCounterMode(display=False) as counted:
                norms = nuclear_norm._polar(matrices)
            assert relative(norms, torch.linalg.svdvals(matrices.double()).sum(1)) <= 2e-6
            counts.append(counted.get_total_flops())
    square, steps = 2 * 2 * 8**3, _POLAR_STEPS
    assert counts[0] == steps * (2 * square * 32 / 8 + square)
    assert counts[2] == square * 32 / 8 + (4 * steps - 3) * square < counts[0] / 2
    assert counts[1] == counts[3]


def test_polar_steps_take_singular_values_to_one() -> None:
    for steps, lower in ((_POLAR_STEPS, _POLAR_LOWER), (10, 1e-4)):
        x = torch.logspace(math.log10(lower), 0, 4000, dtype=torch.float64) / 1.01
        large = x > _POLAR_CUSHION
        for a, b, c in _polar_coefficients(steps, lower):
            x = x * (a + b * x**2 + c * x**4)
            # No step takes a large one close to 0, where rounding would turn its direction.
            assert x.min() > 0 and x.max() < 2.01 and x[large].min() > 0.15
        assert (x - 1).abs().max() < 2e-7


@pytest.mark.parametrize("doubles", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("power", [0.5, 1.6])
@pytest.mark.parametrize(("d", "t"), [(512, 128), (384, 700)])
def test_polar_accuracy_at_size(
    d: int, t: int, power: float, doubles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nuclear_norm, "_doubles", lambda device: doubles)
    g = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, d + 1).double() ** -power  # 1.6: condition 1e6 and 5e6
    hidden = (torch.randn(1, t, d, generator=g).double() * spectrum).bfloat16()
    weight = 0.05 * torch.randn(2000, d, generator=g).double() * spectrum.sqrt()
    head = LMHead(weight.bfloat16())
    true = true_norm(hidden, head)
    assert relative(logit_nuclear_norm(hidden, head, method="polar"), true) <= 2e-6


@pytest.mark.parametrize(("change", "text"), [
    ({"hidden": torch.ones(4, 3)},
     r"logit_nuclear_norm: hidden must be of shape \(batch, time, d\) with d=3, got \(4, 3\)."),
    ({"rows": torch.ones(2, 3)},
     r"logit_nuclear_norm: rows must be of shape \(1, 4\), got \(2, 3\). Pass a \(batch, time\)"),
    ({"method": "fast"}, r"logit_nuclear_norm: method must be one of auto, .*, got 'fast'. Pass"),
    ({"gram": HeadGram(LMHead(torch.ones(4, 2)))},
     r"logit_nuclear_norm: gram must be of this head, of size 3, got 2. Build HeadGram"),
])  # fmt: skip
def test_errors(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        logit_nuclear_norm(
            **{"hidden": torch.ones(1, 4, 3), "head": LMHead(torch.ones(5, 3)), **change}
        )
