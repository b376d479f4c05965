"""What the scores hold in memory beyond inputs and weights, at 8,192 tokens and 151,936 entries.

Without a GPU the plan of one is measured on tensors without numbers, whose sizes are exact: tiles
as on CUDA, products of 16-bit factors into float32, and Triton kernels that do nothing (they
allocate nothing either). The last tests measure true runs on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from onlinesel.kernels import (
    HeadGram,
    JLProjector,
    LMHead,
    LowRank,
    _backend,
    _product,
    _stream,
    logit_nuclear_norm,
    policy,
    policy_logprobs,
    token_scores,
)
from onlinesel.kernels._tokens import Tokens
from tests.kernels.made_heads import Int8Rows
from tests.kernels.no_logits import PeakBytes
from tests.kernels.test_token_scores import naive

TOKENS, VOCAB, MIB = 8192, 151_936, 2**20
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the sizes and products of a CUDA device, and leave the Triton kernels out."""
    from onlinesel.kernels import _fused, _gradient, _tile

    shape = _stream.tile_shape

    class Silent:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: None

    def tile_shape(device: torch.device, *sizes: Any, **more: Any) -> tuple[int, int]:
        return shape(torch.device("cuda"), *sizes, **more)

    def keeps_float32(one: Tensor, two: Any) -> bool:
        return one.dtype == two.dtype and one.dtype in (torch.bfloat16, torch.float16)

    for module in (_stream, _tile, policy):
        monkeypatch.setattr(module, "tile_shape", tile_shape)
    for module in (_product, _tile, policy):
        monkeypatch.setattr(module, "keeps_float32", keeps_float32)
    monkeypatch.setattr(_tile, "tile_kernel", Silent())
    monkeypatch.setattr(_gradient, "gradient_kernel", Silent())
    for name in ("fused_kernel", "merge_kernel"):
        monkeypatch.setattr(_fused, name, Silent())
    monkeypatch.setattr(_fused, "shared_memory", lambda device: 227 * 1024)
    # The operation itself in place of what stands for it among tensors without numbers.
    monkeypatch.setattr(torch.ops.onlinesel, "logit_state", _backend._logit_state_op._init_fn)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def head_of(kind: str, d: int, vocab: int = VOCAB) -> tuple[LMHead, list[Tensor]]:
    """Return a head of bfloat16 rows, and the tensors that it keeps in memory."""
    low_rank, kept = [], []
    if kind in ("lora", "qlora"):
        low_rank = [LowRank(torch.empty(16, d), torch.empty(vocab, 16))]
        kept = [low_rank[0].a, low_rank[0].b]
    if kind in ("plain", "lora"):
        base: Tensor | Int8Rows = torch.empty(vocab, d, dtype=torch.bfloat16)
        kept.append(base)  # type: ignore[arg-type]
    else:
        codes = torch.empty(vocab, d, dtype=torch.int8)
        base = Int8Rows(codes, torch.empty(vocab, dtype=torch.bfloat16))
        kept += [codes, base.scales]
    return LMHead.from_rows(base, low_rank), kept


@needs_triton
@pytest.mark.parametrize(("kind", "backend", "d", "mebibytes"), [
    ("plain", "tile", 896, 96), ("plain", "tile", 3584, 96), ("lora", "tile", 3584, 96),
    ("rows", "tile", 3584, 96), ("qlora", "tile", 3584, 96), ("plain", "triton", 3584, 8),
    ("plain", "torch", 896, 96), ("qlora", "torch", 3584, 96),
])  # fmt: skip
def test_token_scores_as_on_a_gpu(
    like_cuda: None, kind: str, backend: str, d: int, mebibytes: int
) -> None:
    vocab = 20_000 if backend == "torch" else VOCAB  # its many tiles are alike
    with FakeTensorMode():
        head, kept = head_of(kind, d, vocab)
        hidden = torch.empty(TOKENS, d, dtype=torch.bfloat16)
        labels, temperature = torch.empty(TOKENS, dtype=torch.long), torch.empty(TOKENS)
        with PeakBytes(hidden, labels, temperature, *kept) as seen:
            token_scores(
                hidden, head, labels, backend=backend, padded=True, temperature=temperature
            )
    assert 20 * TOKENS < seen.peak <= mebibytes * MIB, (seen.peak / MIB, seen.where)


@needs_triton
@pytest.mark.parametrize(("kind", "d", "trains"), [
    ("plain", 896, False), ("lora", 3584, False), ("qlora", 3584, False),
    ("plain", 896, True), ("plain", 3584, True), ("lora", 3584, True),
])  # fmt: skip
def test_policy_logprobs_as_on_a_gpu(
    like_cuda: None, kind: str, d: int, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Forward and backward, beyond the gradients themselves, in the accumulation dtype at that.
    def take(owner: str, hidden: Tensor, head: LMHead, labels: Tensor, *_: Any) -> Tokens:
        return Tokens(torch.ones(TOKENS, dtype=torch.bool), None, hidden, labels, None, None)

    monkeypatch.setattr(policy, "take_tokens", take)  # which would look at the labels
    with FakeTensorMode():
        head, kept = head_of(kind, d)
        hidden = torch.empty(TOKENS, d, dtype=torch.bfloat16)
        labels = torch.empty(TOKENS, dtype=torch.long)
        thin = [x for low in head.low_rank for x in (low.a, low.b)]
        with PeakBytes(hidden, labels, *kept) as seen, torch.no_grad():
            logprobs, entropy = policy_logprobs(hidden, head, labels, backend="tile")
            forward = seen.peak
            rows = policy._Rows(
                hidden, labels, None, logprobs, entropy, logprobs, logprobs, entropy
            )
            plan = policy._Plan(None, "tile", None, None, None)  # type: ignore[arg-type]
            wanted = (True, trains, False, *(True for _ in thin))
            of_states, of_head = policy._gradients(rows, head, wanted, plan)
        gradients = [g for g in (of_states, *of_head) if g is not None]
    assert len(gradients) == 1 + trains + len(thin)
    size = sum(g.untyped_storage().nbytes() for g in gradients)
    assert forward <= 96 * MIB and seen.peak - size <= 192 * MIB, (seen.peak / MIB, seen.where)


def test_the_sizes_of_tiles() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert _stream.tile_shape(gpu, VOCAB, None, None) == (4096, 4096)  # 64 MiB of logits
    assert _stream.tile_shape(gpu, VOCAB, None, None, 896) == (4096, 2048)
    assert _stream.tile_shape(gpu, VOCAB, None, None, 3584) == (1170, 1170)  # 16 MiB of factors
    assert _stream.tile_shape(gpu, VOCAB, None, None, count=8192) == (4096, 4096)
    assert _stream.tile_shape(gpu, VOCAB, None, None, count=2048) == (8192, 2048)  # few are wider
    assert _stream.tile_shape(gpu, VOCAB, None, None, count=1) == (16384, 1024)
    assert _stream.tile_shape(cpu, VOCAB, None, None, count=1) == (4096, 256)
    assert _stream.tile_shape(gpu, VOCAB, 50, 70, 3584) == (50, 70)
    assert _stream.tile_shape(cpu, VOCAB, None, None, 3584) == (4096, 256)
    assert _stream.tile_shape(cpu, 5000, None, None) == (5000, 209)


def test_the_measure_sees_what_lives_at_a_time() -> None:
    given = torch.zeros(1000, dtype=torch.float64)
    with PeakBytes(given) as seen:
        for _ in range(3):
            given.mul_(2.0)  # in place
            kept = given + 1.0
            kept = kept[:10] * 2.0  # a view, and its result; the sum goes
    assert seen.peak == 8000 + 80 and kept.numel() == 10
    with PeakBytes() as seen, FakeTensorMode():
        one = torch.empty(1000)
        two = torch.empty(500, dtype=torch.bfloat16)
        del one
        three = torch.empty(600)
    assert seen.peak == 4000 + 1000 and two.shape != three.shape


@pytest.mark.slow
def test_token_scores_on_a_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 64, generator=g)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    weight = torch.randn(VOCAB, 64, generator=g).mul_(0.5).bfloat16()
    with PeakBytes(hidden, labels, weight) as seen:
        out = token_scores(hidden, LMHead(weight), labels)
    assert seen.peak <= 96 * MIB, (seen.peak / MIB, seen.where)
    some = slice(0, TOKENS, TOKENS // 16)
    true = naive(hidden[some], LMHead(weight), labels[some])
    assert out.nll is not None and true["z"].std() > 3.0
    assert (out.nll[some] - true["nll"]).abs().max() < 2e-5 + 1e-6 * float(true["z"].abs().max())


@pytest.mark.parametrize("kind", ["plain", "qlora"])
@pytest.mark.parametrize("method", ["gram", "polar"])
def test_the_scores_of_uds(kind: str, method: str) -> None:
    batch, time, d = 16, 512, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, time, d, generator=g)
    head, kept = head_of(kind, d)
    for tensor in kept:
        tensor.copy_((3 * torch.randn(tensor.shape, generator=g)).to(tensor.dtype))
    projector, gram = JLProjector(VOCAB, time), HeadGram(head)
    with PeakBytes(hidden, *kept) as once:
        root, fold = gram.root(), projector.fold(head)
    with PeakBytes(hidden, root, fold, *kept) as each:
        norms = logit_nuclear_norm(hidden, head, method=method, gram=gram)
        embedded = projector.project(hidden, fold)
    assert torch.isfinite(norms).all() and embedded.shape == (batch, projector.size)
    for seen in (once, each):
        assert seen.shapes and not [s for s in seen.shapes if max(s, default=0) >= VOCAB]
    # A chunk of 4,096 entries: its rows, of P, and of the phases of P, each of 64 bits.
    assert once.peak <= 8 * 4096 * (3 * d + 4 * projector.vocab_dim) + 8 * 4 * d * 128
    assert each.peak <= 4 * batch * time * d * 4 + 12 * d * d
