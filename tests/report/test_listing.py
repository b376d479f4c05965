"""Tables to sort and search, values at points of curves, training curves, axes of budgets."""

from __future__ import annotations

import math
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from onlinesel.report import curves, drawing, goals, kept, listing
from onlinesel.report.page import render
from onlinesel.report.records import Choice, Evaluation, Generation, Row, Run
from onlinesel.report.summary import Arm, group_arms

EVIL = "</td><script>alert(1)</script> \x00one"


def choice(step: int, ids: list[int], weights: list[float], scores: list[float]) -> Choice:
    return Choice(step, array("q", ids), array("d", weights), array("d", scores))


CHOICES = (
    choice(1, [7, 2**60], [1, 0], [0.5, -2.0]),
    choice(2, [7, 3], [0, 1], [1.5, math.nan]),
)
POOL = {7: Row(7, "web", EVIL), 3: Row(3, None, "three")}


def run(name: str, seed: int = 0, budget: str | None = None, **facts: Any) -> Run:
    return Run(Path(name), name, seed=seed, budget=budget, **facts)


def texts(table: listing.Listing | None) -> list[list[str]]:
    assert table is not None
    return [[cell.text for cell in row] for row in table.rows]


def test_rows_are_counted_for_each_arm() -> None:
    uds = run("UDS", choices=CHOICES, rows=POOL)
    top = run("top", choices=CHOICES[:1])
    table = listing.rows(group_arms([uds, top]))
    assert table is not None and table.columns == (
        "Row", "Source", "top: trained, of times looked at", "top: mean score",
        "UDS: trained, of times looked at", "UDS: mean score", "Text",
    )  # fmt: skip
    assert texts(table) == [
        ["7", "web", "1 of 1", "0.5", "1 of 2", "1", "</td><script>alert(1)</script> one"],
        [str(2**60), "–", "0 of 1", "−2", "0 of 1", "−2", ""],
        ["3", "–", "–", "–", "1 of 1", "–", "three"],
    ]
    assert table.numbers == {0, 2, 3, 4, 5} and table.total == 3
    assert [cell.value for cell in table.rows[0][2:6]] == [1.0, 0.5, 0.5, 1.0]
    short = listing.rows(group_arms([uds]), most=1)
    assert short is not None and (len(short.rows), short.total) == (1, 3)
    assert listing.rows(group_arms([run("UDS")])) is None


def test_prompts_are_counted_for_each_arm() -> None:
    def batch(step: int, won: list[float], trains: list[int]) -> Generation:
        return Generation(
            step, 1.0, 1.0, 8, 8, 0, 1, array("q", [4, 5, -1]), array("d", won),
            array("q", [4, 4, 4]), array("b", trains),
        )  # fmt: skip

    made = (batch(0, [1, 4, 2], [1, 0, 1]), batch(1, [3, math.nan, 2], [1, 1, 1]))
    band = run("band", generations=made, rows={5: Row(5, "hard", "Five?")})
    table = listing.prompts(group_arms([band]))
    assert table is not None and table.columns == (
        "Prompt", "Source", "band: pass rate", "band: groups trained, of those generated", "Text",
    )  # fmt: skip
    assert texts(table) == [["4", "–", "0.5", "2 of 2", ""], ["5", "hard", "1", "1 of 2", "Five?"]]
    # Where nothing was evaluated, these successes are the training reward: 7 of 12, 5 of 8.
    assert [value for _, value in goals.trained(band)] == [7 / 12, 5 / 8]
    page = render([band])
    assert "Training reward, where nothing was evaluated" in page and 'id="prompts"' in page
    assert "Final: band 0.625." in page


def test_the_page_holds_sortable_tables_of_escaped_text() -> None:
    page = render([run("UDS", choices=CHOICES, rows=POOL)])
    body = page[page.index('class="listing"') : page.index("</table>", page.index('listing" aria'))]
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in body
    assert re.findall(r'data-value="([^"]*)"', body)[:3] == ["7.0", "0.5", "1.0"]
    assert body.count('data-kind="number"') == 3  # row, trained, mean score
    assert 'id="rows"' not in render([run("UDS")])


def test_the_pool_is_as_large_as_the_record_says() -> None:
    some = run("UDS", choices=CHOICES, rows=POOL, extra={"settings": {"rows": 10}})
    assert kept.repeats(Arm("UDS", None, (some,))).tolist() == [0.7, 0.1, 0.2, 0, 0, 0]
    assert kept.pool_size(run("UDS")) is None and kept.pool_size(run("UDS", rows=POOL)) == 2


def test_points_say_their_value_where_they_lie() -> None:
    evals = tuple(Evaluation(10 * k, 1.0 * k, 0, loss) for k, loss in enumerate((9.0, 3.0, 2.0)))
    arms = group_arms([run("<UDS>", evals=evals)])
    svg = curves.held_out_curves(arms, "step", drawing.styles_of(arms), "f1")
    assert svg is not None
    spots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="8"[^>]*><title>(.*?)</title>', svg)
    # The first loss leaves the frame, which shows what comes after the steep start.
    assert [text for *_, text in spots] == [
        "&lt;UDS&gt;, optimizer steps 20: 2.000", "&lt;UDS&gt;, optimizer steps 10: 3.000",
    ]  # fmt: skip
    markers = {
        (float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)
    }
    for x, y, _ in spots:
        near = min(math.hypot(float(x) - a, float(y) - b) for a, b in markers)
        assert near < 0.2


def test_training_curves_are_drawn_where_nothing_was_evaluated() -> None:
    logs = tuple(Evaluation(5 * k, 1.0 * k, 0, 4.0 - k) for k in range(1, 4))
    page = render([run("UDS", logs=logs)])
    assert "Training loss, where nothing was evaluated" in page
    assert 'aria-label="Training loss against optimizer steps. Final: UDS 1.000."' in page
    assert "so there is no curve to draw" not in page
    evaluated = render([run("UDS", logs=logs, evals=logs)])
    assert "Training loss" not in evaluated and "Held-out loss against optimizer" in evaluated


def test_each_budget_is_drawn_over_what_it_fixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = tuple(Evaluation(k, 1.0 * k, k, 4.0 - k, 2.0 * k) for k in range(3))
    runs = [run(n, budget=b, evals=evals) for b in ("time", "steps") for n in ("Uniform", "UDS")]
    page = render(runs)
    panels = re.findall(r"<h[34]>(Equal time|Equal steps|Against [^<]*)</h[34]>", page)
    assert panels[0] == "Equal time" and panels[1] == "Against CPU seconds"
    stepped = panels.index("Equal steps", 1)
    assert panels[stepped + 1] == "Against optimizer steps"
    drawn = {}
    save = drawing.save_png

    def note(axes: Any, path: Any, dpi: int) -> Path:
        drawn.update({each.get_title("left"): each.get_xlabel() for each in axes.figure.axes})
        return save(axes, path, dpi)

    monkeypatch.setattr(drawing, "save_png", note)
    curves.headline_png(runs, tmp_path / "both.png")
    assert drawn == {"Equal time": "CPU seconds", "Equal steps": "Optimizer steps"}
    drawn.clear()
    curves.headline_png(runs, tmp_path / "rows.png", axis="rows")
    assert {*drawn.values()} == {"Rows trained"}


class Tables(HTMLParser):
    """Notes for every table whether it lies in a box of its own that scrolls."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scrolls: list[bool] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.scrolls.append(any("scroll" in classes.split() for classes in self.open))
        if tag == "div":
            self.open.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.open.pop()


def test_nothing_is_wider_than_a_phone() -> None:
    """A browser measures it where there is one (test_report_page); here the rules are looked at."""
    evals = tuple(Evaluation(k, 1.0 * k, k, 4.0 - k) for k in range(3))
    page = render(
        [run("UDS", choices=CHOICES, rows=POOL, evals=evals), run("Uniform", evals=evals)]
    )
    tables = Tables(page).scrolls
    assert len(tables) >= 3 and all(tables)
    style = page[page.index("<style>") : page.index("</style>")]
    assert 'content="width=device-width, initial-scale=1"' in page
    assert re.search(r"\.scroll \{ overflow-x: auto", style)
    assert re.search(r"\.plot > svg \{ display: block; width: 100%", style)
    # Widths in pixels are those of marks and most widths; columns give way below 390 px.
    fixed = [int(w) for w in re.findall(r"[{;] *(?:min-)?width: (\d+)px", style)]
    assert max(fixed) <= 36
    assert all(
        "min(100%, " in each for each in re.findall(r"grid-template-columns: ([^;]+)", style)
    )
    assert "flex: 0 1 22em; min-width: 0; max-width: 100%" in style
