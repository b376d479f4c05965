"""Which backend runs, temperatures, the padded form, and vocabulary parts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onlinesel.kernels import LMHead, TokenScores, VocabShard, _backend, token_scores
from onlinesel.kernels._backend import MEASURED, Measured, choose_backend
from onlinesel.kernels._blocks import Blocks, candidate_blocks, default_blocks
from onlinesel.kernels._measured import entry_text, measured_row
from onlinesel.kernels._state import LogitState, merge_parts, merge_states, state_scores
from onlinesel.kernels._stream import stream_state
from tests.kernels.test_token_scores import NUMBERS, naive, sample

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_temperature_per_token(dtype: torch.dtype) -> None:
    hidden, head, labels = sample(9, 8, 60, std=4.0, dtype=dtype)
    head = LMHead(head.weight, torch.linspace(-1, 1, 60, dtype=dtype), 0.7, 5.0)
    temperature = torch.linspace(0.25, 3.0, 9, dtype=dtype)
    true = naive(hidden, head, labels, temperature)
    out = token_scores(hidden, head, labels, temperature=temperature, vocab_chunk=17)
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    for name in NUMBERS:
        torch.testing.assert_close(
            getattr(out, name).double(), true[name], rtol=bound, atol=2 * bound
        )
    for one in (2.0, torch.tensor(2.0)):
        same = token_scores(hidden, head, labels, temperature=one)
        each = token_scores(hidden, head, labels, temperature=torch.full((9,), 2.0))
        for name in NUMBERS:
            assert torch.equal(getattr(same, name), getattr(each, name))


def test_the_temperature_of_an_ignored_token_is_not_read() -> None:
    hidden, head, labels = sample(3, 4, 10)
    labels[1] = -100
    out = token_scores(hidden, head, labels, temperature=torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(out.nll, token_scores(hidden, head, labels).nll)  # type: ignore[arg-type]


def test_padded_gives_the_same_and_marks_what_it_cannot_refuse() -> None:
    hidden, head, labels = sample(6, 4, 10)
    hidden[1] = torch.nan
    labels[1] = -100
    temperature = torch.tensor([1.0, -1.0, 1.0, 2.0, 1.0, 1.0])
    plain = token_scores(hidden, head, labels, temperature=temperature)
    padded = token_scores(hidden, head, labels, temperature=temperature, padded=True)
    for name in (*NUMBERS, "top1"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    labels[2], labels[3], temperature[4] = 10, -5, 0.0
    marked = token_scores(hidden, head, labels, temperature=temperature, padded=True)
    assert marked.nll is not None and plain.nll is not None
    assert marked.nll.isnan().tolist() == [False, False, True, True, True, False]
    torch.testing.assert_close(marked.nll[[0, 1, 5]], plain.nll[[0, 1, 5]])


def test_padded_reads_no_value() -> None:
    # Fake tensors hold no numbers: whatever depends on one raises.
    with FakeTensorMode():
        hidden, labels = torch.empty(6, 4), torch.empty(6, dtype=torch.long)
        head, temperature = LMHead(torch.empty(10, 4)), torch.empty(6)
        out = token_scores(hidden, head, labels, temperature=temperature, padded=True)
        assert out.nll is not None and out.nll.shape == (6,)
        with pytest.raises(Exception, match="nonzero|data-dependent|DynamicOutputShape"):
            token_scores(hidden, head, labels)


def test_padded_compiles_without_a_break() -> None:
    hidden, head, labels = sample(5, 16, 40)

    def score(states: torch.Tensor) -> torch.Tensor:
        out = token_scores(states, head, labels, padded=True)
        assert out.entropy is not None
        return out.entropy + 1

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden), score(hidden))


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_vocabulary_parts_merge_to_the_whole(parts: int) -> None:
    hidden, head, labels = sample(12, 8, 131, std=6.0)
    inverse = torch.linspace(0.5, 2, 12)
    whole = stream_state(hidden, head, labels, inverse, True, True)
    found: list[LogitState] = []
    for entries in torch.arange(131).chunk(parts):
        first = int(entries[0])
        part = head.part(first, int(entries[-1]) + 1, torch.float32)
        found.append(stream_state(hidden, part, labels - first, inverse, True, True))
    merged = found[0]
    for state in found[1:]:
        merged = merge_states(merged, state)
    stacked = merge_parts(
        LogitState(*(torch.stack(field) for field in zip(*found, strict=True)))  # type: ignore[arg-type]
    )
    for ours in (merged, stacked):
        scores = state_scores(ours, NUMBERS)
        for name, value in state_scores(whole, NUMBERS).items():
            torch.testing.assert_close(scores[name], value, rtol=1e-5, atol=1e-5)


def test_the_best_measured_row_decides_and_else_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        Measured((9, 0), torch.bfloat16, 4096, "tile"),
        Measured((9, 0), torch.bfloat16, 1024, "triton"),
    ]

    def fastest(capability: tuple[int, int], dtype: torch.dtype, width: int) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(_backend, "_TRITON", True)
        return choose_backend("f", "auto", torch.device("cuda"), dtype, width, table)

    assert fastest((9, 0), torch.bfloat16, 896) == "triton"
    assert fastest((9, 0), torch.bfloat16, 1025) == "tile"
    assert fastest((8, 0), torch.bfloat16, 896) == "tile"
    assert fastest((9, 0), torch.float16, 896) == "tile"
    assert measured_row(torch.device("cuda"), torch.float16, 1024, table) is None
    assert measured_row(torch.device("cpu"), torch.bfloat16, 1024, table) is None
    assert all(row.backend in ("tile", "triton") for row in MEASURED)


@pytest.mark.parametrize("row", [
    Measured((9, 0), torch.bfloat16, 896, "triton", Blocks(128, 256, 64, 8, 4, 18, 64, True)),
    Measured((8, 9), torch.float16, 4096, "tile"),
])  # fmt: skip
def test_the_text_of_a_row_is_the_row(row: Measured) -> None:
    text = entry_text(row, "onlinesel bench blocks\nsome GPU, 2026-11-28")
    names = {"Measured": Measured, "Blocks": Blocks, "torch": torch}
    assert eval(f"(\n{text}\n)", names) == (row,)  # as it stands in the table
    assert text.startswith("    # onlinesel bench blocks\n    # some GPU, 2026-11-28\n    Mea")
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(("kibibytes", "described", "count"), [
    (227, True, 11), (163, False, 6), (99, False, 6)
])  # fmt: skip
def test_candidates_fit_and_begin_with_the_default(
    kibibytes: int, described: bool, count: int
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        found = candidate_blocks(dtype, kibibytes * 1024)
        assert len(set(found)) == len(found) == count
        assert found[0] == default_blocks(dtype, kibibytes * 1024)
        assert any(blocks.described for blocks in found) == described
        for blocks in found:
            # 8 MiB at 8,192 tokens and 151,936 entries: five sums of every split, and merged.
            splits = -(-151_936 // (blocks.entries * blocks.tiles))
            assert 20 * 8192 * (splits + 4) <= 8 * 2**20, blocks
            assert blocks.shared_bytes(dtype) <= kibibytes * 1024
    assert candidate_blocks(torch.float32, 227 * 1024) == (default_blocks(torch.float32, 0),)


def test_auto_on_a_cpu_is_torch() -> None:
    assert choose_backend("f", "auto", CPU, torch.bfloat16, 64) == "torch"


@needs_triton
@pytest.mark.parametrize("backend", ["tile", "triton"])
def test_an_explicit_backend_is_never_replaced(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, head, labels = sample(3, 4, 10)
    with pytest.raises(ValueError, match=r'backend must be "torch" or "auto" on cpu, got .*CUDA'):
        token_scores(hidden, head, labels, backend=backend)
    with pytest.raises(ValueError, match=r'must be "torch" for float64 inputs, got .*float32'):
        token_scores(hidden.double(), head, labels, backend=backend)


@pytest.mark.parametrize("backend", ["tile", "triton"])
def test_without_triton(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_TRITON", False)
    with pytest.raises(ImportError, match=r'token_scores: backend .* needs triton: pip install "o'):
        choose_backend("token_scores", backend, CPU, torch.float32, 4)
    assert choose_backend("f", "auto", torch.device("cuda"), torch.float32, 4) == "torch"


@needs_triton
def test_a_triton_that_is_too_old_for_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_VERSION", (3, 4))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ImportError, match=r"f: backend 'triton' needs triton 3.6 or .*2.11 or"):
        choose_backend("f", "triton", CPU, torch.float32, 4)
    assert choose_backend("f", "tile", CPU, torch.float32, 4) == "tile"
    on, row = torch.device("cuda"), Measured((9, 0), torch.float32, 9, "triton")
    monkeypatch.setattr(_backend, "measured_row", lambda *_: row)
    assert choose_backend("f", "auto", on, torch.float32, 4) == "tile"
    monkeypatch.setattr(_backend, "_VERSION", (3, 6))
    assert choose_backend("f", "auto", on, torch.float32, 4) == "triton"


@pytest.mark.parametrize(("change", "text"), [
    ({"backend": "cuda"}, r"backend must be one of auto, torch, tile, triton, got 'cuda'. Pass"),
    ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0. Pass None"),
    ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, r"positive and finite, got -2.0. Pass None"),
    ({"temperature": torch.tensor(torch.inf)}, r"positive and finite, got inf. Pass None"),
    ({"temperature": torch.ones(2)}, r"one number or of shape \(3,\), got shape \(2,\). Give"),
    ({"shard": VocabShard(0, 12), "labels": torch.tensor([1, 2, 12])}, r"got a label 12. Check"),
    ({"shard": VocabShard(95, 100)}, r"shard must hold entries inside its total, got rows 95 to"),
])  # fmt: skip
def test_errors(change: dict[str, Any], text: str) -> None:
    hidden, head, labels = sample(3, 4, 10)
    with pytest.raises(ValueError, match="token_scores: .*" + text):
        token_scores(**{"hidden": hidden, "head": head, "labels": labels, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch", "tile", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    hidden, head, labels = sample(384, 896, 32000, std=7.0, dtype=dtype)
    true = naive(hidden, head, labels)
    temperature = torch.ones(384)
    on = LMHead(head.weight.cuda())
    out = token_scores(
        hidden.cuda(), on, labels.cuda(), backend=backend, temperature=temperature.cuda()
    )
    top = float(true["z"].abs().max())
    assert out.nll is not None and out.entropy is not None and out.el2n is not None
    # Tensor cores cut the sums of 16-bit products off instead of rounding them: 1e-6 of a logit.
    cut = 0.0 if dtype == torch.float32 or backend == "torch" else 2e-6 * top
    assert (out.nll.cpu() - true["nll"]).abs().max() <= 2e-5 + 1e-6 * top + cut
    assert (out.entropy.cpu() - true["entropy"]).abs().max() <= 3e-5 + cut
    kept = true["p"] < 1 - 1e-6
    assert ((out.el2n.cpu() - true["el2n"]) / true["el2n"])[kept].abs().max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "mebibytes"), [("tile", 96), ("triton", 8)])
def test_memory_on_a_gpu(backend: str, mebibytes: int) -> None:
    hidden = torch.zeros(8192, 896, dtype=torch.bfloat16, device="cuda")
    head = LMHead(torch.zeros(151936, 896, dtype=torch.bfloat16, device="cuda"))
    labels = torch.zeros(8192, dtype=torch.long, device="cuda")
    token_scores(hidden, head, labels, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_scores(hidden, head, labels, backend=backend)
    assert torch.cuda.max_memory_allocated() - before <= mebibytes * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tile", "triton"])
def test_the_padded_form_goes_into_a_cuda_graph(backend: str) -> None:
    hidden, head, labels = sample(64, 128, 5000, std=5.0, dtype=torch.bfloat16)
    head, hidden, labels = LMHead(head.weight.cuda()), hidden.cuda(), labels.cuda()

    def score() -> TokenScores:
        return token_scores(hidden, head, labels, backend=backend, padded=True)

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        score()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = score()
    labels.copy_(labels.flip(0))
    graph.replay()
    assert captured.nll is not None
    torch.testing.assert_close(captured.nll, score().nll)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "tile", "triton"])
@pytest.mark.parametrize("entries", [40, 9000])  # a nan beside one tile, and in one of several
def test_a_nan_stays_in_its_row_on_a_gpu(entries: int, backend: str) -> None:
    hidden, head, labels = sample(6, 16, entries, dtype=torch.bfloat16)
    hidden[2, 1] = torch.nan
    out = token_scores(hidden.cuda(), LMHead(head.weight.cuda()), labels.cuda(), backend=backend)
    oracle = token_scores(hidden, head, labels)
    for name in NUMBERS:
        torch.testing.assert_close(
            getattr(out, name).cpu(), getattr(oracle, name), rtol=1e-4, atol=3e-5, equal_nan=True
        )


@pytest.mark.gpu
def test_loads_by_descriptors_on_a_gpu() -> None:
    fused = pytest.importorskip("onlinesel.kernels._fused")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the copy engine of Hopper")
    hidden, head, labels = sample(500, 896, 32000, std=7.0, dtype=torch.bfloat16)
    given = (hidden.cuda(), LMHead(head.weight.cuda()), labels.cuda(), None, True, True)
    blocks = default_blocks(torch.bfloat16, 227 * 1024)
    found = fused.fused_state(*given, blocks._replace(described=True))
    for one, two in zip(found, fused.fused_state(*given, blocks), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-5)
