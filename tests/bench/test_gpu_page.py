"""The documentation's GPU numbers are those of the committed files, and no others."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from onlinesel.bench import bench_grpo, bench_scores
from onlinesel.bench.gpu.page import draw, filled, main, read_results
from onlinesel.kernels import _measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes/results"
DOCUMENTS = {"docs/evidence.md": "targets", "docs/gpu.md": "everything"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_say_what_the_files_say(name: str) -> None:
    """Where this fails, run ``make results``."""
    text = (ROOT / name).read_text("utf-8")
    assert text.count(f"<!-- gpu: {DOCUMENTS[name]} -->") == text.count("<!-- end -->") == 1
    assert filled(text, read_results(RESULTS)) == text


def test_nothing_else_says_what_a_gpu_has_run() -> None:
    """A sentence outside the blocks would stay when the files change."""
    state = re.compile(r"not (yet )?(measured|timed|run) on a GPU|no GPU has|GPU has run", re.I)
    found = []
    for folder in ("onlinesel", "callbacks", "recipes", "docs", "README.md"):
        place = ROOT / folder
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.suffix in (".py", ".md") and path.name != "page.py":
                text = re.sub(r"<!-- gpu.*?<!-- end -->", "", path.read_text("utf-8"), flags=re.S)
                if state.search(text):
                    found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_the_table_of_measured_choices_is_that_of_the_files() -> None:
    """What a search prints as a row is in the table, and nothing else is."""
    rows = []
    for name, file in read_results(RESULTS).items():
        if name.startswith("blocks_") and file["status"] == "done":
            for point in file["result"]["points"]:
                entry = textwrap.dedent(point["entry"]).strip().rstrip(",")
                rows.append(eval(entry, {**vars(_measured)}))
    assert sorted(rows, key=str) == sorted(_measured.MEASURED, key=str)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a GPU would leave it, whose numbers a CPU made at tiny sizes."""
    folder = tmp_path_factory.mktemp("results")
    sizes: dict[str, Any] = {"device": "cpu", "memory": False, "repeats": 1}
    scores = bench_scores(4, 16, 60, **sizes)
    uds = {**scores, "points": [dict(point) for point in scores["points"]]}
    scores["points"][0].pop("uds")
    uds["points"][0].pop("token_scores")
    scores["points"][0]["token_scores"]["gemm"]["seconds"] = 0.004
    scores["points"][0]["token_scores"]["tile"] = {
        "label": "tile", "seconds": 0.005, "error": {}, "ours": True
    }  # fmt: skip
    machine = {"date": "2026-12-01T00:00:00Z", "gpu": "NVIDIA Test", "torch": "9.9",
               "python": "3.12", "versions": {"triton": "9"}, "processor": "x"}  # fmt: skip
    facts = {"key": {"tiny": False}, "machine": machine, "source": "abc", "what": "words"}
    files = {
        "environment": {"as_found": {"driver_version": "580"},
                        "product": {"size": 8192, "dtype": "bfloat16", "tflops": 798.4},
                        "copy": {"tb_per_second": 3.01}},
        "scores_896": scores,
        "uds_3584": uds,
        "policy": bench_grpo(4, 16, 60, dropped=[0.8], **sizes),
    }  # fmt: skip
    for name, result in files.items():
        write(folder, name, {**facts, "status": "done", "result": result})
    write(folder, "steps", {**facts, "status": "failed", "error": "RuntimeError: too large"})
    write(folder, "callback", {**facts, "key": {"tiny": True}, "status": "done"})
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"gpu_{name}.json").write_text(json.dumps(content))


def test_the_table_of_targets_is_made_of_the_files(measured: Path) -> None:
    text = filled("before\n<!-- gpu: targets -->\nold\n<!-- end -->\nafter", read_results(measured))
    assert text.startswith("before\n<!-- gpu: targets -->\n| | measured") and "old" not in text
    assert (
        "| token scores, d=896: speed of the bare product | 0.80 x | at least 0.7 x | met |" in text
    )
    assert "rows per second of all rows | - | at least 1.6 x | not measured |" in text
    assert "NVIDIA Test, driver 580, torch 9.9, Python 3.12, triton 9; 2026-12-01; seed 0" in text
    assert text.endswith("<!-- end -->\nafter")
    assert filled(text, read_results(measured)) == text


def test_the_page_has_every_table_and_what_failed(measured: Path) -> None:
    text = filled("<!-- gpu: everything -->\n<!-- end -->", read_results(measured))
    assert "copy, read and written: 3.01 TB/s" in text and "bfloat16: 798 TFLOP/s" in text
    assert "### steps: words\n\n```text\nfailed: RuntimeError: too large\n```" in text
    policy = json.loads((measured / "gpu_policy.json").read_text())["result"]
    ours = policy["points"][0]["ways"]["torch"]["seconds"]
    assert f"{ours * 1e3:.3f}" in text and "callback" not in text
    assert "UDS: nuclear norm and embedding of each row" in text


def test_figures_are_drawn_of_what_is_done(measured: Path) -> None:
    drawn = draw(read_results(measured), measured)
    assert [path.name for path in drawn] == [
        "gpu_policy.png",
        "gpu_scores_896.png",
        "gpu_uds_3584.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


def test_make_results_writes_into_the_documents(measured: Path, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- gpu: targets -->\n<!-- end -->\n")
    assert main([str(measured), str(document)]) == 0
    assert "NVIDIA Test" in document.read_text()
    assert main([str(tmp_path), str(document)]) == 0
    assert "**Not yet measured: no GPU has run this code.**" in document.read_text()


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="block must be one of targets, everything, got 'speeds'"):
        filled("<!-- gpu: speeds -->\n<!-- end -->", {"a": {}})
