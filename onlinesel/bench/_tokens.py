"""Ways to score tokens from hidden states, and their errors against float64."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._inputs import HeadInputs
from onlinesel.bench._measure import Call
from onlinesel.bench._ways import Way, fused_head, liger_scaled
from onlinesel.kernels import token_scores

__all__ = ["TOKEN_WAYS", "TokenErrors", "product"]

_ALL = ("nll", "entropy", "el2n", "sum_sq", "margin", "top1")
_SAME = ("nll", "entropy")
_TRL = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")


def product(inputs: HeadInputs) -> Call:
    """Prepare the bare product ``H W^T`` in the dtype of the inputs, into a tensor that is there.

    No score that reads every logit is faster than this.
    """
    states, weight = inputs.states, inputs.weight
    out = states.new_empty(len(states), len(weight))

    def call() -> dict[str, Tensor]:
        torch.mm(states, weight.T, out=out)
        return {}

    return call


def _ours(inputs: HeadInputs, backend: str, outputs: Sequence[str] = _ALL) -> Call:
    def call() -> dict[str, Tensor]:
        scores = token_scores(
            inputs.hidden, inputs.head, inputs.labels, outputs=outputs, backend=backend
        )
        return {name: getattr(scores, name) for name in outputs}

    return call


@torch.no_grad()
def _log_softmax(inputs: HeadInputs) -> dict[str, Tensor]:
    logits = inputs.states @ inputs.weight.T
    log_p = torch.log_softmax(logits.float(), dim=1)
    nll = -log_p.gather(1, inputs.labels.view(-1, 1)).squeeze(1)
    return {"nll": nll, "entropy": -(log_p.exp() * log_p).sum(1)}


def _plain(inputs: HeadInputs) -> Call:
    return partial(_log_softmax, inputs)


def _trl(inputs: HeadInputs) -> Call:
    head = fused_head(inputs, inputs.hidden, inputs.weight, _TRL)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        out = head()
        return {
            "nll": -out.log_probs, "entropy": out.entropy, "log_sum_sq": out.log_sum_sq_probs,
            "top1": out.is_top1,
        }  # fmt: skip

    return call


def _flat(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.states, inputs.weight, inputs.labels.flatten()


def _liger(inputs: HeadInputs) -> Call:
    loss = importlib.import_module("liger_kernel.transformers.functional")

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"nll": loss.liger_fused_linear_cross_entropy(*_flat(inputs), reduction="none")}

    return call


def _liger_scaled(inputs: HeadInputs) -> Call:
    function = liger_scaled()

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        nll, entropy = function.apply(*_flat(inputs), return_entropy=True)
        return {"nll": nll, "entropy": entropy}

    return call


def _cut(inputs: HeadInputs) -> Call:
    package = importlib.import_module("cut_cross_entropy")

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"nll": package.linear_cross_entropy(*_flat(inputs), reduction="none")}

    return call


TOKEN_WAYS = (
    Way("gemm", "bare product H W^T", product, roof=True),
    Way("torch", "token_scores, torch: all six", partial(_ours, backend="torch"), ours=True),
    Way(
        "torch_same", "token_scores, torch: nll, entropy",
        partial(_ours, backend="torch", outputs=_SAME), ours=True,
    ),
    Way(
        "tile", "token_scores, tile: all six", partial(_ours, backend="tile"), "triton",
        cuda=True, ours=True, counted=False,
    ),
    Way(
        "triton", "token_scores, triton: all six", partial(_ours, backend="triton"), "triton",
        cuda=True, ours=True, counted=False,
    ),
    Way("log_softmax", "log_softmax: nll, entropy", _plain),
    Way("trl", "TRL fused head: four", _trl, "trl"),
    Way("liger", "Liger fused CE: nll", _liger, "liger_kernel", cuda=True),
    Way("liger_scaled", "Liger scaled CE: nll, entropy", _liger_scaled, "liger_kernel",
        counted=False),
    Way("cut", "cut-cross-entropy: nll", _cut, "cut_cross_entropy", cuda=True, counted=False),
)  # fmt: skip
"""Each gives a mapping from scores to ``(batch * tokens,)`` tensors, of any shape."""


class TokenErrors:
    """Largest errors of scores, against float64 from the same inputs.

    Args:
        inputs: The inputs.
        tokens: How many of the tokens are looked at, evenly spread.
    """

    def __init__(self, inputs: HeadInputs, tokens: int) -> None:
        count = len(inputs.states)
        self._at = torch.linspace(0, count - 1, min(tokens, count)).round().long()
        self._at = self._at.to(inputs.sizes.device)
        logits = inputs.exact_logits(inputs.states[self._at])
        label = inputs.labels.flatten()[self._at].unsqueeze(1)
        log_p = torch.log_softmax(logits, dim=1)
        p = log_p.exp()
        # Where the label is nearly certain, 1 - p_y would have lost its digits even in float64.
        others = p.scatter(1, label, 0.0)
        missing = others.sum(1)
        nll = -torch.log1p(-missing)
        nll = torch.where(missing < 0.5, nll, -log_p.gather(1, label).squeeze(1))
        self.largest_logit = float(logits.abs().max())
        self._exact = {
            "nll": nll,
            "entropy": -(p * log_p).sum(1),
            "el2n": (others.square().sum(1) + missing.square()).sqrt(),
        }

    def __call__(self, way: Way, output: dict[str, Tensor]) -> dict[str, Any]:
        """Return ``max_abs`` and ``max_rel`` of each score that the way gives."""
        found = {name: value.flatten()[self._at].double() for name, value in output.items()}
        if "log_sum_sq" in found:  # as far as it follows from what TRL gives
            p = torch.exp(-found["nll"])
            found["el2n"] = (found["log_sum_sq"].exp() - 2 * p + 1).clamp(min=0).sqrt()
        return {
            name: _largest(found[name] - exact, exact)
            for name, exact in self._exact.items() if name in found
        }  # fmt: skip


def _largest(difference: Tensor, exact: Tensor) -> dict[str, float]:
    apart = difference.abs()
    return {"max_abs": float(apart.max()), "max_rel": float((apart / exact.abs()).max())}
