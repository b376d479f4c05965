"""Ways from hidden states to the gradients of a policy's log-probabilities and entropies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._inputs import HeadInputs, chunks
from onlinesel.bench._measure import Call
from onlinesel.bench._ways import Way, fused_head, liger_scaled
from onlinesel.kernels import LMHead, policy_logprobs

__all__ = ["POLICY_WAYS", "PolicyErrors", "forwards"]

Forward = Callable[[], tuple[Tensor, Tensor]]


Make = Callable[[HeadInputs, Tensor, Tensor], Forward]


def _leaves(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Return states and head that want gradients."""
    return inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()


def _trained(inputs: HeadInputs, make: Make) -> Call:
    """Prepare forward and backward, with states and head that want gradients."""
    states, weight = _leaves(inputs)
    forward = make(inputs, states, weight)

    def call() -> dict[str, Tensor]:
        found = [output.flatten() for output in forward()]
        upstream = [g.to(output.dtype) for g, output in zip(inputs.upstream, found, strict=True)]
        gradients = torch.autograd.grad(found, (states, weight), upstream)
        return dict(zip(("states", "weight"), gradients, strict=True))

    return call


def _ours(inputs: HeadInputs, states: Tensor, weight: Tensor, backend: str) -> Forward:
    head = LMHead(weight)
    return lambda: policy_logprobs(states, head, inputs.labels, backend=backend)


def _plain(inputs: HeadInputs, states: Tensor, weight: Tensor) -> Forward:
    def forward() -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax((states.flatten(0, 1) @ weight.T).float(), dim=1)
        chosen = log_p.gather(1, inputs.labels.view(-1, 1)).squeeze(1)
        return chosen, -(log_p.exp() * log_p).sum(1)

    return forward


def _trl(inputs: HeadInputs, states: Tensor, weight: Tensor) -> Forward:
    head = fused_head(inputs, states, weight, ("log_probs", "entropy"))

    def forward() -> tuple[Tensor, Tensor]:
        out = head()
        return out.log_probs, out.entropy

    return forward


def _liger(inputs: HeadInputs, states: Tensor, weight: Tensor) -> Forward:
    function = liger_scaled()

    def forward() -> tuple[Tensor, Tensor]:
        flat = (states.flatten(0, 1), weight, inputs.labels.flatten())
        nll, entropy = function.apply(*flat, return_entropy=True)
        return -nll, entropy

    return forward


def _products(inputs: HeadInputs, kept: bool) -> Call:
    """Prepare the three bare products, the two of the backward over all tokens or those kept."""
    states, weight = inputs.states, inputs.weight
    used = inputs.upstream.ne(0).any(0) if kept else torch.ones_like(inputs.upstream[0]).bool()
    rows = states[used]
    logits = states.new_empty(len(states), len(weight))
    of_states, of_weight = torch.empty_like(rows), torch.empty_like(weight)

    def call() -> dict[str, Tensor]:
        torch.mm(states, weight.T, out=logits)
        dz = logits[: len(rows)]
        torch.mm(dz, weight, out=of_states)
        torch.mm(dz.T, rows, out=of_weight)
        return {}

    return call


def _way(name: str, label: str, make: Callable[..., Forward], *args: Any, **kwargs: Any) -> Way:
    return Way(name, label, partial(_trained, make=make), *args, **kwargs)


POLICY_WAYS = (
    Way("gemm", "three bare products, all tokens", partial(_products, kept=False), roof=True),
    Way("gemm_kept", "the same, backward of kept tokens", partial(_products, kept=True),
        roof=True),
    _way("torch", "policy_logprobs, torch", partial(_ours, backend="torch"), ours=True),
    _way("tile", "policy_logprobs, tile", partial(_ours, backend="tile"), "triton", cuda=True,
         ours=True, counted=False),
    _way("triton", "policy_logprobs, triton", partial(_ours, backend="triton"), "triton",
         cuda=True, ours=True, counted=False),
    _way("log_softmax", "log_softmax", _plain),
    _way("trl", "TRL fused head", _trl, "trl"),
    _way("liger_scaled", "Liger scaled CE", _liger, "liger_kernel", counted=False),
)  # fmt: skip
"""Those that are no bare products give the gradients of ``states`` and ``weight``."""


def forwards(inputs: HeadInputs, names: Iterable[str]) -> dict[str, Call]:
    """Prepare the forward alone of these ways, with the graph that a backward would need."""
    return {
        way.name: way.prepare.keywords["make"](inputs, *_leaves(inputs))
        for way in POLICY_WAYS
        if way.name in names and isinstance(way.prepare, partial) and not way.roof
    }


class PolicyErrors:
    """Relative errors of the gradients, against float64 from the same inputs.

    Both gradients are taken for some of the tokens alone, which a way computes once more for this.

    Args:
        inputs: The inputs.
        tokens: How many tokens of the first row.
    """

    def __init__(self, inputs: HeadInputs, tokens: int) -> None:
        self._few = few = inputs.first(tokens)
        logits = inputs.exact_logits(few.states).requires_grad_()
        log_p = torch.log_softmax(logits, dim=1)
        chosen = log_p.gather(1, few.labels.view(-1, 1)).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        upstream = few.upstream.double()
        (self._dz,) = torch.autograd.grad(
            (upstream[0] * chosen + upstream[1] * entropy).sum(), logits
        )

    def __call__(self, way: Way, output: Any) -> dict[str, Any]:
        """Return ``relative``, of norms, for the gradient of the states and of the weight."""
        found = way.prepare(self._few)()
        weight, dz = self._few.weight, self._dz
        wide = self._few.states.double()
        states = torch.zeros_like(wide)
        apart = whole = 0.0
        for part in chunks(len(weight)):
            states += dz[:, part] @ weight[part].double()
            exact = dz[:, part].T @ wide
            apart += float((found["weight"][part].double() - exact).square().sum())
            whole += float(exact.square().sum())
        difference = found["states"].flatten(0, 1).double() - states
        return {
            "states": {"relative": float(difference.norm() / states.norm())},
            "weight": {"relative": (apart / whole) ** 0.5},
        }
