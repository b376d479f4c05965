"""Seconds, memory and counted products, and that what does not run is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from onlinesel.bench import _measure, _ways
from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import CountedProducts, in_fresh_process, take_turns
from onlinesel.bench._settings import find_device
from onlinesel.bench._text import speed_of, table, unmeasured
from onlinesel.bench._ways import Way, compare, own_failures

CPU = torch.device("cpu")


def test_a_slow_way_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call is its measurement; the others have their runs, and a peak."""
    called: list[str] = []
    seconds = {"slow": 21.0, "fast": 0.5}

    def way(name: str) -> Way:
        return Way(name, name, lambda inputs: lambda: called.append(name) or {}, counted=False)

    def timed(call: Callable[[], object], device: torch.device) -> float:
        call()
        return seconds[called[-1]]

    monkeypatch.setattr(_ways, "timed", timed)
    monkeypatch.setattr(_measure, "timed", timed)
    inputs = HeadInputs(HeadSizes(1, 2, 4, 9))
    ways = (way("slow"), way("fast"))
    found = compare(ways, inputs, lambda way, output: {}, repeats=3, memory=False)
    assert called.count("slow") == 1 and called.count("fast") == 4
    assert found["slow"]["seconds"] == 21.0 and found["slow"]["runs"] == 1 and found["slow"]["cold"]
    assert found["fast"]["seconds"] == 0.5 and found["fast"]["runs"] == 3
    assert "cold" not in found["fast"]


def test_products_are_counted_forward_and_backward() -> None:
    states, weight = torch.randn(3, 4, 5), torch.randn(7, 5, requires_grad=True)
    with CountedProducts() as counted, torch.no_grad():
        linear(states, weight)
    assert counted.flops == 2 * 12 * 5 * 7
    with CountedProducts() as counted:
        linear(states.requires_grad_(), weight, torch.ones(7)).sum().backward()
    assert counted.flops == 3 * 2 * 12 * 5 * 7
    with CountedProducts() as counted:
        out = torch.mm(torch.ones(2, 4), torch.ones(4, 3), out=torch.empty(2, 3))
        out.addmm_(torch.ones(2, 4), torch.ones(4, 3))
    assert counted.flops == 2 * (2 * 2 * 4 * 3)
    # On CUDA the dtype of the result comes fourth.
    matrices = torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3)
    wide = counted._count(torch.ops.aten.addmm, (*matrices, torch.float32), {}, matrices[0])
    assert wide == 2 * 2 * 4 * 3
    # Queries of 4 heads meet keys and values of 2: each head has two products of 6 x 6 x 8.
    query, key = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 2, 6, 8)
    with CountedProducts() as counted:
        attended = scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        forward = counted.flops
        attended.sum().backward()
    assert forward == 2 * 8 * 2 * 6 * 6 * 8 and counted.flops == forward + 5 * 8 * 2 * 6 * 6 * 8


def test_sides_take_turns_and_slow_ones_fewer() -> None:
    order: list[str] = []

    def timed(call: Callable[[], str], device: torch.device) -> float:
        order.append(call())
        return {"a": 0.5, "slow": 25.0, "slowest": 99.0}[order[-1]]

    def broken() -> str:
        raise RuntimeError("no kernel image")

    told: list[tuple[str, str]] = []
    calls = {name: partial(str, name) for name in ("a", "slow", "slowest")} | {"broken": broken}
    with mock.patch.object(_measure, "timed", timed):
        found = take_turns(calls, 3, CPU, lambda name, error: told.append((name, str(error))))
    assert order == ["a", "slow", "slowest", "a", "slow", "a"]
    assert found == {"a": [0.5] * 3, "slow": [25.0] * 2, "slowest": [99.0]}
    assert told == [("broken", "no kernel image")]


def returns(inputs: HeadInputs, value: float) -> Callable[[], float]:
    return lambda: value


def raises(inputs: HeadInputs) -> Callable[[], float]:
    raise RuntimeError("no kernel\nfor this")


def test_what_does_not_run_says_why() -> None:
    inputs = HeadInputs(HeadSizes(1, 2, 4, 8))
    ways = [
        Way("a", "a", partial(returns, value=2.0), ours=True),
        Way("roof", "roof", partial(returns, value=3.0), roof=True),
        Way("missing", "missing", raises, "surely_not_installed", cuda=True),
        Way("gpu", "gpu", raises, "torch", cuda=True),
        Way("broken", "broken", raises),
        Way("own", "own", raises, ours=True),
    ]
    checked: list[str] = []

    def check(way: Way, output: float) -> dict[str, float]:
        checked.append(way.name)
        return {"x": output}

    found = compare(ways, inputs, check, repeats=2, memory=False)
    assert checked == ["a"] and found["a"]["error"] == {"x": 2.0} and found["a"]["runs"] == 2
    assert found["a"]["seconds"] >= 0 and found["roof"]["error"] == {}
    assert found["missing"]["absent"] == "not installed"
    assert found["gpu"]["absent"] == "needs CUDA"
    assert found["broken"]["failed"] == "RuntimeError: no kernel\nfor this"
    assert own_failures({"points": [{"x": found}]}) == ["own: RuntimeError: no kernel\nfor this"]
    entries = list(found.values())
    assert unmeasured(entries)[:2] == ["missing: not installed", "gpu: needs CUDA"]
    lines = table("T", entries, [("x", lambda entry: entry["error"].get("x"), ".1f")]).splitlines()
    assert lines[2].split() == ["a", "2.0"] and lines[3] == "roof"
    assert speed_of({"seconds": 2.0})[1]({"seconds": 8.0}) == 0.25
    assert lines[5:7] == [
        "gpu      needs CUDA",
        "broken   failed: RuntimeError: no kernel for this",
    ]


def test_inputs_are_the_same_numbers_in_every_dtype() -> None:
    sizes = HeadSizes(2, 5, 16, 40, dropped=0.7)
    one = HeadInputs(sizes)
    assert int((one.upstream == 0).all(0).sum()) == 7 and one.upstream.shape == (2, 10)
    half = HeadInputs(HeadSizes(2, 5, 16, 40, torch.bfloat16, dropped=0.7))
    assert torch.equal(half.hidden, one.hidden.bfloat16())
    assert torch.equal(half.weight, one.weight.bfloat16())
    exact = one.states.double() @ one.weight.double().T
    assert torch.allclose(one.exact_logits(one.states), exact, rtol=1e-12)
    few = one.first(3)
    assert few.states.shape == (3, 16) and torch.equal(few.upstream, one.upstream[:, :3])


def test_devices_and_dtypes_have_names() -> None:
    assert find_device("x", "auto", "float16")[1] is torch.float16
    with pytest.raises(ValueError, match="x: dtype must be one of float32, .*, got 'float64'. F"):
        find_device("x", "cpu", "float64")
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        with pytest.raises(ValueError, match="x: device must be auto or cpu on a machine without"):
            find_device("x", "cuda", "float32")
    with pytest.raises(ValueError, match="x: device must be auto.*, got 'tpu'. Pass auto."):
        find_device("x", "tpu", "float32")


@pytest.mark.slow
def test_a_process_that_dies_is_not_waited_for() -> None:
    with pytest.raises(BrokenProcessPool):
        in_fresh_process(os._exit, 3)
