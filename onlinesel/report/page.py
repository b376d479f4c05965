"""One self-contained HTML page about runs: `onlinesel report RUN_DIR... -o report.html`.

Inline SVG and CSS, one short script of our own (page.js) that a policy in the page allows and no
other, no request to anywhere; light and dark follow the reader's setting.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from onlinesel.report import (
    curves,
    doubts,
    drawing,
    figures,
    findings,
    kept,
    listing,
    paid,
    rollout_figures,
    rollout_findings,
    rollouts,
    summary,
    wording,
)
from onlinesel.report.goals import LOSS, goal_of
from onlinesel.report.reading import find_runs, read_run
from onlinesel.report.records import Run
from onlinesel.report.summary import Arm

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(
        'onlinesel.report needs matplotlib and jinja2: pip install "onlinesel[report]".'
    ) from error

__all__ = ["main", "render", "table_markdown", "write_report"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Panel:
    """A figure of the page with its caption."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class _Shown:
    """An example as it is printed."""

    text: str
    rest: int
    source: str
    candidate: int
    trained: int


@dataclass
class _Budget:
    """Everything that the page shows about the arms of one budget."""

    title: str
    curves: list[_Panel] = field(default_factory=list)
    training: list[_Panel] = field(default_factory=list)
    scores: list[_Panel] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    sources: list[_Panel] = field(default_factory=list)
    lengths: _Panel | None = None
    repeats: _Panel | None = None
    time: _Panel | None = None
    cost: wording.Table | None = None
    has_choices: bool = False
    has_pool: bool = False


@dataclass
class _Rolled:
    """Everything that the page shows about the arms of one budget that generate."""

    title: str
    curves: list[_Panel] = field(default_factory=list)
    training: list[_Panel] = field(default_factory=list)
    fates: list[_Panel] = field(default_factory=list)
    rates: list[_Panel] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onlinesel report` and return the exit status; what it prints first is the verdict.

    Args:
        argv: Arguments after `report`.

    Example:
        >>> main(["--help"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    parser = argparse.ArgumentParser(
        prog="onlinesel report",
        description="Write one HTML page about what runs did with their data.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run, or a folder of runs")
    parser.add_argument("-o", "--out", default="report.html", help="page to write (%(default)s)")
    parser.add_argument("--title", help="title of the page")
    parser.add_argument(
        "--before", action="append", default=[], metavar="ARM=SECONDS", type=_cost,
        help="what an arm cost before its runs, as a reference that was trained for it",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        runs = _read(options.runs, dict(options.before))
        out = _write(runs, options.out, options.title)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"{line}\n" for line in [*paid.judged(runs), out]))
    return 0


def _cost(text: str) -> tuple[str, float]:
    name, _, spent = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"must be ARM=SECONDS, got {text!r}")
    return name, float(spent)


def write_report(
    run_dirs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    before: Mapping[str, float] | None = None,
) -> Path:
    """Write the page about all runs in `run_dirs` and return its path.

    Args:
        run_dirs: Run directories, or folders that hold them.
        out: HTML file to write.
        title: Title of the page.
        before: Seconds that arms cost before their runs, by name: a reference that was trained or
            scored for them. They count in the verdict.

    Example:
        >>> import tempfile
        >>> from onlinesel.report import RunLog
        >>> folder = Path(tempfile.mkdtemp())
        >>> RunLog(folder / "uds-0").start(name="UDS", seed=0)
        >>> write_report([folder], folder / "report.html").name
        'report.html'
    """
    return _write(_read(run_dirs, before or {}), out, title)


def _read(run_dirs: Iterable[str | os.PathLike[str]], before: Mapping[str, float]) -> list[Run]:
    if isinstance(run_dirs, (str, os.PathLike)):
        raise TypeError(
            f"write_report: run_dirs must be an iterable of paths, got {run_dirs!r}. "
            "Put it in a list."
        )
    return paid.with_costs([read_run(path) for path in find_runs(run_dirs)], before)


def _write(runs: Sequence[Run], out: str | os.PathLike[str], title: str | None) -> Path:
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Training text can hold lone surrogates, which no encoding of a page can carry.
    page = render(runs, title=title).encode("utf-8", errors="replace")
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(page)
    os.replace(temporary, target)
    return target


def table_markdown(runs: Iterable[Run]) -> str:
    """Return the headline table as markdown, for a README; runs that generate have two others.

    Example:
        >>> table_markdown([Run(Path(), "UDS", seed=0)]).splitlines()[0][:24]
        '| Arm | Budget | Seeds |'
    """
    trained, generated = _parted(runs)
    tables = [findings.headline(trained)] if trained or not generated else []
    if generated:
        tables += [rollout_findings.headline(generated), rollout_findings.spent(generated)]
    return "\n\n".join(map(wording.markdown, tables))


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """Return the page about `runs` as HTML.

    Example:
        >>> render([Run(Path(), "UDS")]).startswith("<!doctype html>")
        True
    """
    trained, generated = _parted(runs)
    arms = summary.group_arms(trained)
    styles = drawing.styles_of(arms + summary.group_arms(generated))
    keys = (f"f{number}" for number in count())
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    budgets = [_budget(members, styles, keys) for members in _by_budget(arms)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        title=title or "What the runs did with their data",
        paid=paid.judged(runs),
        outcomes={paid.PAYS: "good", paid.PAYS_NOT: "bad", paid.NOT_TOLD: "open"},
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        palette=drawing.PALETTE,
        runs=runs,
        arms=arms,
        names=list(dict.fromkeys(arm.name for arm in arms)),
        swatches={
            n: (f"k{i}", Markup(figures.swatch(s, f"k{i}")))
            for i, (n, s) in enumerate(styles.items())
        },
        headline=findings.headline(trained),
        settings=doubts.settings_table(arms + summary.group_arms(generated)),
        clock=_clock([trained, generated]),
        verdicts=findings.verdicts(trained),
        caveats=findings.caveats(trained),
        budgets=budgets,
        repeats=kept.REPEATS,
        examples=_examples(arms),
        rows=listing.rows(arms),
        prompts=listing.prompts(summary.group_arms(generated)),
        generated=_generated(generated, styles, keys),
        facts=_facts(runs),
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _parted(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Part the runs that are judged by their loss from those that are judged by their reward."""
    runs = list(runs)
    return [r for r in runs if goal_of(r) == LOSS], [r for r in runs if goal_of(r) != LOSS]


def _by_budget(arms: Sequence[Arm]) -> list[list[Arm]]:
    budgets = dict.fromkeys(arm.budget for arm in arms)
    return [[arm for arm in arms if arm.budget == budget] for budget in budgets]


def _clock(parts: Iterable[Sequence[Run]]) -> str:
    clocks = dict.fromkeys(map(summary.clock_of, [runs for runs in parts if runs] or [[]]))
    return " and ".join(wording.within(curves.AXES[clock]) for clock in clocks)


def _title(arms: Sequence[Arm]) -> str:
    return curves.BUDGETS.get(arms[0].budget, str(arms[0].budget)).capitalize()


def _curves(
    arms: Sequence[Arm], axes: Iterable[str], styles: figures.Styles, key: Iterator[str], draw: Any
) -> list[_Panel]:
    """Return a panel for each axis, that of the arms' budget first."""
    runs = [run for arm in arms for run in arm.runs]
    first = curves.own_axis(arms[0].budget, summary.clock_of(runs))
    drawn = ((axis, draw(arms, axis, styles, next(key))) for axis in dict.fromkeys([first, *axes]))
    named = ((wording.within(curves.AXES[axis]), svg) for axis, svg in drawn if svg)
    return [_Panel(f"Against {name}", Markup(svg)) for name, svg in named]


def _generated(runs: Sequence[Run], styles: figures.Styles, key: Iterator[str]) -> dict[str, Any]:
    """Return everything that the page shows about runs that generate; empty without one."""
    if not runs:
        return {}
    arms, clock = summary.group_arms(runs), summary.clock_of(runs)
    budgets = []
    for members in _by_budget(arms):
        shown = _Rolled(_title(members))
        axes = ("rollouts", clock, "step")
        shown.curves = _curves(members, axes, styles, key, curves.held_out_curves)
        if not shown.curves:
            shown.training = _curves(members, axes, styles, key, curves.training_curves)
        for arm in members:
            found = rollouts.groups(arm)
            if svg := rollout_figures.fates(found, arm.name, next(key)):
                shown.fates.append(_Panel(arm.name, Markup(svg)))
            if svg := rollout_figures.pass_rates(found, arm.name, next(key)):
                shown.rates.append(_Panel(arm.name, Markup(svg)))
        budgets.append(shown)
    return {
        "names": list(dict.fromkeys(arm.name for arm in arms)),
        "headline": rollout_findings.headline(runs),
        "spent": rollout_findings.spent(runs),
        "verdicts": findings.verdicts(runs) + rollout_findings.costs(runs),
        "caveats": findings.caveats(runs),
        "budgets": budgets,
        "fates": list(zip(rollout_figures.FATE_ROLES, rollouts.FATES, strict=True)),
        "levels": rollout_figures.LEVELS,
    }


def _budget(arms: Sequence[Arm], styles: figures.Styles, key: Iterator[str]) -> _Budget:
    shown = _Budget(_title(arms))
    axes = ("cpu_seconds", "seconds", "step", "rows")
    shown.curves = _curves(arms, axes, styles, key, curves.held_out_curves)
    if not shown.curves:
        shown.training = _curves(arms, axes, styles, key, curves.training_curves)
    decided = [kept.decisions(arm) for arm in arms]
    shown.has_choices = any(flat.ids.size for flat in decided)
    shown.has_pool = any(kept.pool_size(run) for arm in arms for run in arm.runs)
    for arm, flat in zip(arms, decided, strict=True):
        svg = figures.score_histogram(flat, styles[arm.name], arm.name, next(key))
        if svg:
            shown.scores.append(_Panel(arm.name, Markup(svg), _score_note(flat)))
        elif flat.ids.size:
            shown.unscored.append(arm.name)
    shares = [kept.share_over_steps(arm) for arm in arms]
    runs = [run for arm in arms for run in arm.runs]
    pool = kept.pool_shares(runs)
    for source in kept.sources_of(runs)[:4]:
        svg = figures.source_share(arms, shares, source, pool[source], styles, next(key))
        if svg:
            note = f"Dotted: its share in the pool, {100 * pool[source]:.3g} %."
            shown.sources.append(_Panel(source, Markup(svg), note))
    shown.lengths = _panel("Length", figures.token_lengths(arms, decided, styles, next(key)))
    shown.repeats = _panel("Repeats", figures.repeats(arms, next(key)))
    shown.time = _panel("Seconds per step", figures.step_time(arms, styles, next(key)))
    shown.cost = findings.break_even(arms)
    return shown


def _panel(title: str, svg: str | None) -> _Panel | None:
    return _Panel(title, Markup(svg)) if svg else None


def _score_note(flat: kept.Decisions) -> str:
    missing = int((flat.scores != flat.scores).sum())
    share = f"{100 * flat.trained.mean():.3g} % of {flat.ids.size:,} candidates kept."
    lost = f" {missing:,} had no finite score and are not drawn." if missing else ""
    return (share + lost).replace(",", "\u202f")


def _examples(arms: Sequence[Arm]) -> list[tuple[Arm, list[_Shown], list[_Shown]]]:
    """Return the examples of each arm that dropped rows, under the first budget that it has."""
    found: dict[str, tuple[Arm, list[_Shown], list[_Shown]]] = {}
    for arm in arms:
        if arm.name not in found:
            most, least = kept.examples(arm)
            if most or least:
                found[arm.name] = (arm, [_shown(e) for e in most], [_shown(e) for e in least])
    return list(found.values())


def _shown(example: kept.Example) -> _Shown:
    head, rest = listing.shown(example.row.text)
    return _Shown(head, rest, example.row.source or "", example.candidate, example.trained)


def _facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the distinct values of what describes machine and software, "what: [value, ...]"."""
    facts: dict[str, list[str]] = {"Hardware": [], "Versions": []}
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        for what, value in (("Hardware", run.hardware), ("Versions", versions)):
            if value and value not in facts[what]:
                facts[what].append(value)
    return facts
