"""Compile a Triton kernel for a GPU that is not there, and count what it takes."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onlinesel.kernels._blocks import Blocks

__all__ = [
    "compiled",
    "compiled_fused",
    "compiled_gradient",
    "compiled_merge",
    "compiled_tile",
    "usage",
]


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int, **options: int
) -> Any:
    """Compile for a kind of device; pointers, ``width``, ``vocab`` and strides are multiples of 16.

    Args:
        kernel: A function of ``triton.jit``.
        types: Triton's types of the arguments that are no constants, by name.
        constants: The others.
        arch: Compute capability without its dot, such as 90.
        **options: ``num_warps`` and ``num_stages``.
    """
    triton = importlib.import_module("triton")
    source_of = importlib.import_module("triton.compiler").ASTSource
    target_of = importlib.import_module("triton.backends.compiler").GPUTarget
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    even = [n for n, t in types.items() if t[0] == "*" or n in ("width", "vocab")]
    even += [name for name in types if name.endswith("stride")]
    source = source_of(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    # The fusion of products and sums is named because Triton warns where it is left open.
    chosen = {"enable_fp_fusion": True, **options}
    return triton.compile(source, target=target_of("cuda", arch, 32), options=chosen)


def usage(result: Any) -> dict[str, int]:
    """Return ``REG``, registers of a thread, and ``STACK``, bytes where spilled ones go."""
    nvidia = importlib.import_module("triton.backends.nvidia")
    tool = Path(nvidia.__file__ or "").parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        text = subprocess.run(
            [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK")}


def compiled_fused(
    blocks: Blocks, dtype: str, arch: int, *, everything: bool = False, even: bool = True
) -> Any:
    """Compile the fused kernel with all its sums.

    Args:
        blocks: Sizes.
        dtype: Triton's type of a pointer to states and weight, such as ``"*bf16"``.
        arch: See :func:`compiled`.
        everything: Whether the head has a bias and a soft cap, and tokens a temperature.
        even: Whether the hidden size is a multiple of the depth.
    """
    kernel = importlib.import_module("onlinesel.kernels._fused").fused_kernel
    types = {"hidden": dtype, "weight": dtype, "targets": "*i64", "out": "*fp32", "count": "i32"}
    types |= {"vocab": "i32", "width": "i32", "hidden_stride": "i32", "weight_stride": "i32"}
    types |= {"scale": "fp32", "cap": "fp32"}
    constants: dict[str, Any] = dict.fromkeys(("BIAS", "CAP", "TEMPERED"), everything)
    constants |= {"SQUARES": True, "SPREAD": True, "UPCAST": False, "EVEN": even}
    names = ("tokens", "entries", "depth", "tiles", "together", "described")
    constants |= {name.upper(): getattr(blocks, name) for name in names}
    if everything:
        types |= {"bias": dtype, "inverse": "*fp32"}
    else:
        constants |= {"bias": None, "inverse": None}
    return compiled(
        kernel, types, constants, arch, num_warps=blocks.warps, num_stages=blocks.stages
    )


def compiled_tile(columns: int, warps: int, arch: int) -> Any:
    """Compile the kernel of the tile backend with everything it can do."""
    kernel = importlib.import_module("onlinesel.kernels._tile").tile_kernel
    types = dict.fromkeys(("y_all", "m_all", "s_all", "q_all", "u_all"), "*fp32")
    types |= {"tile": "*fp32", "bias": "*bf16", "targets": "*i64", "inverse": "*fp32"}
    types |= {"width": "i32", "start": "i32", "scale": "fp32", "cap": "fp32"}
    constants = dict.fromkeys(("BIAS", "CAP", "TEMPERED", "SQUARES", "SPREAD"), True)
    return compiled(kernel, types, {**constants, "COLUMNS": columns}, arch, num_warps=warps)


def compiled_gradient(columns: int, warps: int, arch: int) -> Any:
    """Compile the kernel of a tile's gradient with everything it can do."""
    kernel = importlib.import_module("onlinesel.kernels._gradient").gradient_kernel
    types = dict.fromkeys(("inverse", "log_norm", "entropy", "at_label"), "*fp32")
    types |= dict.fromkeys(("tile", "of_logprob", "of_entropy"), "*fp32")
    types |= {"out": "*bf16", "bias": "*bf16", "targets": "*i64"}
    types |= {"width": "i32", "scale": "fp32", "cap": "fp32"}
    constants = dict.fromkeys(("BIAS", "CAP", "TEMPERED", "SPREAD"), True)
    return compiled(kernel, types, {**constants, "COLUMNS": columns}, arch, num_warps=warps)


def compiled_merge(arch: int) -> Any:
    """Compile the kernel that merges the splits of the fused kernel."""
    fused = importlib.import_module("onlinesel.kernels._fused")
    types = {"parts": "*fp32", "out": "*fp32", "count": "i32", "splits": "i32"}
    constants = {"SQUARES": True, "SPREAD": True, "TOKENS": fused.MERGED_TOKENS}
    return compiled(fused.merge_kernel, types, constants, arch)
