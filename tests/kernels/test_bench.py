"""The benchmark runs, agrees with itself, and writes what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from onlinesel.bench import bench_scores, main

SMALL = ["scores", "--tokens", "6", "--width", "8", "--vocab", "300", "--repeats", "1"]


def test_both_sides_agree_and_the_json_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    assert main([*SMALL, "--no-memory", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for name in ("nuclear_norm", "embedding", "nll", "entropy"):
        assert result["error"][name] < 1e-5, name
    assert result["seconds"]["uds"] > 0 and result["speedup"]["uds"] > 0
    assert result["command"].startswith("python -m onlinesel.bench scores --tokens 6 --width 8")
    for name in ("date", "processor", "torch", "threads", "cores"):
        assert result[name], name
    printed = capsys.readouterr().out
    assert "UDS: logits + svdvals + FFT" in printed and "relative difference, embedding" in printed


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_plain_way_peaks_at_more_than_its_logits() -> None:
    peak = bench_scores(128, 64, 50_000, 1)["peak_mib"]
    logits = 128 * 50_000 * 4 / 2**20
    assert peak["plain"] > 2 * logits and peak["uds"] < logits / 2


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    assert bench_scores(2, 4, 9, 1, threads=before + 1, memory=False)["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="bench_scores: tokens must be at least 1, got 0. Pass a"):
        bench_scores(tokens=0)
