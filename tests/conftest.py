"""What every test runs under: one thread, no network, no display, the same examples each time."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_ASSETS = tempfile.mkdtemp(prefix="onlinesel-tests-")  # nothing kept from other runs of the tests
atexit.register(shutil.rmtree, _ASSETS, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    HF_ASSETS_CACHE=_ASSETS,
)  # before torch and the tokenizers read them  # fmt: skip

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.launching import settle  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """All test modules and what they import are there."""
    settle()
