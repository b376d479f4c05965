"""`onlinesel bench blocks`: what wins, what never does, and when it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel.bench import _search, bench_blocks, blocks
from onlinesel.bench._inputs import HeadInputs
from onlinesel.bench._interpreter import interpret_without_cuda
from onlinesel.kernels._blocks import Blocks, candidate_blocks
from onlinesel.kernels._measured import INTERPRETER, Measured
from tests.launching import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton"
)  # fmt: skip
NAMES = {"Measured": Measured, "Blocks": Blocks, "torch": torch}
A, B, C, D, E = (Blocks(16, 16, 16, 4, stages) for stages in range(1, 6))


def exact(inputs: HeadInputs, sizes: Blocks | None) -> Mapping[str, Tensor]:
    """Return the true scores, but wrong ones for D; E does not run."""
    if sizes == E:
        raise RuntimeError("out of resource: shared memory")
    logits = inputs.exact_logits(inputs.states)
    log_p = torch.log_softmax(logits, 1)
    p, label = log_p.exp(), inputs.labels.view(-1, 1)
    nll = -log_p.gather(1, label).squeeze(1)
    gradient = p - torch.zeros_like(p).scatter(1, label, 1.0)
    scores = {"nll": nll, "entropy": -(p * log_p).sum(1), "el2n": gradient.norm(dim=1)}
    if sizes == D:
        scores["nll"][-1] += 1.0
    return scores


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Let calls take as many seconds as planned, and return who was timed with whom."""

    def plan(first: Mapping[str, float], last: Mapping[str, float]) -> list[list[str]]:
        turns: list[list[str]] = []

        def take_turns(calls: Any, repeats: int, device: Any, failed: Any) -> Any:
            turns.append(list(calls))
            seconds = last if len(calls) > 2 else first
            return {name: [seconds[name]] * repeats for name in calls}

        monkeypatch.setattr(_search, "take_turns", take_turns)
        monkeypatch.setattr(_search, "_scores", exact)
        monkeypatch.setattr(blocks, "interpret_without_cuda", lambda owner: True)
        return turns

    return plan


def search(*candidates: Blocks, **more: Any) -> dict[str, Any]:
    arguments = {"tokens": 6, "width": 8, "vocab": 40, "repeats": 7, "dtype": "float32"}
    return bench_blocks(**{**arguments, "candidates": candidates, "device": "cpu", **more})


def test_the_best_of_the_last_round_wins_and_wrong_ones_never_do(
    planned: Callable[..., list[list[str]]],
) -> None:
    first = {"gemm": 1.0, "tile": 2.0, str(A): 4.0, str(B): 1.25, str(C): 1.6, str(D): 0.1}
    turns = planned(first, {"gemm": 1.1, "tile": 2.2, str(A): 4.0, str(B): 1.5, str(C): 1.375})
    told: list[str] = []
    result = search(A, D, B, E, C, progress=lambda found: told.append(json.dumps(found)))
    (point,) = result["points"]
    ways = point["ways"]
    assert turns == [["gemm", "tile"], ["gemm", str(A)], ["gemm", str(B)], ["gemm", str(C)],
                     ["gemm", "tile", str(B), str(C), str(A)]]  # fmt: skip
    assert (point["winner"], point["fastest"]) == (str(C), "triton")
    assert ways[str(C)]["of_gemm"] == pytest.approx(0.8) and ways["tile"]["of_gemm"] == 0.5
    assert ways[str(C)]["runs"] == 7 and ways[str(C)]["blocks"] == C._asdict()
    assert ways[str(D)]["failed"].startswith("wrong: nll off by 1.0e+00, at most 5.1e-05")
    assert ways[str(E)]["failed"] == "RuntimeError: out of resource: shared memory"
    assert "seconds" not in ways[str(D)] and len(result["not_measured"]) == 2
    row = Measured(INTERPRETER, torch.float32, 8, "triton", C)
    assert eval(f"(\n{point['entry']}\n)", NAMES) == (row,)
    assert "tile 0.50" in point["entry"] and "bench_blocks" in point["entry"]
    # After what all are compared with, after each of five, and at the end.
    assert len(told) == 7
    seen = [json.loads(text)["points"][0]["ways"] for text in told]
    assert [str(B) in {n for n, e in w.items() if "of_gemm" in e} for w in seen] == [
        False, False, False, True, True, True, True
    ]  # fmt: skip


def test_the_tile_backend_can_be_the_fastest_and_the_row_still_has_sizes(
    planned: Callable[..., list[list[str]]],
) -> None:
    seconds = {"gemm": 1.0, "tile": 1.2, str(A): 1.5, str(B): 1.4}
    planned(seconds, seconds)
    (point,) = search(A, B)["points"]
    row = Measured(INTERPRETER, torch.float32, 8, "tile", B)
    assert eval(f"(\n{point['entry']}\n)", NAMES) == (row,)
    (alone,) = search(D, E)["points"]  # none of them is right
    assert (alone["winner"], alone["fastest"]) == (None, "tile")
    assert eval(f"(\n{alone['entry']}\n)", NAMES) == (row._replace(blocks=None),)


def test_no_candidate_begins_when_the_time_is_up(
    planned: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"gemm": 1.0, "tile": 1.2, str(A): 1.5, str(B): 1.4, str(C): 1.0}
    planned(seconds, seconds)
    now = [100.0]
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def progress(result: dict[str, Any]) -> None:
        now[0] += 10.0

    result = search(A, B, C, width=[8, 16], seconds=25.0, progress=progress)
    for point in result["points"]:  # both widths have seen the same
        ways = point["ways"]
        assert "of_gemm" in ways[str(A)] and "of_gemm" in ways[str(B)]
        assert ways[str(C)]["absent"] == "not tried: the time was up"
        assert "seconds" not in ways[str(C)]
        assert point["winner"] == str(B)
    assert result["not_measured"] == [f"{C}: not tried: the time was up"]


def test_on_a_cpu_the_command_interprets_and_says_so(tmp_path: Path) -> None:
    path, drawing = tmp_path / "blocks.json", tmp_path / "blocks.png"
    words = "blocks --tokens 5 --width 16 --vocab 300 --repeats 1 --seconds 250"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "onlinesel.bench", *words.split(), "--json", path, "--figure",
         drawing],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    (point,) = result["points"]
    tried = candidate_blocks(torch.bfloat16, 2**20)
    assert list(point["ways"]) == ["gemm", "tile", *map(str, tried)]
    for entry in list(point["ways"].values())[1:]:
        assert entry["error"]["nll"]["max_abs"] < 2e-5 + 1e-6 * point["largest_logit"]
        assert entry["error"]["el2n"]["max_rel"] < 1e-4 and entry["seconds"] > 0
    (row,) = eval(f"(\n{point['entry']}\n)", NAMES)
    assert row.capability == INTERPRETER and str(row.blocks) == point["winner"]
    assert "Note: Interpreted on a CPU: the seconds are no speeds of a GPU" in done.stdout
    assert "# Interpreted on a CPU, no speed: do not paste." in done.stdout
    assert drawing.read_bytes()[:4] == b"\x89PNG"


def test_a_process_that_cannot_interpret_any_more_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="f: without CUDA the kernels need .*INTERPRET=1 before"):
        interpret_without_cuda("f")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert interpret_without_cuda("f") is False and "TRITON_INTERPRET" not in os.environ


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seconds": 0.0}, "bench_blocks: seconds must be positive, got 0.0. Give it time"),
    ({"tokens": 0}, "bench_blocks: tokens must be at least 1, got 0. Pass a"),
    ({"dtype": "int8"}, "bench_blocks: dtype must be one of float32, .*, got 'int8'"),
])  # fmt: skip
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(A, **arguments)
