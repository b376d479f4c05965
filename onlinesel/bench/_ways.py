"""Ways to compute the same thing, timed side by side; those of other packages where installed.

Nothing is left out in silence: a way that cannot run here says why, and one that raises is listed
with its error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import (
    Call,
    CountedProducts,
    Peak,
    in_fresh_process,
    take_turns,
    timed,
)
from onlinesel.kernels._backend import interpreting

__all__ = ["SLOW", "Way", "compare", "fused_head", "liger_scaled", "note_failure", "own_failures"]

Entry = dict[str, Any]
Check = Callable[["Way", Any], dict[str, Any]]

SLOW = 20.0  # seconds of a call beside which what only a first call pays is little


@dataclass(frozen=True)
class Way:
    """One way.

    Args:
        name: In the JSON.
        label: In tables and figures.
        prepare: Makes of the inputs the call that is timed. A function of a module, or a partial
            of one, so that a fresh process finds it.
        package: Module that it needs, besides torch.
        cuda: Whether it needs CUDA, or if it is ours Triton's interpreter.
        ours: Whether it is this project's.
        counted: Whether its products are seen by :class:`CountedProducts`.
        roof: Whether it is only what no way can be faster than: it has no errors and no peak.
    """

    name: str
    label: str
    prepare: Callable[[HeadInputs], Call]
    package: str | None = None
    cuda: bool = False
    ours: bool = False
    counted: bool = True
    roof: bool = False

    def absent(self, device: torch.device) -> str | None:
        """Return why it cannot run here, None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        able = device.type == "cuda" or (self.ours and interpreting())
        return "needs CUDA" if self.cuda and not able else None


def note_failure(entry: Entry, error: Exception) -> None:
    """Write an error down where the numbers would be."""
    entry["failed"] = f"{type(error).__name__}: {error}"


def own_failures(found: Any) -> list[str]:
    """Return label and error of everything of this project that failed, anywhere in a result.

    Example:
        >>> own_failures([{"x": {"label": "a", "ours": True, "failed": "ValueError: b"}}])
        ['a: ValueError: b']
    """
    if isinstance(found, list):
        return [line for value in found for line in own_failures(value)]
    if not isinstance(found, dict):
        return []
    own = (
        [f"{found['label']}: {found['failed']}"] if found.get("ours") and "failed" in found else []
    )
    return own + own_failures(list(found.values()))


def compare(
    ways: Sequence[Way],
    inputs: HeadInputs,
    check: Check,
    *,
    repeats: int,
    memory: bool,
) -> dict[str, Entry]:
    """Check, time and weigh ways on the same inputs.

    Args:
        ways: The ways.
        inputs: What they work on.
        check: Returns the errors of one, given what its call returned.
        repeats: Timed runs of each.
        memory: Whether to measure peak memory, on a CPU in a fresh process each.

    Returns:
        By name ``label`` and ``ours``, and either ``absent``, ``failed``, or ``seconds`` (median),
        ``runs``, ``spread`` (fastest and slowest), ``error``, ``gflop`` and ``peak_mib``. A way
        that takes longer than :data:`SLOW` is called once: ``cold``, and without a peak.
    """
    device = inputs.sizes.device
    found: dict[str, Entry] = {}
    calls: dict[str, Call] = {}
    taken: dict[str, list[float]] = {}
    for way in ways:
        entry = found[way.name] = {"label": way.label, "ours": way.ours}
        reason = way.absent(device)
        if reason is not None:
            entry["absent"] = reason
            continue
        try:
            calls[way.name] = way.prepare(inputs)
            first = _first_call(way, calls[way.name], check, entry, device)
            if first > SLOW:
                entry["cold"] = True
                taken[way.name] = [first]
        except Exception as error:
            note_failure(entry, error)
            calls.pop(way.name, None)
    again = {name: call for name, call in calls.items() if name not in taken}
    taken |= take_turns(again, repeats, device, lambda n, e: note_failure(found[n], e))
    for name, seconds in taken.items():
        found[name] |= {
            "seconds": median(seconds), "runs": len(seconds), "spread": [min(seconds), max(seconds)]
        }  # fmt: skip
    if memory:
        for way in ways:
            if way.name in taken and not way.roof and "cold" not in found[way.name]:
                _weigh(way, inputs, calls[way.name], found[way.name])
    return found


def _first_call(way: Way, call: Call, check: Check, entry: Entry, device: torch.device) -> float:
    """Call a way for the first time, note its errors and products; return its seconds."""
    output: Any = None

    def kept() -> None:
        nonlocal output
        output = call()

    with CountedProducts() as counted:
        seconds = timed(kept, device)
    entry["error"] = {} if way.roof else check(way, output)
    if way.counted:
        entry["gflop"] = counted.flops / 1e9
    return seconds


def _weigh(way: Way, inputs: HeadInputs, call: Call, entry: Entry) -> None:
    """Note by how much memory peaks over the inputs."""
    try:
        if inputs.sizes.device.type == "cuda":
            entry["peak_mib"] = _grown(call, inputs.sizes.device)
        else:
            entry["peak_mib"] = in_fresh_process(_grow, way.prepare, inputs.sizes)
    except Exception as error:
        note_failure(entry, error)


def _grow(prepare: Callable[[HeadInputs], Call], sizes: HeadSizes) -> float | None:
    return _grown(prepare(HeadInputs(sizes)), sizes.device)


def _grown(call: Call, device: torch.device) -> float | None:
    peak = Peak(device)
    result = call()
    grown = peak.mib()
    del result
    return grown


def fused_head(inputs: HeadInputs, states: Tensor, weight: Tensor, outputs: Sequence[str]) -> Any:
    """Return TRL's fused head as TRL puts it on a model, over given states.

    Args:
        inputs: Labels are taken from there.
        states: ``(batch, tokens, width)``.
        weight: ``(vocab, width)``.
        outputs: What it is asked for, by TRL's names.

    Returns:
        A call that gives TRL's ``FusedCausalLMOutput``.
    """
    model = _Model(states, weight)
    trl = importlib.import_module("trl.trainer.utils")
    trl.add_fused_lm_head(model, outputs=tuple(outputs))
    return lambda: model.forward(shift_labels=inputs.labels, fused_lm_head=True)


def liger_scaled() -> Any:
    """Return Liger's loss with entropy, an autograd function."""
    return importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction


class _Model:
    """What TRL's fused head asks of a model: a configuration, a backbone and an output layer."""

    def __init__(self, states: Tensor, weight: Tensor) -> None:
        text = SimpleNamespace(model_type="none")
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=states)
        self.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)

    def forward(self, **kwargs: Any) -> Any:
        raise NotImplementedError("the fused head takes the place of this")
