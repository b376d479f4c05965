"""JLProjector against the explicit matrices, the golden vectors, and its edges."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.kernels import JLProjector, LMHead
from tests.kernels.test_nuclear_norm import CASES, synthetic

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "uds.json").read_text())
INPUTS, EXPECTED = GOLDEN["inputs"], GOLDEN["expected"]


def golden(dtype: torch.dtype) -> tuple[Tensor, LMHead, JLProjector]:
    projector = JLProjector(
        vocab=50, time=16, vocab_dim=5, time_dim=3,
        signs_vocab=torch.tensor(INPUTS["sign_vocab_d2"]),
        index_vocab=torch.tensor(INPUTS["idx_vocab_idx2"]),
        signs_time=torch.tensor(INPUTS["sign_time_d1"]),
        index_time=torch.tensor(INPUTS["idx_time_idx1"]),
    )  # fmt: skip
    hidden = torch.tensor(INPUTS["hidden"], dtype=dtype)
    return hidden, LMHead(torch.tensor(INPUTS["W_lm_head"], dtype=dtype)), projector


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("masked", "compact", "name"), [
    (False, True, "all_rows"), (False, False, "all_rows"),
    (True, False, "padded_rows_zeroed"), (True, True, "left_compacted"),
])  # fmt: skip
def test_golden(
    dtype: torch.dtype, limit: float, streamed: bool, masked: bool, compact: bool, name: str
) -> None:
    hidden, head, projector = golden(dtype)
    rows = torch.tensor(INPUTS["attention_mask"]) if masked else None
    folded = head if streamed else projector.fold(head)
    ours = projector.project(hidden, folded, rows, compact=compact)
    true = torch.tensor(EXPECTED[f"projection_{name}"], dtype=torch.float64)
    assert ours.dtype == dtype and ours.shape == (4, projector.size)
    assert float((ours - true).norm() / true.norm()) <= limit


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_accuracy_on_bfloat16_inputs(case: str, bias: bool) -> None:
    hidden, weight = synthetic(case)
    offset = torch.linspace(-1, 1, 1500).bfloat16() if bias else None
    projector, head = JLProjector(1500, 200, vocab_dim=16), LMHead(weight, offset, scale=-0.7)
    z = -0.7 * (hidden.double() @ weight.double().T + (0 if offset is None else offset.double()))
    true = explicit(projector, z)
    for folded in (projector.fold(head), head):
        ours = projector.project(hidden, folded)
        assert ours.dtype == torch.float32
        assert float((ours - true).norm() / true.norm()) <= 2e-6


def test_golden_matrices() -> None:
    _, _, projector = golden(torch.float64)
    right = projector.fold(LMHead(torch.eye(50, dtype=torch.float64)))  # W^T P = P
    torch.testing.assert_close(
        right, torch.tensor(EXPECTED["M2_vocab"]).double(), rtol=0, atol=1e-6
    )
    one = JLProjector(
        1, 16, vocab_dim=1, time_dim=3, signs_vocab=torch.ones(1), index_vocab=torch.zeros(1),
        signs_time=projector.signs_time, index_time=projector.index_time,
    )  # fmt: skip
    states = torch.eye(16, dtype=torch.float64).unsqueeze(2)  # sample t is a one at place t
    left = one.project(states, torch.ones(1, 1).double(), compact=False)
    torch.testing.assert_close(left, torch.tensor(EXPECTED["M1_time"]).double(), rtol=0, atol=1e-6)


def explicit(projector: JLProjector, logits: Tensor) -> Tensor:
    """vec(Q^T Z P) with the matrices written out entry by entry."""

    def side(signs: Any, index: Any) -> Tensor:
        n, r = len(signs), len(index)
        return torch.tensor([
            [int(signs[i]) * math.cos(2 * math.pi * (i * int(k) % n) / n) * math.sqrt(n / r)
             for k in index] for i in range(n)
        ], dtype=torch.float64)  # fmt: skip

    q = side(projector.signs_time, projector.index_time)[: logits.shape[1]]
    p = side(projector.signs_vocab, projector.index_vocab)
    unit = 2 / math.sqrt(projector.vocab * projector.time) if projector.scale == "unit" else 1.0
    return unit * (q.T @ logits.double() @ p).flatten(1)


@given(
    t=st.integers(1, 9), d=st.integers(1, 5), v=st.integers(1, 30), bias=st.booleans(),
    factor=st.sampled_from([1.0, -0.5]), scale=st.sampled_from(["uds", "unit"]),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_equals_the_explicit_product(
    t: int, d: int, v: int, bias: bool, factor: float, scale: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, t, d, generator=g, dtype=torch.float64)
    offset = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    head = LMHead(torch.randn(v, d, generator=g, dtype=torch.float64), offset, factor)
    projector = JLProjector(v, 9, vocab_dim=4, time_dim=3, seed=seed, scale=scale)
    true = explicit(projector, head.logits(hidden))
    for folded in (projector.fold(head), head):
        torch.testing.assert_close(projector.project(hidden, folded), true, rtol=1e-9, atol=1e-9)


def test_softcap_is_streamed() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 4, generator=g), torch.randn(5000, 4, generator=g)
    head = LMHead(weight, softcap=1.5)
    projector = JLProjector(5000, 8, vocab_dim=6, time_dim=2)
    true = explicit(projector, head.logits(hidden))
    ours = projector.project(hidden, head)
    assert float((ours - true).norm() / true.norm()) < 2e-6
    linear = projector.project(hidden, projector.fold(LMHead(weight)))
    assert float((linear - true).norm() / true.norm()) > 0.1
    with pytest.raises(ValueError, match=r"JLProjector.fold: head must have no soft cap, got 1.5."):
        projector.fold(head)


@pytest.mark.parametrize("bias", [False, True])
def test_compaction_forgets_where_the_padding_is(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, 4, generator=g)
    offset = torch.randn(20, generator=g) if bias else None
    head = LMHead(torch.randn(20, 4, generator=g), offset)
    projector = JLProjector(20, 8, vocab_dim=6, time_dim=3)
    folded = projector.fold(head)
    alone = projector.project(hidden, folded)
    garbage = torch.full((1, 4, 4), math.nan)
    for states, rows in (
        (torch.cat((garbage, hidden), 1), torch.arange(9)[None] >= 4),
        (torch.cat((hidden, garbage), 1), torch.arange(9)[None] < 5),
    ):
        ours = projector.project(states, folded, rows)  # 9 positions, 5 of them real, 8 allowed
        torch.testing.assert_close(ours, alone)
        torch.testing.assert_close(projector.project(states, head, rows), alone)
    left = torch.cat((garbage[:, :3], hidden), 1)
    kept = projector.project(left, folded, torch.arange(8)[None] >= 3, compact=False)
    assert not torch.allclose(kept, alone, rtol=0.1)


def test_scales() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, 60, generator=g, dtype=torch.float64)
    head = LMHead(torch.eye(60, dtype=torch.float64))
    squares = {"uds": 0.0, "unit": 0.0}
    for seed in range(60):
        for scale in squares:
            projector = JLProjector(60, 40, vocab_dim=16, time_dim=8, seed=seed, scale=scale)
            z = projector.project(logits, projector.fold(head))
            squares[scale] += float(z.square().sum() / logits.square().sum()) / 60
    assert squares["unit"] == pytest.approx(1.0, rel=0.15)
    assert squares["uds"] == pytest.approx(squares["unit"] * 60 * 40 / 4, rel=1e-9)


def test_the_seed_is_the_map() -> None:
    one, same, other = (JLProjector(100, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.index_vocab, same.index_vocab)  # type: ignore[arg-type]
    assert torch.equal(one.signs_time, same.signs_time)  # type: ignore[arg-type]
    assert not torch.equal(one.index_vocab, other.index_vocab)  # type: ignore[arg-type]
    torch.manual_seed(9)  # the global generator is not read
    assert repr(one) == repr(same) and "tensor" not in repr(one)
    assert torch.equal(JLProjector(100, 20, seed=3).signs_vocab, one.signs_vocab)  # type: ignore[arg-type]
    # Frozen values: a change of these would make stored embeddings meaningless.
    assert one.index_time is not None and one.index_time.tolist() == [11, 10, 11, 1, 13, 13, 8, 16]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 5  # type: ignore[misc]


def test_a_bad_sample_stays_alone_and_no_sample_is_fine() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 5, 4, generator=g), LMHead(torch.randn(20, 4, generator=g))
    projector = JLProjector(20, 8, vocab_dim=6, time_dim=3)
    folded = projector.fold(head)
    clean = projector.project(hidden, folded)
    hidden[1, 2, 3] = math.nan
    ours = projector.project(hidden, folded)
    assert ours[1].isnan().any() and torch.equal(ours[[0, 2]], clean[[0, 2]])
    assert projector.project(hidden[:0], folded).shape == (0, 18)
    empty = projector.project(hidden, folded, torch.zeros(3, 5))
    assert (empty == 0).all()


def test_large_products_of_index_and_position_keep_their_phase() -> None:
    # v k reaches 2.3e10: its cosine computed in float32, or after overflow in int32, is noise.
    vocab = 151_936
    projector = JLProjector(
        vocab, 1, vocab_dim=1, time_dim=1, signs_time=torch.ones(1),
        index_vocab=torch.tensor([vocab - 1]), signs_vocab=torch.ones(vocab),
    )  # fmt: skip
    weight = torch.zeros(vocab, 1, dtype=torch.float64)
    weight[vocab - 2] = 1.0
    folded = projector.fold(LMHead(weight))  # (V - 2)(V - 1) mod V = 2
    assert folded.item() == pytest.approx(math.cos(4 * math.pi / vocab) * vocab**0.5, rel=1e-14)


@pytest.mark.parametrize(("change", "text"), [
    ({"vocab": 0}, r"JLProjector: vocab must be at least 1, got 0. Pass the sizes"),
    ({"scale": "none"}, r'JLProjector: scale must be "uds" or "unit", got \'none\'. Pass'),
    ({"signs_time": torch.ones(3)},
     r"JLProjector: signs_time must be of shape \(8,\), got \(3,\). Pass None to draw"),
    ({"index_vocab": torch.full((6,), 20)},
     r"JLProjector: index_vocab must be in \[0, 20\), got values from 20 to 20. Draw"),
])  # fmt: skip
def test_construction_errors(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        JLProjector(**{"vocab": 20, "time": 8, "vocab_dim": 6, "time_dim": 2, **change})


@pytest.mark.parametrize(("hidden", "folded", "text"), [
    (torch.ones(1, 9, 4), torch.ones(4, 6),
     r"JLProjector.project: hidden must have at most time=8 rows, got 9. Give the projector"),
    (torch.ones(5, 4), torch.ones(4, 6), r"hidden must be of shape \(batch, time, d\) and folded"),
    (torch.ones(1, 5, 4), torch.ones(4, 5),
     r"JLProjector.project: folded must be of shape \(d, 6\) or one row more with d=4, got \(4, 5"),
    (torch.ones(1, 5, 4), LMHead(torch.ones(7, 4)),
     r"JLProjector: head must have vocab=20 entries, got 7. Build JLProjector\(vocab=7"),
    (torch.ones(1, 5, 3), LMHead(torch.ones(20, 4)),
     r"JLProjector.project: hidden must be of shape \(batch, time, d\) with d=4, got \(1, 5, 3\)"),
])  # fmt: skip
def test_projection_errors(hidden: Tensor, folded: Tensor | LMHead, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        JLProjector(20, 8, vocab_dim=6, time_dim=2).project(hidden, folded)


def test_without_compaction_positions_are_limited() -> None:
    projector, rows = JLProjector(20, 8, vocab_dim=6, time_dim=2), torch.arange(9)[None] >= 4
    with pytest.raises(ValueError, match="must have at most time=8 rows, got 9"):
        projector.project(torch.ones(1, 9, 4), torch.ones(4, 6), rows, compact=False)
