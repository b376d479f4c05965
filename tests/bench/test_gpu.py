"""`onlinesel bench gpu`: phases fail, overrun and are killed, and what was measured stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onlinesel.bench import bench_gpu
from onlinesel.bench.gpu import figure
from onlinesel.bench.gpu._runner import _alone
from onlinesel.bench.gpu._targets import TARGETS, judge
from tests.bench import gpu_phases as made

ROOT = Path(__file__).resolve().parents[2]


def content(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"gpu_{name}.json").read_text())
    return found


def run(folder: Path, *phases: Any, **more: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    result = bench_gpu(out=folder, device="cpu", phases=phases, say=said.append, **more)
    return result, said


def gone(pid: int) -> bool:
    """Return whether a process is gone, which may take the system a moment."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """One call over phases of every kind."""
    folder = tmp_path_factory.mktemp("gpu")
    phases = (made.RAISES, made.DIES, made.SLEEPS, made.LEFT_OUT, made.WORKS)
    return folder, *run(folder, *phases)


def test_each_phase_ends_in_its_own_way(ended: Any) -> None:
    folder, result, said = ended
    states = {name: entry["status"] for name, entry in result["phases"].items()}
    assert states == {
        "raises": "failed", "dies": "failed", "sleeps": "overran", "left_out": "left out",
        "works": "done",
    }  # fmt: skip
    assert {name: content(folder, name)["status"] for name in states} == states
    assert result["not_done"] == ["raises", "dies", "sleeps"]
    assert [line.split("; ")[1].split(" in ")[0] for line in said] == [
        "raises: failed", "dies: failed", "sleeps: overran", "left_out: left out", "works: done"
    ]  # fmt: skip


def test_a_failed_phase_leaves_its_traceback_and_what_it_had(ended: Any) -> None:
    folder = ended[0]
    found = content(folder, "raises")
    assert found["error"] == "RuntimeError: the kernel is wrong"
    assert "in raises" in found["traceback"] and found["result"] == {"so far": 1}
    assert content(folder, "dies")["error"] == "its process ended with exit code -9"
    assert content(folder, "left_out")["error"] == "transformers is not installed"


def test_a_phase_that_overruns_is_ended_with_its_children(ended: Any) -> None:
    found = content(ended[0], "sleeps")
    assert found["result"]["so far"] == 2 and 2 <= found["seconds"] < 7
    assert gone(found["result"]["child"])


def test_phases_run_apart_and_print_into_their_logs(ended: Any) -> None:
    folder, result, _ = ended
    found = content(folder, "works")
    assert found["result"] == {"device": "cpu", "tiny": True, "pid": found["result"]["pid"]}
    assert found["result"]["pid"] != os.getpid()
    assert (folder / "gpu_works.log").read_text() == "a line for the log\n"
    assert not list(folder.glob("*.part"))
    assert found["source"] == result["source"] and found["machine"]["torch"]


def test_a_second_call_goes_on_and_leaves_alone_what_is_done(tmp_path: Path) -> None:
    first, _ = run(tmp_path, made.WORKS, made.SLEEPS, minutes=0.7)
    pid = content(tmp_path, "works")["result"]["pid"]
    assert first["not_done"] == ["sleeps"]
    mended = replace(made.SLEEPS, work=made.works)
    second, said = run(tmp_path, made.WORKS, mended)
    assert second["not_done"] == [] and len(said) == 1
    assert content(tmp_path, "works")["result"]["pid"] == pid
    run(tmp_path, made.WORKS, again=True)
    assert content(tmp_path, "works")["result"]["pid"] != pid


def test_minutes_hold(tmp_path: Path) -> None:
    """What cannot end in time is not begun, and is named."""
    long = replace(made.SLEEPS, limit=100)
    began = time.monotonic()
    result, said = run(tmp_path, made.WORKS, long, minutes=0.6)
    assert time.monotonic() - began < 36 + 20
    assert result["phases"]["sleeps"]["status"] == "not run" and result["not_done"] == ["sleeps"]
    assert len(said) == 1


def test_what_other_code_measured_is_measured_again(tmp_path: Path) -> None:
    run(tmp_path, made.WORKS)
    path = tmp_path / "gpu_works.json"
    path.write_text(json.dumps(content(tmp_path, "works") | {"source": "older"}))
    result, said = run(tmp_path, made.WORKS)
    assert len(said) == 1 and content(tmp_path, "works")["source"] == result["source"]
    path.write_text(json.dumps(content(tmp_path, "works") | {"key": {"device": "H100"}}))
    with pytest.raises(ValueError, match="bench_gpu: out must hold results of this machine, .*cpu"):
        run(tmp_path, made.WORKS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killing_the_call_keeps_what_is_done_and_ends_the_phase(tmp_path: Path) -> None:
    code = (
        "from tests.bench.gpu_phases import WAITS, WORKS\nfrom onlinesel.bench import bench_gpu\n"
        "if __name__ == '__main__':\n"
        f"    bench_gpu(out={str(tmp_path / 'out')!r}, device='cpu', phases=(WORKS, WAITS))\n"
    )
    script, marker = tmp_path / "script.py", tmp_path / "marker"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONLINESEL_TEST_MARKER": str(marker)}
    words = [sys.executable, str(script)]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    path, found = tmp_path / "out/gpu_waits.json", {}
    for _ in range(600):
        time.sleep(0.1)
        found = json.loads(path.read_text()) if path.exists() else {}
        if "result" in found:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert found["status"] == "running" and gone(found["result"]["pid"])
    assert content(tmp_path / "out", "works")["status"] == "done"
    marker.touch()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "0 of 1 ended" not in done.stdout and "1 of 1 ended; waits: done" in done.stdout
    assert content(tmp_path / "out", "waits")["result"] == {"second": True}


def test_what_the_processes_are_forked_from_has_not_asked_for_a_gpu() -> None:
    code = (
        "import sys, torch\nfrom onlinesel.bench.gpu._runner import _SERVER\n"
        "assert _SERVER == ['torch', 'onlinesel.bench'] and 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    asked = "import torch\ndef asked(*_): raise AssertionError('asked')\n" + "".join(
        f"torch.cuda.{name} = asked\n" for name in ("is_available", "device_count", "_lazy_init")
    )
    subprocess.run([sys.executable, "-c", asked + code], check=True, timeout=120)


@pytest.mark.parametrize(("seen", "device", "alone"), [
    (None, "cuda:1", "1"), ("", "cuda:0", "0"), ("2,5", "cuda:1", "5"),
    ("GPU-a1", "cuda:0", "GPU-a1"),
])  # fmt: skip
def test_a_phase_sees_one_gpu(
    seen: str | None, device: str, alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert _alone(device) == "cuda:0" and os.environ["CUDA_VISIBLE_DEVICES"] == alone


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bench_gpu: only must be among works, got 'speed'. Leave"):
        run(tmp_path, made.WORKS, only=["speed"])
    with pytest.raises(ValueError, match="bench_gpu: minutes must be positive, got 0. Pass 8."):
        run(tmp_path, made.WORKS, minutes=0)
    with pytest.raises(ValueError, match="bench_gpu: device must be .*, got 'tpu'. Pass auto"):
        bench_gpu(out=tmp_path, device="tpu", phases=(made.WORKS,))


def results(**changes: float) -> dict[str, Any]:
    """Return files of phases whose figures are worked out by hand."""
    at = {"gemm": 7.0, "tile": 10.0, "triton": 9.0, "trl": 18.0, "plain": 2.0, "uds": 0.004}
    at |= changes
    entries = {name: {"seconds": value} for name, value in at.items()}
    side = {"over_all": 1.7, "over_all_checkpointed": 2.0}
    return {
        "scores_896": {"result": {"points": [{"token_scores": entries}]}},
        "uds_3584": {"result": {"points": [{"uds": entries}]}},
        "policy": {"result": {"points": [
            {"dropped": 0.8, "speedup": {"backward_over_trl": 3.5}},
            {"dropped": 0.0, "speedup": {"backward_over_trl": 1.0}},
        ]}},
        "steps": {"result": {"sides": {
            "selected": side, "selected_checkpointed": side,
            "selected_reused": side | {"over_all_checkpointed": 2.2},
        }}},
        "callback": {"result": {"waits_UDS": {"rows": {"full": {"beyond": 3}}}}},
    }  # fmt: skip


def test_targets_are_read_from_the_files() -> None:
    found = {(row["phase"], row["goal"]): row for row in judge(results())}
    assert len(found) < len(TARGETS) == len(judge({}))

    def verdict(phase: str, goal: float) -> tuple[Any, str]:
        row = found[phase, goal]
        return row["measured"], row["verdict"]

    assert verdict("scores_896", 0.70) == (pytest.approx(7 / 9), "met")
    assert verdict("scores_896", 1.0) == (pytest.approx(2.0), "met")
    assert verdict("scores_1536", 0.75) == (None, "not measured")
    assert verdict("uds_3584", 10.0) == (pytest.approx(4.0), "met")
    assert verdict("uds_3584", 100.0) == (pytest.approx(500.0), "met")
    assert verdict("policy", 3.0) == (3.5, "met")
    assert verdict("steps", 1.6) == (1.7, "met") and verdict("steps", 2.1) == (2.2, "met")
    assert [r["verdict"] for r in judge(results()) if r["phase"] == "callback"] == [
        "missed", *["not measured"] * 3
    ]  # fmt: skip
    slow = {(row["phase"], row["goal"]): row for row in judge(results(gemm=5.0, uds=0.02))}
    assert slow["scores_896", 0.70]["verdict"] == slow["uds_3584", 10.0]["verdict"] == "missed"
    tiny = {name: file | {"key": {"tiny": True}} for name, file in results().items()}
    assert {row["verdict"] for row in judge(tiny)} == {"not measured"}


def test_a_clone_that_is_not_installed_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onlinesel.callbacks", None)  # as where there is none
    with pytest.raises(RuntimeError, match="bench_gpu: onlinesel must be installed, got a clone"):
        bench_gpu(1, tmp_path, device="cpu")


def test_the_share_of_a_search_is_its_winners() -> None:
    ways = {"a": {"of_gemm": 0.6}, "b": {"of_gemm": 0.8}}
    for winner, measured in (("b", 0.8), (None, None)):
        point = {"winner": winner, "ways": ways}
        rows = judge({"blocks_896": {"result": {"points": [point]}}})
        assert [r["measured"] for r in rows if r["phase"] == "blocks_896"] == [measured]


def test_the_figure_shows_shares_of_the_targets(tmp_path: Path) -> None:
    figure({"targets": judge(results())}, str(tmp_path / "drawing.png"))
    assert (tmp_path / "drawing.png").read_bytes()[:4] == b"\x89PNG"
