"""Under every engine two processes with ``fused_logprobs`` train what TRL's head trains in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.callbacks.grpo_head_two_ranks import CASES, run, scenarios
from tests.launching import torchrun

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

PAIRS = [(engine, name) for engine, names in CASES.items() for name in names]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grpo_head_two_ranks")
    printed = torchrun("callbacks.grpo_head_two_ranks", str(path), port=29631)
    assert {f"done {engine} {name}" for engine, name in PAIRS} <= set(printed.splitlines())
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grpo_head_one_rank")
    for name in scenarios():
        run(path, "alone", name, fused=False)
    return path


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_two_processes_train_what_trls_head_trains_in_one(
    pair: Path, alone: Path, engine: str, name: str
) -> None:
    wanted = torch.load(alone / f"alone-{name}-0.pt")
    for rank in (0, 1):
        moved = torch.load(pair / f"{engine}-{name}-{rank}.pt")
        assert moved.keys() == wanted.keys()
        assert wanted["lm_head.weight"].norm() > 0
        for key, value in wanted.items():
            assert (moved[key] - value).norm() <= 1e-5 * value.norm(), key
