"""`onlinesel bench grpo`: gradients agree, and skipped tokens cost nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.bench import bench_grpo, main
from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._policy import POLICY_WAYS, PolicyErrors

TOKENS, WIDTH, VOCAB = 20, 8, 9000  # more than a chunk of the vocabulary
WAYS = {way.name: way for way in POLICY_WAYS}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("grpo")
    path, drawing = folder / "result.json", folder / "drawing.png"
    words = f"grpo --tokens {TOKENS} --width {WIDTH} --vocab {VOCAB} --repeats 1 --device cpu"
    assert main([*words.split(), "--no-memory", "--json", str(path), "--figure", str(drawing)]) == 0
    return json.loads(path.read_text()), drawing


def test_gradients_agree_with_float64(small: tuple[dict[str, Any], Path]) -> None:
    result, drawing = small
    assert [point["dropped"] for point in result["points"]] == [0.0, 0.5, 0.8]
    for point in result["points"]:
        for name in ("torch", "log_softmax", "trl"):
            for part in ("states", "weight"):
                assert point["ways"][name]["error"][part]["relative"] < 1e-4, (name, part)
        assert point["ways"]["torch"]["error"]["weight"]["relative"] < 1e-5
        assert point["ways"]["tile"]["absent"] == "needs CUDA"
        took = {n: e["seconds"] for n, e in point["ways"].items() if "seconds" in e}
        assert point["speedup"]["over_trl"] == took["trl"] / took["torch"]
    assert result["gradients_mib"] == pytest.approx((TOKENS + VOCAB) * WIDTH * 4 / 2**20)
    assert result["command"].startswith("python -m onlinesel.bench grpo --batch 1 --tokens 20")
    assert drawing.read_bytes()[:4] == b"\x89PNG"


def test_tokens_without_gradient_are_no_work(small: tuple[dict[str, Any], Path]) -> None:
    product = 2 * TOKENS * WIDTH * VOCAB / 1e9
    for point in small[0]["points"]:
        kept = 1 - point["dropped"]
        counted = {n: e["gflop"] / product for n, e in point["ways"].items() if "gflop" in e}
        # Ours and TRL's make the logits again; only ours leaves tokens out.
        assert counted == pytest.approx(
            {
                "gemm": 3,
                "gemm_kept": 1 + 2 * kept,
                "torch": 1 + 3 * kept,
                "log_softmax": 3,
                "trl": 4,
            }
        )


def test_errors_of_gradients_by_hand() -> None:
    inputs = HeadInputs(HeadSizes(1, 4, 3, 7))
    errors = PolicyErrors(inputs, 4)
    states = inputs.states.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    p = torch.softmax(states @ weight.T, dim=1)
    chosen = p[torch.arange(4), inputs.labels[0]].log()
    loss = (inputs.upstream[0] * chosen).sum() - (inputs.upstream[1] * (p * p.log()).sum(1)).sum()
    loss.backward()

    class Told:
        def __init__(self, states: float, weight: float) -> None:
            self.factors = {"states": states, "weight": weight}

        def prepare(self, inputs: HeadInputs) -> Any:
            exact = {"states": states.grad[None], "weight": weight.grad}
            return lambda: {name: exact[name] * factor for name, factor in self.factors.items()}

    def told(*factors: float) -> dict[str, float]:
        found = errors(Told(*factors), None)  # type: ignore[arg-type]
        return {name: value["relative"] for name, value in found.items()}

    assert told(1.0, 1.0) == pytest.approx({"states": 0.0, "weight": 0.0}, abs=1e-6)
    assert told(1.5, -1.0) == pytest.approx({"states": 0.5, "weight": 2.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 0}, "bench_grpo: vocab must be at least 1, got 0. Pass a positive integer."),
        ({"dropped": [1.0]}, "bench_grpo: dropped must be shares of at least 0 and below 1, got 1"),
        ({"device": "tpu"}, "bench_grpo: device must be auto.*, got 'tpu'. Pass auto."),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_grpo(**{"device": "cpu", **arguments})
