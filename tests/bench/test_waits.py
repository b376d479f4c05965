"""Waits of the host for the device: each kind is seen, by its line, and nothing else is."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from onlinesel.bench import _waits
from onlinesel.bench._measure import in_fresh_process
from onlinesel.bench._waits import HostWaits, Wait
from onlinesel.recipes import _bench_waits
from onlinesel.recipes._bench_trainer import StepSizes
from onlinesel.recipes._bench_waits import beyond_plain
from tests.bench.simulated_kinds import GOING_ON, SIMULATES, WAITING, recorded, trained
from tests.launching import settle

simulated = pytest.mark.skipif(not SIMULATES, reason="torch takes no device written in Python")


@pytest.fixture(scope="module")
def kinds() -> dict[str, list[str]]:
    return in_fresh_process(recorded)


@simulated
@pytest.mark.parametrize("name", WAITING)
def test_each_kind_of_wait_is_seen_once(kinds: dict[str, list[str]], name: str) -> None:
    assert kinds[name] == WAITING[name][1]


@simulated
@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait_is_not_counted(kinds: dict[str, list[str]], name: str) -> None:
    assert kinds[name] == []


@simulated
def test_the_simulated_device_computes_what_the_host_does() -> None:
    host, device, refused = in_fresh_process(trained)
    assert host == device and host[0][0][0] != -1
    assert "expected all tensors to be on the same device" in refused


def test_a_cpu_is_never_waited_for() -> None:
    with pytest.raises(ValueError, match="HostWaits: device must be a CUDA .*, got cpu. A CPU is"):
        HostWaits(torch.device("cpu"))


class FakeProfiler:
    """What the profiler of torch would tell."""

    def __init__(self, activities: Any) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def key_averages(self) -> list[Any]:
        counts = {"cudaStreamSynchronize": 3, "cudaLaunchKernel": 9, "Memcpy DtoH (Device)": 2}
        return [SimpleNamespace(key=key, count=count) for key, count in counts.items()]


def test_warnings_of_cuda_become_lines() -> None:
    modes: list[Any] = []
    shown: list[str] = []
    with (
        mock.patch.object(torch.profiler, "profile", FakeProfiler),
        mock.patch.object(torch.cuda, "get_sync_debug_mode", lambda: 2),
        mock.patch.object(torch.cuda, "set_sync_debug_mode", modes.append),
        mock.patch.object(warnings, "showwarning", lambda message, *_, **__: shown.append(message)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        before = warnings.showwarning
        with HostWaits(torch.device("cuda")) as seen:
            assert modes == ["warn"]
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=2)
            line = sys._getframe().f_lineno - 1
            warnings.warn("something else", stacklevel=1)
        assert warnings.showwarning is before
    assert modes == ["warn", 2] and [str(text) for text in shown] == ["something else"]
    name = "test_warnings_of_cuda_become_lines"
    assert seen.by_line() == {Wait("synchronises", f"{__name__}:{line}", name, None): 2}
    assert seen.calls == {"cudaStreamSynchronize": 3, "Memcpy DtoH (Device)": 2}


def test_lines_are_those_of_the_package_and_of_what_it_calls() -> None:
    code = "def inner():\n  return place('item', frame())\ndef outer(call):\n  return [call()][0]\n"
    ours: dict[str, Any] = {"__name__": "onlinesel.made"}
    theirs: dict[str, Any] = {"__name__": "transformers.made"}
    for names in (ours, theirs):
        exec(code, names | {"place": _waits._place, "frame": sys._getframe}, names)
        for function in ("inner", "outer"):
            names[function].__globals__.update(__name__=names["__name__"])
    assert theirs["outer"](ours["inner"]) == Wait(
        "item", "onlinesel.made:2", "inner", "onlinesel.made inner"
    )
    assert ours["outer"](theirs["inner"]) == Wait(
        "item", "transformers.made:2", "inner", "onlinesel.made outer"
    )


def test_what_the_plain_step_waits_for_is_not_beyond_it() -> None:
    hook, scorer = "onlinesel.callbacks.hf OnlineSelection._on_log", "onlinesel.scoring S._hidden"
    plain = [Wait("item", "transformers.a:1", "f", None)] * 2
    selected = [
        Wait("item", "transformers.b:7", "g", scorer),
        Wait("item", "onlinesel.step:3", "h", "onlinesel.step h"),
        Wait("item", "transformers.a:1", "f", hook),
        Wait("item", "transformers.a:1", "f", hook),
        Wait("equal", "transformers.a:1", "f", hook),
    ]
    found = [(line["line"], line["kind"], line["beyond"]) for line in beyond_plain(selected, plain)]
    assert sorted(found) == [
        ("onlinesel.step:3", "item", 1),
        ("transformers.a:1", "equal", 1),
        ("transformers.a:1", "item", 0),
        ("transformers.b:7", "item", 1),
    ]


@simulated
@pytest.mark.slow
def test_what_is_left_beyond_a_plain_step_is_documented() -> None:
    cases = [
        StepSizes("tiny", rows=2, tokens=16, accumulate=times, device="cpu", strategy=strategy)
        for strategy in ("TopLoss", "UDS")
        for times in (1, 2)
    ]
    found = in_fresh_process(_settled, cases)
    assert json.loads(json.dumps(found)) == found and found[0]["device"] == "simulated:0"
    left, counted = set(), []
    for case in found:
        for rows in case["rows"].values():
            assert rows["selected"] == sum(line["count"] for line in rows["lines"])
            assert rows["beyond"] == rows["selected"] - rows["plain"]
            extra = [line for line in rows["lines"] if line["beyond"]]
            left |= {(line["through"], line["kind"]) for line in extra}
            ours = [line for line in extra if line["line"].startswith("onlinesel.")]
            assert [(line["function"], line["beyond"]) for line in ours] == [("united", 1)]
        counted.append([case["rows"][kind]["beyond"] for kind in ("full", "padded")])
    text = (Path(__file__).parents[2] / "docs/waits.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "|" in line
    ]
    table = rows[[row[0] for row in rows].index("through") + 2 :]
    listed = {
        (row[0].strip("`"), row[1]) for row in table if len(row) == 4 and "onlinesel." in row[0]
    }
    assert listed == left
    assert [
        [int(x) for x in row[2:]] for row in rows if row[0] in ("`TopLoss`", "`UDS`")
    ] == counted


def _settled(cases: list[StepSizes]) -> Any:
    settle()
    return _bench_waits._simulated(cases)


@pytest.mark.gpu
def test_cuda_is_waited_for_where_it_says() -> None:
    values = torch.ones(3, device="cuda")
    with HostWaits(torch.device("cuda")) as seen:
        values.sum().item()
        values.double()
        values.nonzero()
    assert [wait.function for wait in seen.waits] == ["test_cuda_is_waited_for_where_it_says"] * 2
    assert torch.cuda.get_sync_debug_mode() == 0
