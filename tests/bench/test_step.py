"""`onlinesel bench step`: what a step costs is counted, and its gradient is the one it must be."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from onlinesel.bench import main
from onlinesel.bench._measure import in_fresh_process
from onlinesel.recipes import _bench_trainer, bench_step
from onlinesel.recipes._bench_trainer import PRESETS, SIDES, FirstStep, StepSizes, step_peak

TINY = StepSizes("tiny", rows=1, tokens=8, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("step")
    path, drawing = folder / "result.json", folder / "drawing.png"
    words = "step --preset tiny --rows 2 --accumulate 2 --micro-batch 4 --tokens 8 --steps 2"
    words += " --repeats 1 --device cpu --no-memory"
    assert main([*words.split(), "--json", str(path), "--figure", str(drawing)]) == 0
    return json.loads(path.read_text()), drawing


def test_forwards_are_counted_and_set_the_limits(tiny: tuple[dict[str, Any], Path]) -> None:
    result, drawing = tiny
    sides = result["sides"]
    assert result["scored_rows"] == 16
    # All rows: one forward, and one more that is recomputed. A quarter chosen: one to score, a
    # quarter to train, another to recompute; reusing saves the one to train.
    forwards = {name: entry["forwards"] for name, entry in sides.items()}
    assert forwards == {
        "all": 1, "all_checkpointed": 2, "selected": 1.25, "selected_checkpointed": 1.5,
        "selected_reused": 1.25,
    }  # fmt: skip
    limits = {name: entry["limit_over_all"] for name, entry in sides.items()}
    assert limits["selected"] == pytest.approx(3 / (1 + 3 / 4))
    again = {name: entry["limit_over_all_checkpointed"] for name, entry in sides.items()}
    assert again["selected_checkpointed"] == pytest.approx(4 / (1 + 4 / 4))
    assert again["selected_reused"] == pytest.approx(4 / (1 + 3 / 4))
    for entry in sides.values():
        assert entry["rows_per_second"] == pytest.approx(16 / entry["seconds"])
        assert entry["over_all"] == pytest.approx(sides["all"]["seconds"] / entry["seconds"])
    assert sides["selected_reused"]["gflop"] < sides["selected_checkpointed"]["gflop"]
    assert result["command"].startswith("python -m onlinesel.bench step --preset tiny --rows 2")
    assert all(result[name] for name in ("date", "processor", "torch", "threads", "versions"))
    assert drawing.read_bytes()[:4] == b"\x89PNG"


def test_checkpointing_and_reusing_keep_the_gradient(tiny: tuple[dict[str, Any], Path]) -> None:
    sides = tiny[0]["sides"]
    compared = {n: e["gradient_difference"] for n, e in sides.items() if "gradient_difference" in e}
    assert list(compared) == ["all_checkpointed", "selected_checkpointed", "selected_reused"]
    assert max(compared.values()) < 1e-6


def test_another_gradient_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def first_step(sizes: Any, side: Any) -> FirstStep:
        step = _bench_trainer.first_step(sizes, side)
        if not side.reuses:
            return step
        return replace(step, gradient={n: g * 1.001 for n, g in step.gradient.items()})

    timed = mock.Mock(return_value=[1.0])
    with mock.patch.multiple(bench_step, first_step=first_step, seconds=timed):
        words = "step --preset tiny --rows 1 --tokens 8 --steps 1 --repeats 1 --device cpu"
        assert main([*words.split(), "--no-memory", "--strategy", "TopLoss"]) == 1
    printed = capsys.readouterr()
    message = "selected, reuse_forward: its gradient differs by 1.0e-03, more than 1e-05"
    assert message in printed.out and f"onlinesel bench step: {message}" in printed.err


def test_a_side_that_fails_is_told_and_the_others_go_on() -> None:
    sizes = replace(TINY, strategy="RHOLoss")
    with mock.patch.object(bench_step, "seconds", mock.Mock(return_value=[1.0])):
        result = bench_step.bench_step(sizes, repeats=1, memory=False)
    sides = result["sides"]
    for name in ("selected", "selected_checkpointed", "selected_reused"):
        assert sides[name]["failed"].startswith("ValueError: OnlineSelection: reference must be")
    assert sides["all_checkpointed"]["over_all"] > 0 and len(result["not_measured"]) == 3


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_checkpointing_saves_memory() -> None:
    checkpointed, plain = in_fresh_process(_peaks)
    # 12 layers' activations of 32 x 64 tokens, or those of one and the inputs of all.
    assert 40 < plain < 80 and 0 < checkpointed < plain / 3


def _peaks() -> list[float | None]:
    with mock.patch.dict(PRESETS, tiny={**PRESETS["tiny"], "num_hidden_layers": 12}):
        sizes = replace(TINY, rows=8, tokens=64)
        return [step_peak(sizes, SIDES[name]) for name in ("all_checkpointed", "all")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "qwen"}, "bench_step: preset must be one of tiny, small, .*, got 'qwen'. C"),
        ({"strategy": "uds"}, "bench_step: strategy must be one of .*UDS.*, got 'uds'. Did"),
        ({"candidates": 1}, "bench_step: candidates must be at least 2, got 1. Pass more"),
        ({"tokens": 1}, "bench_step: tokens must be at least 2, got 1. Pass more"),
        ({"rows": 0}, "bench_step: rows must be at least 1, got 0. Pass a positive"),
        ({"micro_batch": 3}, "bench_step: micro_batch must divide the 4 candidates of a step, got"),
        ({"dtype": "float8"}, "bench_step: dtype must be one of float32, .*, got 'float8'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **arguments)
