from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from onlinesel.report import listing
from onlinesel.report.curves import headline_png
from onlinesel.report.page import main, render, table_markdown, write_report
from onlinesel.report.runlog import RunLog, find_runs, read_run
from tests.report.test_rollouts import BAND, UNIFORM
from tests.report.test_rollouts import write as write_rollouts

XSS = "<script>alert(1)</script><img src=x onerror=alert(2)> 水\u00a0\ud800\x00"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def write_run(path: Path, name: str, seed: int, budget: str = "time", steps: int = 12) -> None:
    rng = random.Random(seed)
    keep_all = name == "Uniform"
    with RunLog(path) as log:
        log.start(
            name=name, strategy="\ud800()", candidates=1 if keep_all else 4, scope="global",
            seed=seed, budget=budget, command="train " + "x" * 200, hardware="2 CPU cores",
        )  # fmt: skip
        log.rows(
            {"id": i, "source": "<b>bad</b>" if i % 4 == 0 else "good", "text": f"{XSS} {i} " * 40}
            for i in range(40)
        )
        for k in range(1, steps + 1):
            ids = rng.sample(range(40), 8)
            weights = [1.0 if keep_all or i % 4 else 0.0 for i in ids]
            log.step(
                step=k, seconds=0.2 * k, cpu_seconds=0.3 * k, rows=4 * k, candidates=8 * k,
                score_seconds=0.0 if keep_all else 0.1, step_seconds=0.2, loss=3.0,
            )  # fmt: skip
            log.choice(k, ids, weights, [i + rng.random() for i in ids], [5 + i for i in ids])
            log.evaluation(
                step=k, seconds=0.2 * k, cpu_seconds=0.3 * k, rows=4 * k,
                loss=4.0 / k + rng.random() / 50,
            )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for budget in ("time", "steps"):
        for name in ("Uniform", "UDS", "An arm <i>with a long name</i>"):
            for seed in range(2):
                write_run(folder / budget / f"{len(name)}-{seed}", name, seed, budget)
    return write_report([folder], folder / "out" / "report.html", title="A & B")


class Elements(HTMLParser):
    """Collects every element of the page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_runs_its_own_script_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text
    elements = Elements(text).found
    tags = {tag for tag, _ in elements}
    assert {"svg", "table", "meta"} <= tags
    assert not tags & {"img", "iframe", "object", "embed", "b>", "i>"}
    # One script, which is ours to the byte; the page's own policy lets no other run.
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script == (Path(listing.__file__).parent / "page.js").read_text()
    assert [tag for tag, _ in elements].count("script") == 1 and "innerHTML" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for tag, a in elements if a.get("http-equiv"))
    allowed = f"script-src 'sha256-{digest}'"
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; {allowed}"
    for _, attributes in elements:
        assert not any(name == "src" or name.startswith("on") for name in attributes)
        assert re.match(r"#|data:,$", attributes.get("href") or "#")


def test_names_and_text_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script>alert" not in text
    assert "An arm &lt;i&gt;with a long name" in text and "<i>with" not in text
    assert "<b>bad" not in text and "<title>A &amp; B</title>" in text
    assert "水\u00a0" in text and "\x00" not in text
    assert "more characters" in text


def test_ids_are_unique_and_references_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {first or second for first, second in used} <= set(ids)


def test_every_figure_has_a_name_and_follows_the_colour_scheme(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    figures = [a for tag, a in Elements(text).found if tag == "svg" and a.get("role") == "img"]
    # Per budget: 4 curves, 2 scores, 2 sources, repeats, lengths, time. Uniform drops nothing.
    assert len(figures) == 2 * 11 and all(a["aria-label"] for a in figures)
    assert "prefers-color-scheme: dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    # #000000 is the colour of clipped ticks of length zero; nothing visible has a fixed colour.
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"} and "var(--c1)" in drawn


def test_sections_of_missing_pieces_say_so(tmp_path: Path) -> None:
    RunLog(tmp_path / "empty").start(name="UDS", seed=0)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    for sentence in (
        "No run logged a held-out loss, so there is no curve to draw.",
        "No run logged its choices, so what was kept is unknown.",
        "No run timed its steps, so the break-even is unknown.",
        "No examples: the runs hold no text",
    ):
        assert sentence in text
    assert 'role="img"' not in text
    assert "There are no runs to show." in render([])


def test_choices_without_scores_tokens_and_rows(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.start(name="UDS", seed=0)
        log.choice(1, [1, 2], [1.0, 0.0])
        log.choice(2, [], [])
        log.evaluation(step=1, seconds=1.0, rows=1, loss=None)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "No score histogram for UDS" in text and "length bias is unknown" in text
    assert "shares by source are unknown" in text and "How often each row trained" in text


def test_markdown_table_and_page_agree(page: Path) -> None:
    runs = [read_run(path) for path in find_runs([page.parents[1]])]
    lines = table_markdown(runs).splitlines()
    assert len(lines) == 2 + 6 and lines[0].startswith("| Arm | Budget | Seeds | Steps |")
    loss = lines[2].split(" | ")[6]
    assert " ± " in loss and f"<td>{loss}</td>" in page.read_text(encoding="utf-8")


def test_headline_png_has_the_size_of_a_readme_figure(page: Path, tmp_path: Path) -> None:
    runs = [read_run(path) for path in find_runs([page.parents[1]])]
    data = headline_png(runs, tmp_path / "headline.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1200, 600]
    with pytest.raises(ValueError, match="a held-out loss or reward, got 0 runs without one"):
        headline_png([], tmp_path / "none.png")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path / "a").start(name="UDS")
    out = tmp_path / "new" / "page.html"
    assert main([str(tmp_path / "a"), "-o", str(out), "--title", "Mine"]) == 0
    said = ["UDS: cannot be told: no uniform run.", str(out)]
    assert capsys.readouterr().out.splitlines() == said and "<h1>Mine</h1>" in out.read_text()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nothing")])
    assert "path must exist" in capsys.readouterr().err
    with pytest.raises(TypeError, match="run_dirs must be an iterable of paths, got .*in a list"):
        write_report(str(tmp_path), out)


class Browser:
    """A headless Chromium, spoken to over its debugging pipe (NUL-terminated JSON)."""

    def __init__(self, profile: Path) -> None:
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
            "--disable-background-networking --disable-component-update --remote-debugging-pipe"
        ).split()
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads file descriptor 3 and writes 4, whatever the numbers are here.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", *map(str, command)]
        self.process = subprocess.Popen(
            shell, pass_fds=(theirs_in, theirs_out), stdout=-3, stderr=-3
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.sent, self.events = 0, []  # type: ignore[var-annotated]
        self.write, self.read = os.fdopen(write, "wb", 0), os.fdopen(read, "rb")
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session: str | None = None
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]

    def message(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            if not byte:
                raise EOFError("chromium closed its pipe")
            text += byte
        return json.loads(text)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        call = {"id": self.sent, "method": method, "params": params}
        if getattr(self, "session", None) and not method.startswith("Browser."):
            call["sessionId"] = self.session
        self.write.write(json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def value(self, expression: str) -> Any:
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"]["value"]

    def close(self) -> None:
        self("Browser.close")
        self.process.wait(30)
        self.write.close()
        self.read.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    for domain in ("Page", "Network", "Runtime", "Log"):
        browser(f"{domain}.enable")
    yield browser
    browser.close()


MEASURE = """(() => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const boxes = [...document.querySelectorAll("svg[role=img]")].map(s => s.getBoundingClientRect());
  const ink = getComputedStyle(document.querySelector("svg[role=img] text")).fill;
  return {
    figures: boxes.length, small: boxes.filter(b => b.width < 250 || b.height < 60).length,
    page: document.documentElement.scrollWidth, view: document.documentElement.clientWidth,
    outside: boxes.filter(b => b.right > innerWidth).length, ink: ink,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(page: Path, browser: Browser, width: int, scheme: str) -> None:
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser("Emulation.setEmulatedMedia", features=media)
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    browser.open(page.as_uri())
    found = browser.value(MEASURE)
    assert found["figures"] == 22 and found["small"] == found["outside"] == 0
    assert found["page"] <= found["view"] <= width
    light = [sum(map(int, re.findall(r"\d+", found[k])[:3])) > 384 for k in ("background", "ink")]
    assert light == [scheme == "light", scheme == "dark"]
    kinds = [event["method"] for event in browser.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & {*kinds}
    sent = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in sent} - {"data:,"}
    assert urls == {page.as_uri()}


@pytest.mark.parametrize("width", [360, 1200])
def test_both_kinds_of_runs_in_a_browser(tmp_path: Path, browser: Browser, width: int) -> None:
    write_run(tmp_path / "UDS-0", "UDS", 0)
    write_rollouts(tmp_path, "uniform", 0, [0.2, 0.4, 0.3], groups=UNIFORM)
    write_rollouts(tmp_path, "band", 0, [0.2, 0.3, 0.7], groups=BAND)
    page = write_report([tmp_path], tmp_path / "report.html")
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    browser.open(page.as_uri())
    found = browser.value(MEASURE)
    # 10 of UDS, three curves, and two of each of two arms that generate.
    assert found["figures"] == 10 + 3 + 4 and found["small"] == found["outside"] == 0
    assert found["page"] <= found["view"] <= width


def test_the_browser_check_can_fail(page: Path, browser: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8").replace(
        "</body>",
        '<div style="width: 2000px">x</div><script>nothing()</script><img src="no.png"></body>',
    )
    broken.write_text(text, encoding="utf-8")
    browser.open(broken.as_uri())
    kinds = [event["method"] for event in browser.events]
    assert "Runtime.exceptionThrown" not in kinds  # the page's policy does not let it run
    broken.write_text(text.replace("Content-Security-Policy", "none"), encoding="utf-8")
    browser.open(broken.as_uri())
    found = browser.value(MEASURE)
    assert found["page"] > found["view"]
    kinds = [event["method"] for event in browser.events]
    assert "Runtime.exceptionThrown" in kinds and kinds.count("Network.requestWillBeSent") > 1


USE = """(() => {
  const table = document.querySelector("table.listing"), rows = () => [...table.tBodies[0].rows];
  const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.startsWith("UDS: tr"));
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const values = () => rows().map(row => parseFloat(row.cells[column].dataset.value));
  button.click();
  const down = values();
  button.click();
  const up = values();
  const field = document.querySelector(".search input"), spot = document.querySelector(".tip");
  field.value = "good 37";
  field.dispatchEvent(new Event("input"));
  spot.dispatchEvent(new PointerEvent("pointerenter"));
  return {
    down: down, up: up, found: document.querySelector(".search span").textContent,
    shown: rows().filter(row => !row.hidden).map(row => row.cells[0].textContent),
    tip: document.querySelector(".shown").textContent, label: spot.getAttribute("aria-label"),
  };
})()"""


def test_tables_sort_and_are_searched_in_a_browser(page: Path, browser: Browser) -> None:
    browser.open(page.as_uri())
    found = browser.value(USE)
    assert found["down"] == sorted(found["down"], reverse=True) and found["down"][-1] == 0
    assert found["up"] == sorted(found["up"]) and found["up"][-1] == 1
    assert "37" in found["shown"] and found["found"] == f"{len(found['shown'])} of 40 rows"
    assert found["tip"] == found["label"] and found["tip"].startswith("Uniform, CPU seconds")
