"""The search for the fastest sizes of the fused kernel, at one width."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor

from onlinesel.bench._inputs import HeadInputs, HeadSizes
from onlinesel.bench._measure import Call, release, take_turns
from onlinesel.bench._tokens import TokenErrors, product
from onlinesel.bench._ways import Entry, Way, note_failure
from onlinesel.kernels._blocks import Blocks
from onlinesel.kernels._measured import Measured, capability_of
from onlinesel.kernels._product import full_precision
from onlinesel.kernels._state import state_scores

__all__ = ["FIRST_LOOK", "NOT_TRIED", "Search"]

FIRST_LOOK = 5  # timed runs, which decide who is a finalist
NOT_TRIED = "not tried: the time was up"
_FINALISTS = 3
_SCORES = ("nll", "entropy", "el2n", "sum_sq", "margin", "top1")


class Search:
    """The search at one width.

    Args:
        sizes: Of the inputs.
        error_tokens: Tokens that are compared with float64.
        candidates: What will be tried.
        repeats: Timed runs of the best; the first look takes 5 at most.

    Attributes:
        point: What is found, ready for JSON.
        chosen: The row of the table, or None while there is none.
    """

    def __init__(
        self, sizes: HeadSizes, error_tokens: int, candidates: Sequence[Blocks], repeats: int
    ) -> None:
        release(sizes.device)
        self._inputs = HeadInputs(sizes)
        self._errors = TokenErrors(self._inputs, error_tokens)
        self._calls: dict[str, Call] = {}
        self._blocks = {str(blocks): blocks for blocks in candidates}
        self._repeats = repeats
        self.chosen: Measured | None = None
        self.point: dict[str, Any] = {
            "width": sizes.width,
            "largest_logit": self._errors.largest_logit,
            "winner": None,
            "fastest": None,
            "entry": None,
            "ways": {
                "gemm": {"label": "bare product H W^T", "ours": False},
                "tile": {"label": "tile backend", "ours": True},
            },
        }
        for name, blocks in self._blocks.items():
            self.point["ways"][name] = {
                "label": name, "ours": True, "blocks": blocks._asdict(), "absent": NOT_TRIED
            }  # fmt: skip

    def begin(self) -> None:
        """Check and time the bare product and the tile backend."""
        self._try("gemm", product(self._inputs), check=False)
        self._try("tile", partial(_scores, self._inputs, None), check=True)
        self._time(["gemm", "tile"], min(self._repeats, FIRST_LOOK))

    def look(self, blocks: Blocks) -> None:
        """Compile and check a candidate, and time it in turns with the bare product."""
        name = str(blocks)
        del self.point["ways"][name]["absent"]
        if self._try(name, partial(_scores, self._inputs, blocks), check=True):
            self._time(["gemm", name], min(self._repeats, FIRST_LOOK))

    def decide(self) -> None:
        """Time the best together, and choose the row."""
        ways = self.point["ways"]
        tried = [name for name in self._blocks if "of_gemm" in ways[name]]
        best = sorted(tried, key=lambda name: -ways[name]["of_gemm"])[:_FINALISTS]
        names = [name for name in ("gemm", "tile") if name in self._calls]
        self._time([*names, *best], self._repeats)
        timed_ones = {n: ways[n]["seconds"] for n in ("tile", *best) if "seconds" in ways[n]}
        for name in best:
            ways[name]["finalist"] = True
        if not timed_ones:
            return
        winner = min((n for n in best if n in timed_ones), key=timed_ones.__getitem__, default=None)
        fastest = "tile" if min(timed_ones, key=timed_ones.__getitem__) == "tile" else "triton"
        self.point |= {"winner": winner, "fastest": fastest}
        sizes = self._inputs.sizes
        blocks = None if winner is None else self._blocks[winner]
        capability = capability_of(sizes.device)
        self.chosen = Measured(capability, sizes.dtype, sizes.width, fastest, blocks)

    def _try(self, name: str, call: Call, check: bool) -> bool:
        """Run a call for the first time, which compiles it, and keep it if it is right."""
        entry: Entry = self.point["ways"][name]
        began = time.perf_counter()
        try:
            output = call()
            if check:
                entry["error"] = self._errors(_ANY, output)
                entry["first_seconds"] = time.perf_counter() - began
                wrong = _wrong(entry["error"], self._errors.largest_logit)
                if wrong is not None:
                    entry["failed"] = wrong
                    return False
        except Exception as error:
            note_failure(entry, error)
            return False
        self._calls[name] = call
        return True

    def _time(self, names: Sequence[str], repeats: int) -> None:
        """Time calls in turns; each entry keeps its last seconds, and its share of the product."""
        ways, device = self.point["ways"], self._inputs.sizes.device

        def failed(name: str, error: Exception) -> None:
            note_failure(ways[name], error)
            self._calls.pop(name, None)
            for key in ("seconds", "runs", "spread", "of_gemm"):
                ways[name].pop(key, None)

        calls = {name: self._calls[name] for name in names if name in self._calls}
        for name, runs in take_turns(calls, repeats, device, failed).items():
            ways[name] |= {
                "seconds": median(runs), "runs": len(runs), "spread": [min(runs), max(runs)]
            }  # fmt: skip
        for name in calls:
            if "seconds" in ways[name] and "seconds" in ways["gemm"]:
                ways[name]["of_gemm"] = ways["gemm"]["seconds"] / ways[name]["seconds"]


_ANY = Way("any", "any", product)  # errors of tokens do not depend on the way


def _scores(inputs: HeadInputs, blocks: Blocks | None) -> Mapping[str, Tensor]:
    """Return all scores, of the fused kernel with these sizes or of the tile backend for None."""
    given = (inputs.states, inputs.head, inputs.labels.flatten(), None, True, True)
    with full_precision(inputs.states.device):
        if blocks is None:
            state = importlib.import_module("onlinesel.kernels._tile").tile_state(*given)
        else:
            state = importlib.import_module("onlinesel.kernels._fused").fused_state(*given, blocks)
        return state_scores(state, _SCORES)


def _wrong(error: Mapping[str, Mapping[str, float]], largest: float) -> str | None:
    """Return what is further from float64 than float32 sums explain, None if nothing is."""
    bounds = {
        "nll": ("max_abs", 2e-5 + 1e-6 * largest),
        "entropy": ("max_abs", 3e-5 + 1e-7 * largest),
        "el2n": ("max_rel", 1e-4),
    }
    for name, (kind, bound) in bounds.items():
        found = error[name][kind]
        if not found <= bound:  # nan is wrong too
            return f"wrong: {name} off by {found:.1e}, at most {bound:.1e} is right"
    return None
