"""The Triton kernels without a GPU: numbers in the interpreter, machine code counted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(MISSING, reason="needs triton")


def test_the_numbers_in_the_interpreter() -> None:
    # The mode must be set before triton is imported, so it takes a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no",
         "--tb=short", "tests/kernels/interpreted.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 50


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int = 90, **options: int
) -> Any:
    """Compile for a kind of device; pointers and the sizes in ``types`` are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    even = [n for n, t in types.items() if t[0] == "*" or n in ("width", "vocab")]
    even += [name for name in types if name.endswith("stride")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    # The fusion of products and sums is named because Triton warns where it is left open.
    chosen = {"enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=chosen)


def usage(result: Any, folder: Path) -> dict[str, int]:
    """Return registers and bytes of stack, where spilled registers go, of a compiled kernel."""
    import triton.backends.nvidia as nvidia

    binary = folder / "kernel.cubin"
    binary.write_bytes(result.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK")}


def fused(blocks: Any, dtype: str, *, everything: bool, even: bool = True, arch: int = 90) -> Any:
    from onlinesel.kernels import _fused

    types = {"hidden": dtype, "weight": dtype, "targets": "*i64", "out": "*fp32", "count": "i32"}
    types |= {"vocab": "i32", "width": "i32", "hidden_stride": "i32", "weight_stride": "i32"}
    types |= {"scale": "fp32", "cap": "fp32"}
    constants = {"BIAS": everything, "CAP": everything, "TEMPERED": everything, "SQUARES": True}
    constants |= {"SPREAD": True, "UPCAST": False, "EVEN": even, "DESCRIBED": blocks.described}
    constants |= {name.upper(): getattr(blocks, name) for name in ("tokens", "entries", "depth")}
    constants |= {name.upper(): getattr(blocks, name) for name in ("tiles", "together")}
    if everything:
        types |= {"bias": dtype, "inverse": "*fp32"}
    else:
        constants |= {"bias": None, "inverse": None}
    return compiled(
        _fused.fused_kernel, types, constants, arch, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("dtype", "everything", "even"), [
    ("*bf16", False, True), ("*bf16", True, True), ("*fp16", False, False)
])  # fmt: skip
def test_the_fused_kernel_on_hopper(
    dtype: str, everything: bool, even: bool, tmp_path: Path
) -> None:
    import torch

    from onlinesel.kernels._blocks import default_blocks

    blocks = default_blocks(torch.bfloat16, 227 * 1024)
    result = fused(blocks, dtype, everything=everything, even=even)
    found = usage(result, tmp_path)
    assert "wgmma" in result.asm["ptx"]  # the tensor cores of Hopper
    assert found["REG"] <= 255 and found["STACK"] <= 64, found
    assert result.metadata.shared <= 227 * 1024  # what one multiprocessor has


@pytest.mark.parametrize("everything", [False, True])
def test_the_fused_kernel_with_descriptors_on_hopper(everything: bool, tmp_path: Path) -> None:
    import torch

    from onlinesel.kernels._blocks import default_blocks

    blocks = default_blocks(torch.bfloat16, 227 * 1024)._replace(described=True)
    result = fused(blocks, "*bf16", everything=everything)
    found = usage(result, tmp_path)
    assert "cp.async.bulk.tensor" in result.asm["ptx"] and "wgmma" in result.asm["ptx"]
    assert found["REG"] <= 255 and found["STACK"] == 0, found
    assert result.metadata.shared <= 227 * 1024


def test_the_fused_kernel_in_float32(tmp_path: Path) -> None:
    import torch

    from onlinesel.kernels._blocks import default_blocks

    result = fused(default_blocks(torch.float32, 64 * 1024), "*fp32", everything=True)
    assert "tf32" not in result.asm["ptx"]
    assert usage(result, tmp_path)["STACK"] <= 64


@pytest.mark.parametrize(("arch", "kibibytes"), [(80, 163), (86, 99)])
def test_the_fused_kernel_before_hopper(arch: int, kibibytes: int, tmp_path: Path) -> None:
    import torch

    from onlinesel.kernels._blocks import default_blocks

    blocks = default_blocks(torch.bfloat16, kibibytes * 1024)
    result = fused(blocks, "*bf16", everything=True, arch=arch)
    assert "mma.sync" in result.asm["ptx"]
    assert result.metadata.shared <= kibibytes * 1024
    assert usage(result, tmp_path)["STACK"] == 0


def test_the_count_sees_spills(tmp_path: Path) -> None:
    from onlinesel.kernels._blocks import Blocks

    crowded = Blocks(128, 256, 64, 4, 3)  # twice the registers of a thread
    assert usage(fused(crowded, "*bf16", everything=False), tmp_path)["STACK"] > 64


def test_the_small_kernels_on_hopper(tmp_path: Path) -> None:
    from onlinesel.kernels import _fused, _tile

    fields = {name: "*fp32" for name in ("y_all", "m_all", "s_all", "q_all", "u_all")}
    types = {"tile": "*fp32", "bias": "*bf16", "targets": "*i64", "inverse": "*fp32", **fields}
    types |= {"width": "i32", "start": "i32", "scale": "fp32", "cap": "fp32"}
    constants = dict.fromkeys(("BIAS", "CAP", "TEMPERED", "SQUARES", "SPREAD"), True)
    result = compiled(_tile.tile_kernel, types, {**constants, "COLUMNS": 4096}, num_warps=8)
    assert usage(result, tmp_path)["STACK"] == 0
    types = {"parts": "*fp32", "out": "*fp32", "count": "i32", "splits": "i32"}
    constants = {"SQUARES": True, "SPREAD": True, "TOKENS": 128}
    assert usage(compiled(_fused.merge_kernel, types, constants), tmp_path)["STACK"] == 0
