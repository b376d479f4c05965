"""The stated versions: one set of oldest ones, in every place that names them."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from onlinesel.callbacks._shared import versions as _versions
from onlinesel.callbacks._shared.versions import OLDEST, check_version

ROOT = Path(__file__).resolve().parents[1]


def floors() -> dict[str, Version]:
    """Return the oldest version of each package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    parsed = (Requirement(line) for group in groups for line in group)
    found: dict[str, Version] = {}
    for requirement in parsed:
        if requirement.name == "onlinesel":
            continue
        (only,) = requirement.specifier
        assert only.operator == ">=", f"{requirement}: say the oldest version alone"
        assert found.setdefault(requirement.name, Version(only.version)) == Version(only.version)
    return found


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = (re.fullmatch(r"([\w-]+)==(\S+)", line) for line in lines)
    return {pair[1]: Version(pair[2]) for pair in pairs if pair}


def test_the_lane_of_the_oldest_versions_installs_what_is_stated() -> None:
    stated, pinned = floors(), pins("constraints-lowest.txt")
    assert {name: pinned.get(name) for name in stated} == stated


def test_the_newest_that_were_tried_are_allowed() -> None:
    tried = pins("constraints.txt")
    assert {n for n, oldest in floors().items() if n in tried and tried[n] < oldest} == set()


def test_the_callbacks_refuse_what_is_older_than_stated() -> None:
    assert {name: Version(v) for name, v in OLDEST.items()} == {n: floors()[n] for n in OLDEST}


def test_this_python_is_stated() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"Programming Language :: Python :: {here}" in project["classifiers"]


@pytest.mark.parametrize(("installed", "fine"), [
    ("5.11.0", False), ("5.12.0.dev0", False), ("5.12.0", True), ("5.23.0", True), ("6.0", True),
])  # fmt: skip
def test_an_older_version_is_refused_in_words(
    installed: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_versions, "version", lambda name: installed)

    def check() -> Any:
        return check_version("OnlineSelection", "transformers", "hf")

    if fine:
        check()
        return
    with pytest.raises(ImportError) as caught:
        check()
    assert str(caught.value) == (
        f"OnlineSelection: transformers must be 5.12 or newer, got {installed}. "
        'Run pip install --upgrade "onlinesel[hf]".'
    )
