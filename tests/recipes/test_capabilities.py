"""The page of capabilities says what its probes find today."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinesel import strategies
from onlinesel.recipes import _capability_hosts as hosts
from onlinesel.recipes import capabilities
from onlinesel.recipes._capability_hosts import Case, probe
from onlinesel.recipes.capabilities import FEATURES, METHODS, PARTS, filled, tables
from onlinesel.strategies import TopLoss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "capabilities.md"


@pytest.mark.slow
def test_the_page_is_what_the_probes_find(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails: ``python -m onlinesel.recipes.capabilities docs/capabilities.md``."""
    capabilities.quiet()
    text = PAGE.read_text("utf-8")
    assert filled(text, tables()) == text


def test_a_run_that_breaks_is_neither_working_nor_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> None:
        raise ValueError("inner dimensions do not match")

    monkeypatch.setitem(hosts.HOSTS, "steps", broken)
    with pytest.raises(ValueError, match="inner dimensions"):
        probe("steps", Case(TopLoss()))


def test_a_run_in_which_nothing_moves_is_not_working() -> None:
    with pytest.raises(AssertionError, match="no weight moved"):
        probe("Trainer", Case(TopLoss(), arguments={"learning_rate": 0.0}))


def test_a_refusal_is_quoted_below_its_table() -> None:
    words = probe("Trainer", Case(TopLoss(), arguments={"auto_find_batch_size": True}))
    assert words is not None and words.startswith("OnlineSelection: auto_find_batch_size must be")
    text = tables(lambda host, case: words if host == "steps" else None)
    assert "| TopLoss | yes | yes | refused |" in text
    assert f"- steps, TopLoss: *{words}*" in text


def test_every_method_and_every_host_is_tried() -> None:
    assert list(METHODS) == list(strategies.__all__)
    rows = [cells for table in (METHODS, PARTS, FEATURES) for cells in table.values()]
    assert {host for cells in rows for host in cells} == set(hosts.HOSTS)


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="capabilities: the page must hold `<!-- cap"):
        filled("words", "tables")
