"""Synthetic states, head and labels, the same on every device of a kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onlinesel.kernels import LMHead

__all__ = ["HeadInputs", "HeadSizes", "chunks"]

_LOGIT_STD = 3.0
_CERTAIN = 30.0  # logits by which the surest label stands out


@dataclass(frozen=True)
class HeadSizes:
    """What inputs are made from.

    Args:
        batch: Rows.
        tokens: Tokens of each.
        width: Hidden size.
        vocab: Vocabulary entries.
        dtype: Of states and head.
        device: Where they are.
        dropped: Share of tokens without upstream gradient.
        seed: Of all numbers.
    """

    batch: int
    tokens: int
    width: int
    vocab: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    dropped: float = 0.0
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what does not vary within a result, ready for JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {"batch": self.batch, "tokens": self.tokens, "vocab": self.vocab}
        return {**sizes, "dtype": dtype, "seed": self.seed}


class HeadInputs:
    """States that enter an LM head, the head, and the labels.

    The states have a power-law spectrum and a common mean, and the norm that a root-mean-square
    norm gives them; the logits have a standard deviation of 3. Each state then leans towards its
    label by 0 to 30 logits, so that there are labels of every certainty.

    Args:
        sizes: How many, in which dtype, and where.

    Attributes:
        sizes: The same.
        hidden: ``(batch, tokens, width)``.
        weight: ``(vocab, width)``.
        head: The head of this weight, without bias.
        labels: ``(batch, tokens)``.
        upstream: ``(2, batch * tokens)`` gradients of log-probability and entropy, float32.

    Example:
        >>> HeadInputs(HeadSizes(1, 4, 8, 50)).hidden.shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, sizes: HeadSizes) -> None:
        self.sizes = sizes
        rows, tokens, width = sizes.batch, sizes.tokens, sizes.width
        # Drawn where they are used: a processor needs ten seconds for the widest head.
        g = torch.Generator(sizes.device).manual_seed(sizes.seed)
        on = sizes.device
        decay = torch.arange(1, width + 1, device=on).float().rsqrt()
        hidden = torch.randn(rows, tokens, width, generator=g, device=on) * decay
        hidden += 0.5 * torch.randn(width, generator=g, device=on) * decay
        hidden *= width**0.5 / hidden.norm(dim=2, keepdim=True)
        weight = torch.randn(sizes.vocab, width, generator=g, device=on).mul_(
            _LOGIT_STD / width**0.5
        )
        labels = torch.randint(0, sizes.vocab, (rows, tokens), generator=g, device=on)
        lean = _CERTAIN * torch.rand(rows, tokens, 1, generator=g, device=on)
        chosen = weight[labels]
        hidden += lean * chosen / chosen.square().sum(dim=2, keepdim=True)
        upstream = torch.randn(2, rows * tokens, generator=g, device=on)
        upstream[1] *= 0.01
        order = torch.randperm(rows * tokens, generator=g, device=on)
        upstream[:, order[: round(sizes.dropped * rows * tokens)]] = 0.0
        self.hidden = hidden.to(sizes.dtype)
        self.weight = weight.to(sizes.dtype)
        self.head = LMHead(self.weight)
        self.labels = labels
        self.upstream = upstream

    @property
    def states(self) -> Tensor:
        """The states of all tokens, ``(batch * tokens, width)``."""
        return self.hidden.flatten(0, 1)

    def first(self, tokens: int) -> HeadInputs:
        """Return the inputs of so many tokens of the first row, over the same head."""
        count = min(tokens, self.sizes.tokens)
        part = copy.copy(self)
        part.sizes = replace(self.sizes, batch=1, tokens=count)
        part.hidden, part.labels = self.hidden[:1, :count], self.labels[:1, :count]
        part.upstream = self.upstream[:, :count]
        return part

    def exact_logits(self, states: Tensor) -> Tensor:
        """Return the logits ``(n, vocab)`` of these inputs in float64."""
        wide = states.double()
        out = wide.new_empty(len(wide), self.sizes.vocab)
        for part in chunks(self.sizes.vocab):
            torch.mm(wide, self.weight[part].double().T, out=out[:, part])
        return out


def chunks(vocab: int) -> Iterator[slice]:
    """Yield parts of a vocabulary whose float64 weight is small."""
    for start in range(0, vocab, 8192):
        yield slice(start, min(start + 8192, vocab))
