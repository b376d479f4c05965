"""`onlinesel bench compiled`: the counts are the assembler's, and the tables are the JSON's."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.bench import bench_compiled, compiled, main
from onlinesel.kernels._blocks import candidate_blocks

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "recipes" / "results").glob("kernels_compiled*.json"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def entries(result: dict[str, Any], arch: int) -> Iterator[dict[str, Any]]:
    (point,) = (point for point in result["points"] if point["arch"] == arch)
    return iter(point["kernels"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_document_holds_the_tables_of_the_file(path: Path) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    (block,) = re.findall(rf"<!-- {re.escape(path.name)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert block.strip() == compiled.markdown(json.loads(path.read_text())).strip()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_holds_what_a_search_tries_and_all_of_it_fits(path: Path) -> None:
    result = json.loads(path.read_text())
    for arch, kibibytes, product in ((80, 163, "mma.sync"), (90, 227, "wgmma"), (100, 227, "tcge")):
        found = {e["label"]: e for e in entries(result, arch)}
        for blocks in candidate_blocks(torch.bfloat16, kibibytes * 1024):
            entry = found[f"fused bfloat16 {blocks}"]
            assert entry["blocks"] == blocks._asdict()
            assert any(name.startswith(product) for name in entry["instructions"]), entry
            assert ("tma" in entry["instructions"]) == blocks.described
            assert entry["verdict"] != "does not fit" and entry["shared"] <= kibibytes * 1024
            if arch <= 90:  # which the sizes were chosen for
                assert entry["stack"] <= compiled.HARMFUL and entry["registers"] <= 255, entry
            if blocks.warps == 4:  # chosen because two of them fit
                assert entry["programs"] >= 2, entry
        names = ("tile", "gradient", "merge")
        small = [e for label, e in found.items() if label.startswith(names)]
        assert len(small) == 5 and all(e["verdict"] == "fits" for e in small)
    assert len(FILES) == 2 and len({json.loads(f.read_text())["triton"] for f in FILES}) == 2


@needs_triton
def test_the_counts_are_what_the_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tried = candidate_blocks(torch.bfloat16, 227 * 1024)
    one = {torch.bfloat16: tried[6:7]}
    monkeypatch.setattr(compiled, "candidate_blocks", lambda dtype, shared: one.get(dtype, ()))
    found = {entry["label"]: entry for entry in entries(bench_compiled([90]), 90)}
    assert {f"fused bfloat16 {tried[6]}", "tile, 4096 columns w8", "merge"} < found.keys()
    same = [file for file in FILES if json.loads(file.read_text())["triton"] == triton.__version__]
    for file in same:
        known = {entry["label"]: entry for entry in entries(json.loads(file.read_text()), 90)}
        for label in found.keys() & known.keys():
            assert found[label] == known[label]
    entry = found[f"fused bfloat16 {tried[6]}"]
    # Two steps of 64 x (128 + 128) 16-bit numbers, and a few barriers.
    assert 0 <= entry["shared"] - 2 * 64 * 256 * 2 < 256
    twin = found[f"fused bfloat16 {tried[6]._replace(described=False)} (not searched)"]
    assert entry["instructions"] == ["wgmma", "tma"]
    assert twin["instructions"] == ["wgmma", "cp.async"]


@needs_triton
def test_a_kernel_that_does_not_compile_is_listed_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compiled, "_kernels", lambda arch: [("mine", None, broken, 4)])
    assert main(["compiled", "--arch", "90"]) == 1
    printed = capsys.readouterr()
    assert "onlinesel bench compiled: mine: RuntimeError: no such instruction" in printed.err
    assert main(["compiled", "--arch", "90", "--markdown"]) == 1
    assert "| mine | | | | | | failed: RuntimeError: no such" in capsys.readouterr().out


def test_what_cannot_be_compiled_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bench_compiled: arch must be of 80, .*, got 70. Leave"):
        bench_compiled([90, 70])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="bench_compiled: kernels must be compiled, got .*Unset"):
        bench_compiled([90])
