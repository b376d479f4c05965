"""Checks of the Triton kernels in Triton's interpreter. `test_triton.py` runs this file.

It is not collected by itself: TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from triton.runtime.interpreter import TensorDescHandle

from onlinesel.bench import bench_grpo, bench_scores
from onlinesel.kernels import LMHead, TokenScores, _backend, token_scores
from onlinesel.kernels import _fused as fused
from onlinesel.kernels import _measured as measured
from onlinesel.kernels import _tile as tile
from onlinesel.kernels._blocks import Blocks, candidate_blocks
from onlinesel.kernels._state import LogitState, merge_states, state_scores
from tests.kernels.made_heads import in_memory, made_head
from tests.kernels.test_token_scores import NUMBERS, naive, sample

SMALL = Blocks(16, 32, 16, 4, 2, tiles=2, together=2)  # many tiles, splits and groups
OUTPUTS = (*NUMBERS, "top1")
CANDIDATES = [
    *candidate_blocks(torch.bfloat16, 227 * 1024), *candidate_blocks(torch.bfloat16, 99 * 1024)
]  # fmt: skip
BACKENDS = ("tile", "triton") if _backend._VERSION >= _backend._OLDEST else ("tile",)
# numpy, which plays the device here, warns of every nan and overflow.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Triton 3.6 turns arrays of one number into numbers, which numpy 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "default_blocks", lambda dtype, shared: SMALL)


def run(hidden: Tensor, head: LMHead, labels: Tensor, backend: str, **more: object) -> TokenScores:
    chunks = {"vocab_chunk": 100, "token_chunk": 7} if backend == "tile" else {}
    return token_scores(hidden, head, labels, backend=backend, **chunks, **more)  # type: ignore[arg-type]


def assert_accurate(out: TokenScores, true: dict[str, Tensor]) -> None:
    """The accuracy lines, against float64 of the same inputs."""
    top = float(true["z"].abs().max())
    assert out.nll is not None and out.entropy is not None and out.el2n is not None
    assert (out.nll - true["nll"]).abs().max() <= 2e-5 + 1e-6 * top
    assert (out.entropy - true["entropy"]).abs().max() <= 3e-5 + 1e-7 * top
    kept = true["p"] < 1 - 1e-6
    assert ((out.el2n - true["el2n"]) / true["el2n"])[kept].abs().max() <= 1e-4
    assert out.margin is not None and out.sum_sq is not None and out.top1 is not None
    assert (out.margin - true["margin"]).abs().max() <= 2e-5 + 1e-6 * top
    assert (out.sum_sq - true["sum_sq"]).abs().max() <= 1e-5
    clear = true["margin"].abs() > 1e-4
    assert torch.equal(out.top1[clear], (true["margin"] >= 0)[clear])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 33, 7), (37, 65, 203), (17, 48, 256)])
def test_accuracy_on_odd_shapes(n: int, d: int, v: int, dtype: torch.dtype, backend: str) -> None:
    hidden, head, labels = sample(n, d, v, std=7.0, dtype=dtype)
    labels[::2] = naive(hidden, head, labels)["z"].argmax(-1)[::2]  # half of them confident
    labels[0], labels[-1] = 0, v - 1
    assert_accurate(run(hidden, head, labels, backend), naive(hidden, head, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("std", [2.0, 14.0])
def test_accuracy_on_bfloat16_with_a_wider_head(std: float, backend: str) -> None:
    hidden, head, labels = sample(40, 96, 700, std=std, dtype=torch.bfloat16)
    assert_accurate(run(hidden, head, labels, backend), naive(hidden, head, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_bias_scale_softcap_and_temperature(
    scale: float, softcap: float | None, backend: str
) -> None:
    hidden, head, labels = sample(9, 24, 150, std=4.0, dtype=torch.float16)
    head = LMHead(head.weight, torch.linspace(-2, 2, 150).half(), scale, softcap)
    temperature = torch.linspace(0.5, 2.0, 9)
    true = naive(hidden, head, labels, temperature)
    assert_accurate(run(hidden, head, labels, backend, temperature=temperature), true)
    plain = naive(hidden, head, labels)
    assert (plain["nll"] - true["nll"]).abs().max() > 0.01
    assert_accurate(run(hidden, head, labels, backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_oracle_bit_for_bit_where_arithmetic_is_exact(backend: str) -> None:
    # Logits 0 and a label at 0: every sum is a small integer.
    head = LMHead(torch.zeros(50, 8))
    hidden, labels = torch.ones(3, 8), torch.tensor([0, 31, 49])
    ours, oracle = run(hidden, head, labels, backend), token_scores(hidden, head, labels)
    for name in OUTPUTS:
        assert torch.equal(getattr(ours, name), getattr(oracle, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_the_thousands(backend: str) -> None:
    hidden, head, labels = sample(20, 16, 130, std=1.0)
    head = LMHead(head.weight, scale=3000.0)
    true, out = naive(hidden, head, labels), run(hidden, head, labels, backend)
    assert true["z"].abs().max() > 3000
    for name in NUMBERS:
        ours = getattr(out, name)
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), true[name], rtol=1e-5, atol=4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_removed_entry(backend: str) -> None:
    hidden, head, labels = sample(7, 16, 40, std=2.0)
    expected = token_scores(hidden, head, labels)
    bias = torch.zeros(140)
    bias[40:] = -torch.inf  # a whole tile and a whole split without a finite entry
    wide = LMHead(torch.cat((head.weight, torch.ones(100, 16))), bias)
    out = run(hidden, wide, labels, backend)
    for name in NUMBERS:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_stays_alone(bad: float, backend: str) -> None:
    hidden, head, labels = sample(6, 16, 150)
    clean = run(hidden, head, labels, backend)
    hidden[2, 1] = bad
    out = run(hidden, head, labels, backend)
    others = torch.arange(6) != 2
    for name in ("nll", "entropy", "el2n", "sum_sq"):
        assert not torch.isfinite(getattr(out, name)[2]), name
        assert torch.equal(getattr(out, name)[others], getattr(clean, name)[others])
    assert out.margin is not None and (bad == math.inf or out.margin[2].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_are_zero_and_not_read(backend: str) -> None:
    hidden, head, labels = sample(6, 16, 50)
    full = run(hidden, head, labels, backend)
    labels[1] = labels[5] = -100
    hidden[1] = math.nan
    for padded in (False, True):
        out = run(hidden, head, labels, backend, padded=padded)
        for name in OUTPUTS:
            ours = getattr(out, name)
            torch.testing.assert_close(ours[out.mask], getattr(full, name)[out.mask])
            assert (ours[~out.mask] == 0).all()
    nothing = run(hidden, head, torch.full((6,), -100), backend)
    assert nothing.nll is not None and (nothing.nll == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend: str) -> None:
    hidden, head, labels = sample(5, 16, 50)
    full = run(hidden, head, labels, backend)
    for name in NUMBERS:
        out = run(hidden, head, labels, backend, outputs=(name,))
        assert torch.equal(getattr(out, name), getattr(full, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 40, 7), (37, 72, 203), (17, 48, 256)])
def test_descriptors_load_the_same(n: int, d: int, v: int, dtype: torch.dtype) -> None:
    hidden, head, labels = sample(n, d, v, std=5.0, dtype=dtype)
    given = (hidden, head, labels, torch.linspace(0.5, 2.0, n), True, True)
    plain = fused.fused_state(*given, SMALL)
    loaded: list[object] = []
    load = TensorDescHandle.validate

    def validate(self: TensorDescHandle) -> None:
        loaded.append(self)
        load(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorDescHandle, "validate", validate)
        described = fused.fused_state(*given, SMALL._replace(described=True))
    assert loaded  # by descriptors indeed
    for one, two in zip(described, plain, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


def test_descriptors_need_aligned_rows() -> None:
    hidden, head, labels = sample(5, 33, 40)
    described = SMALL._replace(described=True)
    for states in (hidden, torch.zeros(5 * 36 + 1)[1:].view(5, 36)):
        wide = head if states is hidden else LMHead(torch.zeros(40, 36))
        with pytest.raises(ValueError, match="described blocks need rows that start at multiples"):
            fused.fused_state(states, wide, labels, None, True, True, described)


def test_a_token_does_not_depend_on_its_company() -> None:
    hidden, head, labels = sample(40, 16, 300, std=5.0)
    whole = run(hidden, head, labels, "triton")
    alone = run(hidden[17:18], head, labels[17:18], "triton")
    for name in NUMBERS:
        assert torch.equal(getattr(whole, name)[17:18], getattr(alone, name))


@pytest.mark.parametrize("tiles", [1, 2, 5, 100])
def test_the_number_of_splits_does_not_matter(tiles: int) -> None:
    hidden, head, labels = sample(20, 16, 300, std=5.0)
    state = fused.fused_state(hidden, head, labels, None, True, True, SMALL._replace(tiles=tiles))
    assert_accurate(TokenScores(labels >= 0, **state_scores(state, OUTPUTS)), naive(
        hidden, head, labels))  # fmt: skip


@pytest.mark.parametrize("blocks", CANDIDATES, ids=str)
def test_accuracy_with_the_sizes_that_a_search_tries(blocks: Blocks) -> None:
    # More than one tile, split and step of the product, then more than one block of tokens and
    # group of blocks; the last of each is not full.
    split, group = blocks.entries * blocks.tiles, blocks.tokens * blocks.together
    shapes = [(5, blocks.depth + 8, split + 90, torch.bfloat16), (group + 5, 16, 90, torch.half)]
    for n, d, v, dtype in shapes:
        hidden, head, labels = sample(n, d, v, std=7.0, dtype=dtype)
        labels[0], labels[-1] = 0, v - 1
        state = fused.fused_state(hidden, head, labels, None, True, True, blocks)
        scores = TokenScores(labels >= 0, **state_scores(state, OUTPUTS))
        assert_accurate(scores, naive(hidden, head, labels))


def test_the_fused_kernel_takes_the_sizes_of_the_measured_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[Blocks] = []
    place = fused.fused_kernel

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                names = ("TOKENS", "ENTRIES", "DEPTH", "num_warps", "num_stages", "TILES")
                sizes = [options[name] for name in (*names, "TOGETHER", "DESCRIBED")]
                chosen.append(Blocks(*sizes))
                place[grid](*args, **options)

            return launch

    narrow, wide = SMALL._replace(entries=16, described=True), SMALL._replace(depth=32)
    row = (measured.INTERPRETER, torch.float16)
    table = (
        measured.Measured(*row, 64, "tile", wide),
        measured.Measured(*row, 32, "triton", narrow),
        measured.Measured(*row, 128, "triton"),
        measured.Measured((9, 0), *row[1:], 16, "triton", wide),
    )
    monkeypatch.setattr(measured, "MEASURED", table)
    monkeypatch.setattr(fused, "fused_kernel", Seen())
    # Rows of 28 numbers do not begin where descriptors ask it: plain loads, and the usual sizes.
    for d, expected in ((16, narrow), (28, SMALL), (64, wide), (72, SMALL), (136, SMALL)):
        hidden, head, labels = sample(9, d, 90, std=4.0, dtype=torch.float16)
        out = token_scores(hidden, head, labels, backend="triton")
        assert_accurate(out, naive(hidden, head, labels))
        assert chosen == [expected], d
        chosen.clear()


def test_strided_inputs_and_mixed_types() -> None:
    hidden, head, labels = sample(9, 32, 60, std=3.0, dtype=torch.bfloat16)
    wide = torch.zeros(9, 80, dtype=torch.bfloat16)
    wide[:, 7:39] = hidden
    flipped = LMHead(head.weight.T.contiguous().T)
    mixed = LMHead(head.weight.float())
    every_other = torch.zeros(18, dtype=torch.long)
    every_other[::2] = labels
    temperature = torch.ones(18)
    temperature[::2] = torch.linspace(0.5, 2.0, 9)
    for backend in BACKENDS:
        expected = run(hidden, head, labels, backend)
        for states, other in ((wide[:, 7:39], head), (hidden, flipped), (hidden, mixed)):
            assert torch.equal(run(states, other, labels, backend).nll, expected.nll)  # type: ignore[arg-type]
        spaced = run(hidden, head, every_other[::2], backend, temperature=temperature[::2])
        tight = run(hidden, head, labels, backend, temperature=temperature[::2].contiguous())
        assert torch.equal(spaced.nll, tight.nll) and (spaced.nll != expected.nll).any()  # type: ignore[arg-type, union-attr]


def test_parts_of_the_vocabulary_merge_to_the_whole() -> None:
    hidden, head, labels = sample(11, 16, 200, std=5.0)
    for make in (tile.tile_state, fused.fused_state):
        parts: list[LogitState] = []
        for start, stop in ((0, 64), (64, 65), (65, 200)):
            part = head.part(start, stop, torch.float32)
            parts.append(make(hidden, part, labels - start, None, True, True))
        merged = merge_states(merge_states(parts[0], parts[1]), parts[2])
        scores = TokenScores(labels >= 0, **state_scores(merged, OUTPUTS))
        assert_accurate(scores, naive(hidden, head, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operation_keeps_the_rules_of_torch_library(backend: str) -> None:
    hidden, head, labels = sample(5, 16, 40)
    arguments = (
        hidden, head.weight, None, labels, None, 1.0, None, True, True, backend, None, None
    )  # fmt: skip
    opcheck(torch.ops.onlinesel.logit_state, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_break(backend: str) -> None:
    hidden, head, labels = sample(5, 16, 40)

    def score(states: Tensor, targets: Tensor) -> Tensor:
        out = token_scores(states, head, targets, backend=backend, padded=True)
        assert out.el2n is not None
        return out.el2n * 2

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden, labels), score(hidden, labels))


@pytest.mark.parametrize("kind", ["rows", "lora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_made_tile_by_tile(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"dtype": dtype, "thin": torch.float32, "std": 5.0}
    for softcap in (None, 6.0):
        head = made_head(kind, v=203, d=24, bias=True, scale=-0.8, softcap=softcap, **options)
        whole = in_memory(head, torch.float64)
        hidden = torch.randn(9, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
        labels, temperature = torch.arange(9) * 25, torch.linspace(0.5, 2.0, 9)
        true = naive(hidden, whole, labels, temperature)
        assert_accurate(run(hidden, head, labels, "tile", temperature=temperature), true)
        spaced = torch.zeros(406, dtype=head.bias.dtype)  # type: ignore[union-attr]
        spaced[::2] = head.bias  # type: ignore[assignment]
        wide = replace(head, bias=spaced[::2])
        assert_accurate(run(hidden, wide, labels, "tile", temperature=temperature), true)
        with pytest.raises(
            ValueError, match='backend must be "auto", "tile" or "torch" for a head'
        ):
            run(hidden, head, labels, "triton")


def test_a_head_that_is_made_breaks_the_graph_and_no_more() -> None:
    head = made_head("qlora", v=203, d=24, dtype=torch.float32)
    hidden, labels = torch.randn(5, 24), torch.arange(5)

    def score(states: Tensor, targets: Tensor) -> Tensor:
        out = token_scores(states, head, targets, backend="tile", padded=True)
        assert out.el2n is not None
        return out.el2n * 2

    compiled = torch.compile(score, backend="eager")
    torch.testing.assert_close(compiled(hidden, labels), score(hidden, labels))


def test_benchmarks_go_through_our_kernels_and_not_through_others() -> None:
    arguments: dict[str, Any] = {"repeats": 1, "device": "cpu", "memory": False}
    scores = bench_scores(5, 16, 90, dtype="bfloat16", **arguments)["points"][0]["token_scores"]
    grpo = bench_grpo(5, 16, 90, dropped=(0.5,), **arguments)["points"][0]["ways"]
    for backend in BACKENDS:
        assert scores[backend]["error"]["nll"]["max_abs"] < 5e-5
        assert grpo[backend]["error"]["states"]["relative"] < 1e-5
        assert scores[backend]["seconds"] > 0 and grpo[backend]["seconds"] > 0
    assert scores["liger"]["absent"] in ("needs CUDA", "not installed")
    assert scores["cut"]["absent"] in ("needs CUDA", "not installed")
