"""`onlinesel bench scores`: ways agree, errors are errors, and the JSON says where."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from onlinesel.bench import bench_scores, main, scores
from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import in_fresh_process
from onlinesel.bench._tokens import TOKEN_WAYS, TokenErrors
from onlinesel.bench._uds import UDS_WAYS, UDSErrors, norm_by_gram
from onlinesel.bench._ways import Way, _grow

SMALL = "scores --tokens 6 --width 8,16 --vocab 300 --repeats 1 --device cpu"
WAYS = {way.name: way for way in (*TOKEN_WAYS, *UDS_WAYS)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("scores")
    path, drawing = folder / "result.json", folder / "drawing.png"
    words = [*SMALL.split(), "--no-memory", "--json", str(path), "--figure", str(drawing)]
    assert main(words) == 0
    return json.loads(path.read_text()), drawing


def test_all_ways_agree_and_the_json_says_where(small: tuple[dict[str, Any], Path]) -> None:
    result, drawing = small
    assert [point["width"] for point in result["points"]] == [8, 16]
    for point in result["points"]:
        ours = point["token_scores"]["torch"]["error"]
        assert ours["nll"]["max_abs"] < 2e-5 and ours["entropy"]["max_abs"] < 3e-5
        assert ours["el2n"]["max_rel"] < 1e-4
        for name in ("log_softmax", "trl"):
            assert point["token_scores"][name]["error"]["nll"]["max_abs"] < 2e-5, name
        for way in ("plain", "uds"):
            for name in ("nuclear_norm", "embedding"):
                assert point["uds"][way]["error"][name]["relative"] < 1e-5, (way, name)
        took = {n: e["seconds"] for n, e in point["token_scores"].items() if "seconds" in e}
        took |= {n: e["seconds"] for n, e in point["uds"].items()}
        ratios = point["speedup"]
        assert ratios["uds"] == took["plain"] / took["uds"]
        ours = took["uds"] + took["once_gram"] + took["once_fold"]
        assert ratios["uds_paying_once_every_batch"] == pytest.approx(took["plain"] / ours)
        assert ratios["token_scores_over_trl"] == took["trl"] / took["torch"]
    assert result["command"].startswith(
        "python -m onlinesel.bench scores --batch 1 --tokens 6 --width 8,16 --vocab 300"
    )
    for name in ("date", "processor", "torch", "threads", "cores", "versions", "device", "seed"):
        assert result[name] is not None, name
    assert drawing.read_bytes()[:4] == b"\x89PNG"


def test_what_is_missing_is_said(
    small: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = small[0]["points"][0]["token_scores"]
    assert entries["tile"]["absent"] == "needs CUDA" and "seconds" not in entries["tile"]
    with mock.patch.object(scores, "TOKEN_WAYS", (_missing(), *TOKEN_WAYS[:2])):
        result = bench_scores(2, 4, 9, repeats=1, device="cpu", memory=False)
        assert result["not_measured"] == ["Rival: not installed"]
        assert main([*SMALL.split(), "--no-memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["Rival", "not", "installed"] in [line.split() for line in lines]
    assert "Not measured: Rival: not installed" in lines


def _missing() -> Way:
    return Way("rival", "Rival", TOKEN_WAYS[0].prepare, "surely_not_installed")


def test_a_fault_of_ours_ends_in_an_error_after_everything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(inputs: HeadInputs) -> Any:
        raise RuntimeError("illegal address")

    path = tmp_path / "result.json"
    ways = (*TOKEN_WAYS[:2], Way("mine", "ours", broken, ours=True))
    with mock.patch.object(scores, "TOKEN_WAYS", ways):
        assert main([*SMALL.split(), "--no-memory", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert "onlinesel bench scores: ours: RuntimeError: illegal address" in printed.err
    assert "failed: RuntimeError: illegal address" in printed.out
    point = json.loads(path.read_text())["points"][0]["token_scores"]
    assert point["mine"]["failed"] == "RuntimeError: illegal address" and point["torch"]["seconds"]


def test_errors_of_tokens_by_hand() -> None:
    # Two logits, 0 and 3: p = (0.0474, 0.9526).
    inputs = HeadInputs(HeadSizes(1, 1, 1, 2))
    inputs.hidden, inputs.labels = torch.tensor([[[1.0]]]), torch.tensor([[0]])
    inputs.weight = torch.tensor([[0.0], [3.0]])
    errors = TokenErrors(inputs, 1)
    exact = {"nll": 3.048587, "entropy": 0.190865, "el2n": 0.952574 * 2**0.5}
    told = {name: torch.tensor([value + 0.5]) for name, value in exact.items()}
    found = errors(WAYS["torch"], told)
    for name, value in exact.items():
        assert found[name]["max_abs"] == pytest.approx(0.5, abs=1e-5), name
        assert found[name]["max_rel"] == pytest.approx(0.5 / value, abs=1e-5), name
    # What TRL's head gives, log(sum p^2), makes an EL2N too.
    squares = torch.tensor([0.047426**2 + 0.952574**2]).log()
    trl = {"nll": torch.tensor([exact["nll"]]), "log_sum_sq": squares}
    assert errors(WAYS["trl"], trl)["el2n"]["max_abs"] < 1e-5
    assert errors.largest_logit == 3.0


def test_errors_of_uds_by_hand() -> None:
    inputs = HeadInputs(HeadSizes(2, 3, 4, 20))
    logits = inputs.hidden[0].double() @ inputs.weight.double().T
    norm = torch.linalg.matrix_norm(logits, "nuc")
    errors = UDSErrors(inputs)
    found = errors(WAYS["uds"], {"nuclear_norm": torch.stack([norm * 1.25, norm])})
    assert found["nuclear_norm"]["relative"] == pytest.approx(0.25)


def test_a_bfloat16_head_keeps_its_digits_and_others_do_not() -> None:
    result = bench_scores(16, 32, 500, 1, device="cpu", dtype="bfloat16", memory=False)
    entries = result["points"][0]["token_scores"]
    ours = entries["torch"]["error"]["nll"]["max_abs"]
    assert ours < 2e-5 and entries["trl"]["error"]["nll"]["max_abs"] > 100 * ours


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_plain_way_peaks_at_more_than_its_logits() -> None:
    sizes = HeadSizes(1, 128, 64, 50_000)
    plain, ours = (in_fresh_process(_grow, WAYS[n].prepare, sizes) for n in ("plain", "uds"))
    logits = 128 * 50_000 * 4 / 2**20
    assert plain > 2 * logits and 0 < ours < logits / 2


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    result = bench_scores(2, 4, 9, 1, threads=before + 1, device="cpu", memory=False)
    assert result["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "bench_scores: tokens must be at least 1, got 0. Pass a"),
        ({"width": [8, 0]}, "bench_scores: width must be at least 1, got 0. Pass a"),
        ({"batch": 0}, "bench_scores: batch must be at least 1, got 0. Pass a"),
        (
            {"parts": ["speed"]},
            "bench_scores: parts must be among token_scores, uds, got 'speed'",
        ),
        ({"parts": []}, "bench_scores: parts must be among token_scores, uds, got ''. Pass one"),
        ({"dtype": "int8"}, "bench_scores: dtype must be one of float32, .*, got 'int8'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_scores(**{"device": "cpu", **arguments})


@pytest.mark.parametrize(("part", "other"), [("token_scores", "uds"), ("uds", "token_scores")])
def test_a_part_is_measured_alone(part: str, other: str, tmp_path: Path) -> None:
    result = bench_scores(4, 8, 50, 1, device="cpu", memory=False, parts=[part])
    (point,) = result["points"]
    assert part in point and other not in point and point["speedup"]
    assert ("UDS: nuclear norm" in scores.as_text(result)) == (part == "uds")
    scores.figure(result, str(tmp_path / "drawing.png"))


def test_the_norm_by_the_gram_matrix_is_near_that_by_singular_values() -> None:
    g = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, 20, dtype=torch.float64)
    logits = torch.randn(20, 500, generator=g, dtype=torch.float64) * spectrum.unsqueeze(1)
    exact = torch.linalg.svdvals(logits).sum()
    assert abs(float(norm_by_gram(logits) / exact - 1)) < 1e-8


def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured() -> None:
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        with mock.patch.object(scores, "run", side_effect=AssertionError("it ran")):
            with pytest.raises(ImportError, match="bench scores --figure needs matplotlib: pip"):
                main([*SMALL.split(), "--figure", "x.png"])
