"""Rows of quantised weights, dequantised range by range: bitsandbytes in 4 and 8 bits, and torchao.

No library is imported before a model brings one of its weights. What a layer computes with such a
weight may differ from the product with the dequantised rows: LLM.int8 rounds the hidden states too.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from onlinesel.kernels._rows import RowSource
from onlinesel.kernels._shards import is_sharded

__all__ = ["quantized_rows"]


def quantized_rows(module: Any) -> RowSource | None:
    """Return the rows of a layer whose weight is quantised, None for a weight that is plain.

    Args:
        module: A layer.

    Raises:
        TypeError: The layer has no plain weight, and is none of the known kinds.
    """
    weight: Any = getattr(module, "weight", None)
    kind = type(weight)
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if kind.__name__ == "Params4bit" and state is not None:
        return _FourBit(weight, state)
    if kind.__name__ == "Int8Params" and weight.dtype == torch.int8:
        return _EightBit(weight.data, _row_scales(module))
    if kind.__module__.startswith("torchao."):
        return _Sliced(weight, type(module).__name__)
    if state is None and (is_sharded(weight) or _is_plain(weight)):
        return None
    found = f"{kind.__name__} of {weight.dtype}" if isinstance(weight, Tensor) else kind.__name__
    raise TypeError(_unknown(type(module).__name__, found))


def _is_plain(weight: Any) -> bool:
    # A float8 matrix is not: it has its scales elsewhere.
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1


def _unknown(layer: str, weight: str) -> str:
    return (
        "LMHead.from_model: weight of the head must be floating point, or quantised by "
        f"bitsandbytes or torchao, got {weight} in {layer}. Keep the head out of the quantisation, "
        "or pass an object that gives its rows to LMHead.from_rows (see RowSource)."
    )


class _FourBit:
    """bitsandbytes' NF4 and FP4: blocks of consecutive elements, row after row, share a scale.

    Evaluation on a CPU that multiplies bfloat16 changes the layout of the weight in place, and
    ``state_dict`` changes it back, so the layout is looked up for each range.
    """

    _TOGETHER = 32  # rows of the other layout

    def __init__(self, weight: Any, state: Any) -> None:
        self._weight, self._state = weight, state
        self.shape: tuple[int, ...] = tuple(state.shape)
        self.device: torch.device = weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._state.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        if getattr(self._state, "packing_format_for_cpu", False):
            return self._packed_rows(start, stop)
        state, width, size = self._state, self.shape[1], self.shape[0] * self.shape[1]
        functional = importlib.import_module("bitsandbytes.functional")
        # Whole blocks, and whole blocks of blocks where the scales are quantised as well.
        step = state.blocksize * (state.state2.blocksize if state.nested else 1)
        first = start * width // step * step
        last = min(-(-stop * width // step) * step, size)
        blocks = slice(first // state.blocksize, -(-last // state.blocksize))
        # bitsandbytes 0.50 leaves plain scales as they are when it changes a layout back.
        scales = (state.absmax if state.absmax.dim() == 1 else state.absmax.T.flatten())[blocks]
        if state.nested:
            outer, step2 = state.state2, state.state2.blocksize
            above = outer.absmax[blocks.start // step2 : -(-blocks.stop // step2)]
            above = functional.QuantState(
                above, code=outer.code, blocksize=step2, dtype=outer.dtype
            )
            scales = functional.dequantize_blockwise(scales, above) + state.offset
        inside = functional.QuantState(
            scales.float(), shape=torch.Size((last - first,)), code=state.code, dtype=state.dtype,
            blocksize=state.blocksize, quant_type=state.quant_type,
        )  # fmt: skip
        codes = self._weight.data.reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        flat: Tensor = functional.dequantize_4bit(codes.unsqueeze(1), inside).reshape(-1)
        return flat[start * width - first : stop * width - first].view(stop - start, width)

    def _packed_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the other layout, in which 32 rows lie together.

        For each pair of columns there are 64 codes, two for each row, of which the first 32 are
        the low halves of 32 bytes and the others the high halves.
        """
        together, width = self._TOGETHER, self.shape[1]
        first, last = start // together, -(-stop // together)
        packed = self._weight.data.reshape(-1, width // 2, together)[first:last]
        codes = torch.cat((packed & 15, packed >> 4), 2).unflatten(2, (together, 2))
        codes = codes.transpose(1, 2).reshape(-1, width)
        here = slice(start - first * together, stop - first * together)
        scales = self._state.absmax.T[start:stop].float()
        values = self._state.code.to(codes.device)[codes[here].long()]
        return (values * scales.repeat_interleave(self._state.blocksize, 1)).to(self.dtype)


def _row_scales(module: Any) -> Tensor:
    """Return the largest magnitude of each row, which moves to a state when the layer has run."""
    scales = getattr(module.weight, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if scales is None:
        raise TypeError(_unknown(type(module).__name__, "Int8Params without row scales (SCB)"))
    return scales


class _EightBit:
    """bitsandbytes' LLM.int8: one scale a row."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self._codes, self._scales = weight, scales.to(weight.device)
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.dtype, self.device = torch.float32, weight.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self._codes[start:stop].float() * (self._scales[start:stop, None].float() / 127.0)


class _Sliced:
    """A tensor type of torchao that can be sliced by rows and dequantised."""

    def __init__(self, weight: Any, layer: str) -> None:
        self._weight = weight.detach()
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        try:
            found = self.rows(0, 1)
        except (NotImplementedError, RuntimeError, AttributeError, AssertionError) as error:
            name = type(weight).__name__
            raise TypeError(_unknown(layer, f"{name}, which cannot be cut by rows")) from error
        assert found.shape == (1, self.shape[1]), "a row of the weight is not a row of it"

    def rows(self, start: int, stop: int) -> Tensor:
        rows: Tensor = self._weight[start:stop].dequantize()
        return rows
