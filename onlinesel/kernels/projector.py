"""A fixed-size embedding of a sample's logits, without the logits.

The embedding of the (T, V) logits ``Z`` is ``vec(Q^T Z P)``: a Johnson-Lindenstrauss map on each
side, made of random signs, a discrete cosine and a random choice of frequencies. With ``Z = H W^T``
it equals ``vec((Q^T H) (W^T P))``, where the fold ``W^T P`` is (d, vocab_dim) and changes only with
the weight. A bias is one more row of the fold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onlinesel.kernels._checks import check_hidden, check_rows
from onlinesel.kernels._columns import merge_columns, sum_over_vocabulary
from onlinesel.kernels._product import full_precision
from onlinesel.kernels.head import LMHead

__all__ = ["JLProjector"]

_SCALES = ("uds", "unit")
_VOCAB_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class JLProjector:
    """A random projection of (time, vocab) logits to ``time_dim * vocab_dim`` numbers.

    ``P[v, k] = s_v cos(2 pi v i_k / V) sqrt(V / vocab_dim)`` with signs ``s`` and frequencies
    ``i`` drawn uniformly, with replacement; ``Q`` is the same over time. Everything is drawn on
    the CPU from the seed, so that every rank and every machine has the same map.

    Source: UDS, Utility-Diversity Sampling (arXiv 2510.16882).

    Args:
        vocab: ``V``, entries of the vocabulary.
        time: Rows of the longest sample; shorter ones count as extended by zeros.
        vocab_dim: Numbers kept of the vocabulary.
        time_dim: Numbers kept of time.
        seed: Seed of the draws.
        scale: ``"uds"`` keeps the paper's scale, ``E||z||^2 = (V time / 4) ||Z||_F^2``, to which
            its weight of diversity belongs; ``"unit"`` gives ``E||z||^2 = ||Z||_F^2``.
        signs_vocab: ``(V,)`` of +1 and -1 to use instead of drawing, likewise the next three.
        index_vocab: ``(vocab_dim,)`` integers in [0, V).
        signs_time: ``(time,)`` of +1 and -1.
        index_time: ``(time_dim,)`` integers in [0, time).

    Raises:
        ValueError: A size is below 1, the scale is unknown, or a given tensor does not fit.

    Example:
        >>> import torch
        >>> head = LMHead(torch.eye(10, 4))
        >>> projector = JLProjector(vocab=10, time=6, vocab_dim=5, time_dim=2)
        >>> folded = projector.fold(head)
        >>> projector.project(torch.ones(3, 6, 4), folded).shape
        torch.Size([3, 10])
    """

    vocab: int
    time: int
    vocab_dim: int = 128
    time_dim: int = 8
    seed: int = 0
    scale: str = "uds"
    signs_vocab: Tensor | None = field(default=None, repr=False)
    index_vocab: Tensor | None = field(default=None, repr=False)
    signs_time: Tensor | None = field(default=None, repr=False)
    index_time: Tensor | None = field(default=None, repr=False)
    # What was moved to a device or computed there once: a scorer asks for it in every step.
    _kept: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab", "time", "vocab_dim", "time_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"JLProjector: {name} must be at least 1, got {getattr(self, name)}. "
                    "Pass the sizes of the logits and of the embedding."
                )
        if self.scale not in _SCALES:
            raise ValueError(
                f'JLProjector: scale must be "uds" or "unit", got {self.scale!r}. '
                'Pass "uds" for the scale of the paper.'
            )
        generator = torch.Generator().manual_seed(self.seed)
        for axis, size, kept in (
            ("vocab", self.vocab, self.vocab_dim),
            ("time", self.time, self.time_dim),
        ):
            # Both are always drawn, so that giving one does not change the others.
            signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
            index = torch.randint(0, size, (kept,), generator=generator)
            self._settle(f"signs_{axis}", signs)
            self._settle(f"index_{axis}", index)
            bins = getattr(self, f"index_{axis}")
            if int(bins.min()) < 0 or int(bins.max()) >= size:
                raise ValueError(
                    f"JLProjector: index_{axis} must be in [0, {size}), got values from "
                    f"{int(bins.min())} to {int(bins.max())}. Draw them below {axis}."
                )

    def _settle(self, name: str, drawn: Tensor) -> None:
        """Keep the given tensor of this name, or the drawn one."""
        given = getattr(self, name)
        if given is not None and given.shape != drawn.shape:
            raise ValueError(
                f"JLProjector: {name} must be of shape {tuple(drawn.shape)}, got "
                f"{tuple(given.shape)}. Pass None to draw it from the seed."
            )
        value = drawn if given is None else given.detach().to("cpu", torch.int64)
        object.__setattr__(self, name, value)

    @property
    def size(self) -> int:
        """Length of an embedding, ``time_dim * vocab_dim``."""
        return self.time_dim * self.vocab_dim

    def fold(self, head: LMHead) -> Tensor:
        """Compute ``W^T P``, the part of the projection that depends on the weight only.

        Keep it until the weight changes; nothing detects a change (see ``HeadGram``). It is a plain
        tensor, so whoever keeps it folds again: ``CausalLMScorer`` does so for this and the Gram
        matrix together, after ``refresh_every`` calls of its ``advance``.

        Args:
            head: A head of ``vocab`` entries, without soft cap. Where its weight is a DTensor cut
                by rows, each rank folds its own rows, and the sum over ranks is a collective.

        Returns:
            ``(d, vocab_dim)``, or ``(d + 1, vocab_dim)`` with a bias, whose row is the last;
            float32, or float64 for a float64 weight. The scale of the head is in it.

        Raises:
            ValueError: The head has another vocabulary, or a soft cap.
        """
        self._check_head(head)
        if head.softcap is not None:
            raise ValueError(
                f"JLProjector.fold: head must have no soft cap, got {head.softcap}. Soft-capped "
                "logits are not linear in hidden: pass the head itself to project()."
            )
        dtype = torch.promote_types(head.weight.dtype, torch.float32)

        def product(entries: slice, columns: Tensor) -> Tensor:
            signs = self._columns(entries.start, entries.stop, columns.device)
            return (columns.T @ signs.to(dtype)).double()

        with full_precision(head.device):
            total = sum_over_vocabulary(head, product, _VOCAB_CHUNK, dtype)
            return (merge_columns(head, total) * head.scale).to(dtype)

    def project(
        self,
        hidden: Tensor,
        folded: Tensor | LMHead,
        rows: Tensor | None = None,
        *,
        compact: bool = True,
    ) -> Tensor:
        """Embed the logits of each sample.

        Args:
            hidden: ``(B, T, d)`` states that enter the head.
            folded: The result of :meth:`fold`; or the head itself, whose vocabulary is then
                streamed, which costs the full product and is the only way under a soft cap.
            rows: ``(B, T)`` mask of the rows that count, or None for all. Other rows may hold
                anything, nan included.
            compact: Move the rows that count to the front before the projection over time, so
                that an embedding does not depend on where the padding is. False keeps positions.

        Returns:
            ``(B, time_dim * vocab_dim)``, time-major; float32, or float64 when an input is.

        Raises:
            ValueError: A shape is not as stated, or a sample is longer than ``time``.
        """
        if isinstance(folded, LMHead):
            self._check_head(folded)
            check_hidden("JLProjector.project", folded, hidden, dims=3)
            dtype = folded.accumulation_dtype(hidden)
        else:
            self._check_folded(hidden, folded)
            both = torch.promote_types(hidden.dtype, folded.dtype)
            dtype = torch.promote_types(both, torch.float32)
        mask = check_rows("JLProjector.project", hidden, rows)
        with full_precision(hidden.device):
            left = self._time_map(mask, compact, dtype)
            states = hidden.to(dtype)
            if rows is not None:
                states = states.masked_fill(~mask.unsqueeze(2), 0.0)
            if isinstance(folded, LMHead):
                out = self._stream(states, folded, left)
            else:
                # Time first: it leaves time_dim rows for the wider product.
                narrow = left.mT @ states
                if folded.shape[0] > hidden.shape[2]:
                    narrow = torch.cat((narrow, left.sum(1).unsqueeze(2)), 2)
                out = narrow @ folded.to(device=hidden.device, dtype=dtype)
        return out.reshape(len(hidden), self.size)

    def _stream(self, states: Tensor, head: LMHead, left: Tensor) -> Tensor:
        """Return ``Q^T Z P`` summed over vocabulary parts."""
        out = states.new_zeros(len(states), self.time_dim, self.vocab_dim)
        for start in range(0, self.vocab, _VOCAB_CHUNK):
            part = head.part(start, start + _VOCAB_CHUNK, states.dtype)
            columns = self._columns(start, start + _VOCAB_CHUNK, states.device).to(states.dtype)
            for index in range(len(states)):
                # Rows that do not count are zero in left, which a finite logit cannot undo.
                out[index] += left[index].T @ part.logits(states[index]) @ columns
        return out

    def _columns(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return rows ``start:stop`` of ``P``, (n, vocab_dim) float64."""
        signs, index = self._on("signs_vocab", device), self._on("index_vocab", device)
        return _cosines(signs, index, slice(start, stop))

    def _time_map(self, mask: Tensor, compact: bool, dtype: torch.dtype) -> Tensor:
        """Return ``Q`` for each sample, (B, T, time_dim), zero at the rows that do not count."""
        places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        if compact:
            places = mask.long().cumsum(1) - 1
        if mask.shape[1] > self.time:
            longest = int(places.max()) + 1 if mask.numel() else 0
            if longest > self.time:
                raise ValueError(
                    f"JLProjector.project: hidden must have at most time={self.time} rows, got "
                    f"{longest}. Give the projector (or UDS) time={longest}, or truncate."
                )
        picked = self._time_table(mask.device, dtype)[places.clamp(min=0)]
        return picked * mask.unsqueeze(2)

    def _time_table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the (time, time_dim) rows of ``Q``, scaled, on a device."""
        key = ("table", device, dtype)
        if key not in self._kept:
            signs, index = self._on("signs_time", device), self._on("index_time", device)
            table = _cosines(signs, index, slice(0, self.time))
            if self.scale == "unit":
                table = table * (2.0 / math.sqrt(self.vocab * self.time))
            self._kept[key] = table.to(dtype)
        return self._kept[key]

    def _on(self, name: str, device: torch.device) -> Tensor:
        """Return signs or frequencies on a device."""
        tensor: Tensor = getattr(self, name)
        if device.type == "cpu":
            return tensor
        if (name, device) not in self._kept:
            self._kept[name, device] = tensor.to(device)
        return self._kept[name, device]

    def _check_head(self, head: LMHead) -> None:
        if head.vocab_size != self.vocab:
            raise ValueError(
                f"JLProjector: head must have vocab={self.vocab} entries, got {head.vocab_size}. "
                f"Build JLProjector(vocab={head.vocab_size}, ...)."
            )

    def _check_folded(self, hidden: Tensor, folded: Tensor) -> None:
        if hidden.dim() != 3 or folded.dim() != 2:
            raise ValueError(
                f"JLProjector.project: hidden must be of shape (batch, time, d) and folded a "
                f"matrix, got {tuple(hidden.shape)} and {tuple(folded.shape)}. fold(head) gives "
                "the matrix."
            )
        extra = folded.shape[0] - hidden.shape[2]
        if folded.shape[1] != self.vocab_dim or extra not in (0, 1):
            raise ValueError(
                f"JLProjector.project: folded must be of shape (d, {self.vocab_dim}) or one row "
                f"more with d={hidden.shape[2]}, got {tuple(folded.shape)}. Pass fold(head)."
            )


def _cosines(signs: Tensor, index: Tensor, part: slice) -> Tensor:
    """Return rows of ``s_v cos(2 pi v i_k / n) sqrt(n / r)`` in float64."""
    size, kept = signs.numel(), index.numel()
    chosen = signs[part].double()
    steps = torch.arange(part.start, part.start + len(chosen), device=signs.device)
    # The product is reduced in integers: 2 pi v k / n of a large v k would lose its phase.
    phase = (steps.unsqueeze(1) * index).remainder_(size)
    cosines = phase.double().mul_(2.0 * math.pi / size).cos_()
    return cosines.mul_(chosen.unsqueeze(1) * math.sqrt(size / kept))
