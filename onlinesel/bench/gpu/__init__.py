"""``onlinesel bench gpu``: everything that a GPU can say about this project, in minutes.

    python -m onlinesel.bench gpu --minutes 8 --out results/

One command runs the tests marked ``gpu``, times every kernel and whole training steps beside their
peers, and searches the sizes of the fused kernel. Each phase runs in a process of its own and
leaves ``gpu_<phase>.json`` and a log when it ends, however it ends: one that fails or overruns its
limit is a result, and the next one begins. What is not done when the minutes are up is named, and a
second call with the same folder goes on there; phases that another version of the code measured are
measured again. Targets stand beside their figures in the table that is printed last.

Nothing but torch is needed. Without transformers there are no whole steps, without TRL, Liger and
cut-cross-entropy no comparison with them; ``requirements-gpu.txt`` lists what makes it complete. On
a machine without a GPU the same phases run at tiny sizes, the kernels in Triton's interpreter: that
tries the script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from onlinesel.bench._settings import command, find_device, machine
from onlinesel.bench._text import bars, new_figure
from onlinesel.bench.gpu._runner import Phase, Result, read_file, run_phase
from onlinesel.bench.gpu._targets import TARGETS, judge, target_table

__all__ = ["Phase", "add_arguments", "bench_gpu", "figure", "run"]

_CLOSING = 8.0  # seconds kept for ending a phase and for the summary
_SHORTEST = 0.4  # of its limit: a phase that has less than this left waits for the next call
_ENDED = ("done", "left out")


def bench_gpu(
    minutes: float = 8.0,
    out: str | Path = "results",
    *,
    device: str = "auto",
    only: Sequence[str] | None = None,
    again: bool = False,
    phases: Sequence[Phase] | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Result:
    """Run the phases that are not done, most valuable first, until the minutes are up.

    Args:
        minutes: Time for the whole call; it ends within 20 seconds of it.
        out: Folder of the results. Those of another machine, or of another kind of run, are
            refused.
        device: ``"cpu"``, ``"cuda:1"``, or ``"auto"``. A CPU uses tiny sizes.
        only: Names of the phases to run, or None for all.
        again: Measure again what is done.
        phases: Other phases than the project's own.
        say: Gets a line when a phase ends, and one a minute.

    Returns:
        ``phases``: what became of each; ``targets``: measured and wanted; ``not_done``: the names
        of those that a second call would run.

    Raises:
        ValueError: ``minutes`` is not positive, a phase or device is unknown, or the folder holds
            results of another machine.

    Example:
        ```python
        found = bench_gpu(minutes=8, out="results")
        print(found["not_done"])
        ```
    """
    if phases is None:
        phases = _own_phases()
    chosen = _chosen(phases, only)
    if not minutes > 0:
        raise ValueError(f"bench_gpu: minutes must be positive, got {minutes}. Pass 8.")
    began = time.monotonic()
    where = machine(find_device("bench_gpu", device, "float32")[0])
    tiny = where["device"] == "cpu"
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    key = {"device": where.get("gpu", "cpu"), "torch": where["torch"], "tiny": tiny}
    facts = {"key": key, "source": _source(), "machine": where}
    states = {p.name: _state(folder / f"gpu_{p.name}.json", facts) for p in phases}
    waiting = [p for p in chosen if again or states[p.name] not in _ENDED]
    # What never ran comes before what was tried.
    waiting.sort(key=lambda phase: states[phase.name] != "not run")
    _work_off(waiting, states, folder, facts, _Watch(began, minutes * 60, len(waiting), say))
    results = {p.name: read_file(folder / f"gpu_{p.name}.json") or {} for p in phases}
    return {
        "what": "everything that a GPU can say", **facts, "seconds": time.monotonic() - began,
        "phases": {p.name: _entry(p, states[p.name], results[p.name]) for p in phases},
        "not_done": [p.name for p in chosen if states[p.name] not in _ENDED],
        "targets": judge(results),
    }  # fmt: skip


def _work_off(
    waiting: Sequence[Phase], states: dict[str, str], folder: Path, facts: Result, watch: _Watch
) -> None:
    """Run what there is time for, and note in ``states`` how it ended."""
    for phase in waiting:
        limit = min(phase.limit, watch.left() - _CLOSING)
        if limit < _SHORTEST * phase.limit:
            continue
        watch.begin(phase.name)
        states[phase.name] = run_phase(
            phase, folder / f"gpu_{phase.name}.json", facts, device=facts["machine"]["device"],
            tiny=facts["key"]["tiny"], limit=limit, alive=watch.alive,
        )  # fmt: skip
        watch.end(phase.name, states[phase.name])


def _own_phases() -> Sequence[Phase]:
    from onlinesel.bench.gpu._phases import PHASES  # imports transformers where there is one

    return PHASES


def _chosen(phases: Sequence[Phase], only: Sequence[str] | None) -> list[Phase]:
    names = [phase.name for phase in phases]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise ValueError(
            f"bench_gpu: only must be among {', '.join(names)}, got {', '.join(unknown)!r}. Leave "
            "it out for all of them."
        )
    return [phase for phase in phases if only is None or phase.name in only]


def _source() -> str:
    """Return a digest of the code, so that results say which version gave them."""
    digest = sha256()
    for name in ("onlinesel", "onlinesel.callbacks", "onlinesel.recipes"):
        try:
            folder = importlib.import_module(name).__path__[0]
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise RuntimeError(
                "bench_gpu: onlinesel must be installed, got a clone alone, which has no "
                f"{name}. Run `pip install --no-deps --no-build-isolation -e .` in it."
            ) from None
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _state(path: Path, facts: Result) -> str:
    """Return how a phase ended last time; refuse a folder of another machine."""
    found = read_file(path)
    if found is None:
        return "not run"
    if found.get("key") != facts["key"]:
        raise ValueError(
            f"bench_gpu: out must hold results of this machine, {facts['key']}, got {path} of "
            f"{found.get('key')}. Pass another folder."
        )
    if found.get("source") != facts["source"]:
        return "of other code"
    return "interrupted" if found["status"] == "running" else str(found["status"])


class _Watch:
    """The clock of the whole call, and what is said while it runs."""

    def __init__(
        self, began: float, seconds: float, count: int, say: Callable[[str], None]
    ) -> None:
        self._began, self._seconds, self._count, self._say = began, seconds, count, say
        self._ended, self._minute, self._name, self._since = 0, 0, "", began

    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def begin(self, name: str) -> None:
        self._name, self._since = name, time.monotonic()

    def alive(self, seconds: float) -> None:
        """Say a line if another minute has gone by."""
        minute = int((time.monotonic() - self._began) / 60)
        if minute > self._minute:
            self._minute = minute
            self._line(f"{self._name} for {seconds:.0f} s")

    def end(self, name: str, status: str) -> None:
        self._ended += 1
        self._line(f"{name}: {status} in {time.monotonic() - self._since:.0f} s")

    def _line(self, text: str) -> None:
        gone = int(time.monotonic() - self._began)
        self._say(f"[{gone // 60}:{gone % 60:02}] {self._ended} of {self._count} ended; {text}")


def _entry(phase: Phase, status: str, found: Result) -> Result:
    """Return what the summary says of a phase."""
    entry = {"label": phase.name, "what": phase.what, "status": status, "ours": True}
    entry |= {key: found[key] for key in ("seconds", "error") if key in found}
    if status in ("failed", "overran"):
        entry["failed"] = found.get("error") or f"overran its {found.get('limit')} s"
    return entry


def _table(result: Result) -> str:
    width = max(len(name) for name in result["phases"])
    where = result["machine"]
    lines = [f"{where.get('gpu', where['processor'])}, torch {where['torch']}", ""]
    if result["key"]["tiny"]:
        lines[1:1] = ["Tiny sizes on a CPU: these times say nothing about a GPU."]
    for name, entry in result["phases"].items():
        taken = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
        why = f"  {' '.join(entry['error'].split())[:100]}" if "error" in entry else ""
        lines.append(f"{name:{width}}  {entry['status']:13} {taken}{why}")
    lines += ["", target_table(result["targets"])]
    if result["not_done"]:
        names = ", ".join(result["not_done"])
        lines += ["", f"Not done: {names}. The same command goes on there."]
    return "\n".join(lines)


def figure(result: Result, path: str) -> None:
    """Draw what was measured as a share of its target.

    Args:
        result: What :func:`bench_gpu` returned.
        path: File to write; its ending says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing = new_figure("gpu", 1, 0.3 * len(TARGETS) + 1)
    rows = [row for row in result["targets"] if row["share"] is not None]
    axes = drawing.axes[0]
    bars(axes, [r["name"] for r in rows], {"": [r["share"] for r in rows]}, "target = 1")
    axes.axvline(1.0, color="0.4", linewidth=1)
    drawing.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench gpu``."""
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for the whole call")
    add("--out", default="results", help="folder of the results, one file a phase")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto takes CUDA where there is one")
    add("--only", type=lambda text: text.split(","), help="phases, with commas between them")
    add("--again", action="store_true", help="measure again what is done")


def run(args: argparse.Namespace) -> tuple[Result, str]:
    """Return the result and its table."""
    result = bench_gpu(
        args.minutes, args.out, device=args.device, only=args.only, again=args.again
    )  # fmt: skip
    return {"command": command("gpu", args), **result}, _table(result)
