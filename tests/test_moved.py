"""Public modules that moved are still found under their old names, with a warning."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOVED = sorted(p.stem for p in (ROOT / "onlinesel/_moved").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_warns_and_gives_the_module_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = f"onlinesel.{name}"
    monkeypatch.delitem(sys.modules, old, raising=False)
    told = rf"^{old} moved to (onlinesel\.\w+\.{name}),"
    with pytest.warns(DeprecationWarning, match=told) as seen:
        found = importlib.import_module(old)
    monkeypatch.delitem(sys.modules, old)
    assert found.__name__ == str(seen[0].message).split()[3].rstrip(",")
    assert found is importlib.import_module(found.__name__)


def test_the_old_names_are_those_of_version_0_1() -> None:
    assert MOVED == [
        "agreement", "batch", "classification", "columns", "distributed", "fingerprint", "host",
        "loader", "loss_probe", "order", "padding", "randomness", "rows",
    ]  # fmt: skip
