"""Ways to the scores of UDS, and their errors against float64.

The paper's way (arXiv 2510.16882) takes logits, their singular values, and a Fourier transform
along each axis. Ours takes the hidden states.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._inputs import HeadInputs
from onlinesel.bench._measure import Call
from onlinesel.bench._ways import Way
from onlinesel.kernels import HeadGram, JLProjector, logit_nuclear_norm

__all__ = ["UDS_WAYS", "UDSErrors", "norm_by_gram"]

_PROJECTOR_TIME = 512  # the fixed length of the paper's code


def _projector(inputs: HeadInputs) -> JLProjector:
    return JLProjector(inputs.sizes.vocab, max(_PROJECTOR_TIME, inputs.sizes.tokens))


def transformed(logits: Tensor, projector: JLProjector) -> Tensor:
    """Project logits ``(T, V)`` by two Fourier transforms, as the paper's code does."""
    p = projector
    assert p.signs_vocab is not None and p.index_vocab is not None
    assert p.signs_time is not None and p.index_time is not None
    signs_vocab, index_vocab, signs_time, index_time = (
        x.to(logits.device) for x in (p.signs_vocab, p.index_vocab, p.signs_time, p.index_time)
    )
    right = torch.fft.fft(logits * signs_vocab, dim=1).real[:, index_vocab]
    right = right * (p.vocab / p.vocab_dim) ** 0.5
    padded = torch.nn.functional.pad(right, (0, 0, 0, p.time - len(right)))
    left = torch.fft.fft(padded * signs_time.unsqueeze(1), dim=0).real[index_time]
    return (left * (p.time / p.time_dim) ** 0.5).flatten()


def _plain(inputs: HeadInputs) -> Call:
    projector = _projector(inputs)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        norms, embeddings = [], []
        for row in inputs.hidden:
            logits = (row @ inputs.weight.T).float()
            norms.append(torch.linalg.svdvals(logits).sum())
            embeddings.append(transformed(logits, projector))
        return {"nuclear_norm": torch.stack(norms), "embedding": torch.stack(embeddings)}

    return call


def _ours(inputs: HeadInputs, names: tuple[str, ...]) -> Call:
    gram, projector = HeadGram(inputs.head), _projector(inputs)
    gram.root()
    folded = projector.fold(inputs.head)
    ways = {
        "nuclear_norm": lambda: logit_nuclear_norm(inputs.hidden, inputs.head, gram=gram),
        "embedding": lambda: projector.project(inputs.hidden, folded),
    }

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {name: ways[name]() for name in names}

    return call


def _factor(inputs: HeadInputs) -> Call:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        HeadGram(inputs.head).root()
        return {}

    return call


def _fold(inputs: HeadInputs) -> Call:
    projector = _projector(inputs)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        projector.fold(inputs.head)
        return {}

    return call


_BOTH = ("nuclear_norm", "embedding")

UDS_WAYS = (
    Way("plain", "logits + svdvals + FFT", _plain, counted=False),
    Way("uds", "from the hidden states", partial(_ours, names=_BOTH), ours=True, counted=False),
    Way(
        "nuclear_norm", "  nuclear norm alone", partial(_ours, names=_BOTH[:1]), ours=True,
        counted=False,
    ),
    Way(
        "embedding", "  embedding alone", partial(_ours, names=_BOTH[1:]), ours=True, counted=False
    ),
    Way("once_gram", "once per weight: factor", _factor, ours=True, counted=False),
    Way("once_fold", "once per weight: fold", _fold, ours=True, counted=False),
)  # fmt: skip
"""The first four give mappings from scores to tensors whose first dimension is ``batch``."""


def norm_by_gram(logits: Tensor) -> Tensor:
    """Return the sum of the singular values of float64 logits, from their Gram matrix.

    A GPU takes a minute for the values themselves and a moment for this, which loses half of
    float64's digits: 1e-8, far below what is compared.
    """
    values = torch.linalg.eigvalsh((logits @ logits.T).cpu())
    return values.clamp(min=0).sqrt().sum().to(logits.device)


class UDSErrors:
    """Relative errors of the scores of the first row, against the paper's way in float64.

    Args:
        inputs: The inputs.
    """

    def __init__(self, inputs: HeadInputs) -> None:
        logits = inputs.exact_logits(inputs.hidden[0])
        self._exact = {
            "nuclear_norm": (
                norm_by_gram(logits) if logits.is_cuda else torch.linalg.svdvals(logits).sum()
            ),
            "embedding": transformed(logits, _projector(inputs)),
        }

    def __call__(self, way: Way, output: dict[str, Tensor]) -> dict[str, Any]:
        """Return ``relative``, of norms, for each score that the way gives."""
        return {
            name: {"relative": float((value[0].double() - exact).norm() / exact.norm())}
            for name, value in output.items()
            for exact in (self._exact[name],)
        }
