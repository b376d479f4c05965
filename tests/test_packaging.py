"""The archives: all is in the source, the packages alone in the wheel, usable from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import onlinesel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "onlinesel": "onlinesel",
    "callbacks": "onlinesel/callbacks",
    "recipes": "onlinesel/recipes",
}
MODULES = ["", ".callbacks", ".recipes", ".strategies", ".kernels", ".report.runlog"]


def run(*command: str | Path, cwd: Path, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that leftovers of earlier builds cannot hide a missing file.

    The wheel is built of the source distribution, as an installer would.
    """
    source = tmp_path_factory.mktemp("source") / "copy"
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "out"
    )
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    run("-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_source_holds_what_builds_tests_and_documents_it(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("docs", "examples", "recipes", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    top = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "mkdocs.yml",
           "constraints.txt", "constraints-lowest.txt", "pyproject.toml"}  # fmt: skip
    assert {"docs/sft.md", "examples/launch/zero3.json"} <= expected
    assert sorted((expected | top) - packed) == []


def test_it_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".js") or path.name == "py.typed"
    }
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert "onlinesel/py.typed" in expected
    assert packed == expected


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"onlinesel-{onlinesel.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    required = [
        line for line in metadata if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert len(required) == 1 and required[0].startswith("Requires-Dist: torch")
    assert f"Version: {onlinesel.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert (
        sum(
            line.startswith("Classifier: Programming Language :: Python :: 3.") for line in metadata
        )
        == 3
    )
    assert "onlinesel = onlinesel.cli:main" in scripts


def test_it_works_installed_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    code = f"""
import importlib, json
from importlib.metadata import version
files = {{n: importlib.import_module("onlinesel" + n).__file__ for n in {MODULES}}}
print(json.dumps([version("onlinesel"), files]))
"""
    out = run("-P", "-c", code, cwd=elsewhere, PYTHONPATH=str(target))
    version, files = json.loads(out.splitlines()[-1])
    assert version == onlinesel.__version__
    assert [name for name, file in files.items() if not Path(file).is_relative_to(target)] == []
    assert Path(files[".callbacks"]).parent == target / "onlinesel" / "callbacks"
