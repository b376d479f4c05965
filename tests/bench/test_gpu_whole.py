"""The whole of `onlinesel bench gpu` at tiny sizes: every phase, with its numbers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from onlinesel.bench import main
from onlinesel.bench.gpu._phases import PHASES
from onlinesel.bench.gpu.page import filled

NAMES = [phase.name for phase in PHASES]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the command as a user does, and again where a busy machine left something."""
    folder = tmp_path_factory.mktemp("gpu")
    words = ["gpu", "--out", str(folder), "--device", "cpu", "--json", str(folder / "whole.json")]
    began = time.monotonic()
    main([*words, "--minutes", "2"])
    assert time.monotonic() - began < 140
    main([*words, "--minutes", "2.4"])
    whole = json.loads((folder / "whole.json").read_text())
    found = {name: json.loads((folder / f"gpu_{name}.json").read_text()) for name in NAMES}
    assert {name: file["status"] for name, file in found.items()} == dict.fromkeys(NAMES, "done")
    assert {row["verdict"] for row in whole["targets"]} == {"not measured"}  # tiny sizes
    return found


def test_ceilings_and_tests(files: dict[str, Any]) -> None:
    environment = files["environment"]["result"]
    product = environment["product"]
    assert product["tflops"] == pytest.approx(2 * 256**3 / product["seconds"] / 1e12)
    tests = files["tests"]["result"]
    assert tests["passed"] == 0 and tests["failed"] == [] and len(tests["skipped"]) > 50
    assert all("needs a CUDA device" in text for text in tests["skipped"])


@pytest.mark.parametrize("name", ["scores_896", "scores_1536", "scores_3584"])
def test_kernels_are_played_and_right(files: dict[str, Any], name: str) -> None:
    entries = files[name]["result"]["points"][0]["token_scores"]
    for backend in ("torch", "tile", "triton"):
        error = entries[backend]["error"]
        assert error["nll"]["max_abs"] < 1e-4 and error["entropy"]["max_abs"] < 1e-4
    assert entries["trl"]["error"]["nll"]["max_abs"] > 100 * error["nll"]["max_abs"]


def test_scores_of_uds(files: dict[str, Any]) -> None:
    entries = files["uds_3584"]["result"]["points"][0]["uds"]
    assert entries["uds"]["error"]["nuclear_norm"]["relative"] < 1e-5


def test_the_policy_has_backwards_apart(files: dict[str, Any]) -> None:
    points = files["policy"]["result"]["points"]
    assert [point["dropped"] for point in points] == [0.0, 0.5, 0.8]
    for point in points:
        for backend in ("torch", "tile", "triton"):
            entry = point["ways"][backend]
            assert 0 <= entry["backward_seconds"] < entry["seconds"]
            assert entry["error"]["weight"]["relative"] < 1e-2  # of a gradient in bfloat16


def test_candidates_of_the_fused_kernel(files: dict[str, Any]) -> None:
    for name in ("blocks_896", "blocks_3584"):
        ways = files[name]["result"]["points"][0]["ways"]
        assert len(ways) > 8 and not [way for way in ways.values() if "failed" in way]


def test_steps_and_the_callback(files: dict[str, Any]) -> None:
    sides = files["steps"]["result"]["sides"]
    assert sides["selected_reused"]["gradient_difference"] < 1e-5
    callback = files["callback"]["result"]
    idle = callback["idle"]
    assert idle["cost"] == pytest.approx(idle["seconds"] / idle["plain_seconds"] - 1)
    assert callback["waits_UDS"]["rows"]["padded"]["beyond"] >= 0


def test_every_phase_has_its_table_in_the_page(files: dict[str, Any]) -> None:
    found = {name: {**file, "key": {"tiny": False}} for name, file in files.items()}
    text = filled("<!-- gpu: everything -->\n<!-- end -->", found)
    for phase in PHASES:
        part = text.split(f"### {phase.name}: ")[1].split("\n### ")[0]
        assert "```text" in part and len(part.splitlines()) > 4, phase.name
