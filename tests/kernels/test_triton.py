"""The Triton kernels without a GPU: numbers in the interpreter, machine code counted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onlinesel.bench._compile import (
    compiled_fused,
    compiled_gradient,
    compiled_merge,
    compiled_tile,
    usage,
)
from onlinesel.kernels._blocks import Blocks, default_blocks
from tests.launching import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MISSING = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(MISSING, reason="needs triton")


def test_the_numbers_in_the_interpreter() -> None:
    # The mode must be set before triton is imported, so it takes a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no",
         "--tb=short", "tests/kernels/interpreted.py", "tests/kernels/interpreted_policy.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 50


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("dtype", "everything", "even"), [
    ("*bf16", False, True), ("*bf16", True, True), ("*fp16", False, False)
])  # fmt: skip
def test_the_fused_kernel_on_hopper(dtype: str, everything: bool, even: bool) -> None:
    blocks = default_blocks(torch.bfloat16, 227 * 1024)
    result = compiled_fused(blocks, dtype, 90, everything=everything, even=even)
    found = usage(result)
    assert "wgmma" in result.asm["ptx"]  # the tensor cores of Hopper
    assert found["REG"] <= 255 and found["STACK"] <= 64, found
    assert result.metadata.shared <= 227 * 1024  # what one multiprocessor has


@pytest.mark.parametrize("everything", [False, True])
def test_the_fused_kernel_with_descriptors_on_hopper(everything: bool) -> None:
    blocks = default_blocks(torch.bfloat16, 227 * 1024)._replace(described=True)
    result = compiled_fused(blocks, "*bf16", 90, everything=everything)
    found = usage(result)
    assert "cp.async.bulk.tensor" in result.asm["ptx"] and "wgmma" in result.asm["ptx"]
    assert found["REG"] <= 255 and found["STACK"] == 0, found
    assert result.metadata.shared <= 227 * 1024


def test_the_fused_kernel_in_float32() -> None:
    result = compiled_fused(default_blocks(torch.float32, 64 * 1024), "*fp32", 90, everything=True)
    assert "tf32" not in result.asm["ptx"]
    assert usage(result)["STACK"] <= 64


@pytest.mark.parametrize(("arch", "kibibytes"), [(80, 163), (86, 99)])
def test_the_fused_kernel_before_hopper(arch: int, kibibytes: int) -> None:
    blocks = default_blocks(torch.bfloat16, kibibytes * 1024)
    result = compiled_fused(blocks, "*bf16", arch, everything=True)
    assert "mma.sync" in result.asm["ptx"]
    assert result.metadata.shared <= kibibytes * 1024
    assert usage(result)["STACK"] == 0


def test_the_count_sees_spills() -> None:
    crowded = Blocks(128, 256, 64, 4, 3)  # twice the registers of a thread
    assert usage(compiled_fused(crowded, "*bf16", 90))["STACK"] > 64


def test_the_small_kernels_on_hopper() -> None:
    assert usage(compiled_tile(4096, 8, 90))["STACK"] == 0
    assert usage(compiled_gradient(2048, 4, 90))["STACK"] == 0
    assert usage(compiled_merge(90))["STACK"] == 0
