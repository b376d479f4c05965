"""``policy_logprobs`` in the place of TRL's fused head, while a trainer's model computes with it.

TRL's patched ``forward`` looks up the autograd function of its head by name each time. For as long
as the forward of a model at hand runs, that name stands for a :class:`_Head` that knows the labels
and the temperatures of the rows; the backbone, the choice of positions, the gathering of sharded
weights, the losses and the output object stay TRL's. Nothing is left on the model or on TRL.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from trl.trainer import utils

from onlinesel.callbacks._shared.hosts import TESTED_TRL
from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.grpo.checks import refuse
from onlinesel.data.batch import IGNORED_LABEL
from onlinesel.kernels import LMHead, policy_logprobs
from onlinesel.kernels._shards import is_sharded

__all__ = ["check_head", "fused_logprobs", "inner_model"]

_FUNCTION = "_ChunkedLogProbFunction"
_ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
_OUTPUTS = ("log_probs", "entropy")


def inner_model(trainer: Any, model: nn.Module) -> Any:
    """Return the causal language model inside the wrappers of engines, compilers and PEFT."""
    core: Any = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return core.get_base_model() if hasattr(core, "get_base_model") else core


def check_head(trainer: Any) -> None:
    """Refuse what TRL's head is asked for and :func:`fused_logprobs` does not compute.

    Raises:
        ValueError: TRL has changed, the model is compiled, or other outputs are asked for.
    """
    function = getattr(utils, _FUNCTION, None)
    found = () if function is None else tuple(inspect.signature(function.forward).parameters)
    if found != _ARGUMENTS:
        refuse(
            "TRL", f"a version whose fused head takes {', '.join(_ARGUMENTS[1:])} for "
            "fused_logprobs", ", ".join(found[1:]) or f"one without {_FUNCTION}",
            f"Install the one it was tested with: pip install trl=={TESTED_TRL}.",
        )  # fmt: skip
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    if trainer.args.torch_compile or getattr(plugin, "backend", "NO") not in ("NO", None):
        refuse(
            "torch_compile", "off for fused_logprobs", True,
            "A compiled forward has TRL's head in it; leave one of the two out.",
        )  # fmt: skip
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            _check_outputs(_asked(inner_model(trainer, model)))


def _asked(core: Any) -> tuple[str, ...]:
    """Return which outputs a model's fused head was made for."""

    def patched(function: Any) -> bool:
        return "outputs" in getattr(getattr(function, "__code__", None), "co_freevars", ())

    # Mixed precision wraps the forward once more.
    forward = inspect.unwrap(getattr(core.forward, "__func__", core.forward), stop=patched)
    if not patched(forward):
        refuse(
            "model", "one with TRL's fused head for fused_logprobs", type(core).__name__,
            "Leave its forward as GRPOTrainer patches it.",
        )  # fmt: skip
    outputs: tuple[str, ...] = inspect.getclosurevars(forward).nonlocals["outputs"]
    return outputs


def _check_outputs(outputs: tuple[str, ...]) -> None:
    other = [name for name in outputs if name not in _OUTPUTS]
    if other:
        refuse(
            "outputs of the fused head", f"{' and '.join(_OUTPUTS)} alone for fused_logprobs",
            ", ".join(other), "Ask add_fused_lm_head for fewer, or set fused_logprobs=False.",
        )  # fmt: skip


@contextmanager
def fused_logprobs(core: Any, factor: Tensor | None) -> Iterator[None]:
    """Let a model's forwards compute log-probabilities and entropies by ``policy_logprobs``.

    Args:
        core: A causal language model with TRL's fused head.
        factor: ``(B, T)`` what the trainer's temperature is multiplied by for each of the last T
            tokens, in the order in which the forwards take the rows; None for 1.
    """
    forward, done = core.forward, 0

    @functools.wraps(forward)
    def with_head(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if not kwargs.get("fused_lm_head"):
            return forward(*args, **kwargs)
        labels = kwargs.get("shift_labels")
        labels = kwargs["labels"][:, 1:] if labels is None else labels
        rows = None if factor is None else factor[done : done + len(labels)]
        done += len(labels)
        with overridden(utils, {_FUNCTION: _Head(core, labels, rows)}):
            return forward(*args, **kwargs)

    with overridden(core, {"forward": with_head}):
        yield


class _Head:
    """Stand in for TRL's autograd function, for one forward of one model.

    Args:
        core: The model.
        labels: ``(B, L)`` aligned with what enters the head.
        factor: ``(B, T)`` factors on the temperature of the last T labels, or None.
    """

    def __init__(self, core: Any, labels: Tensor, factor: Tensor | None) -> None:
        self.core, self.labels = core, labels.flatten()
        self.factor = None
        if factor is not None:
            before = labels.shape[1] - factor.shape[1]
            self.factor = pad(factor.float(), (before, 0), value=1.0).flatten()

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        _: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return what TRL's function returns: five outputs, those not asked for None."""
        _check_outputs(outputs)
        self._share_gradient(weight, bias)
        labels, factor = self.labels.to(targets.device), self.factor
        factor = None if factor is None else factor.to(targets.device)
        if len(labels) != len(targets):  # on a GPU only positions with a label get here
            valid = labels != IGNORED_LABEL
            labels, factor = labels[valid], None if factor is None else factor[valid]
        kind = hidden.device.type
        wide = torch.float64 in (hidden.dtype, weight.dtype)  # which autocast leaves alone
        rounds = torch.is_autocast_enabled(kind) and not wide
        log_probs, entropy = policy_logprobs(
            hidden,
            LMHead(weight, bias, scale, softcap),
            labels,
            temperature if factor is None else temperature * factor,
            ignore_index=IGNORED_LABEL,
            compute_dtype=torch.get_autocast_dtype(kind) if rounds else None,
        )
        return log_probs, entropy if "entropy" in outputs else None, None, None, None

    def _share_gradient(self, weight: Tensor, bias: Tensor | None) -> None:
        """Average the gradient over the ranks where FSDP2 does not.

        FSDP2 unshards a head that it holds apart when its module is called, which never happens.
        TRL gathers such a head by ``full_tensor()``, whose backward takes the gradient of each rank
        for that of all, unless told where it comes from.
        """
        head = self.core.get_output_embeddings()
        for whole, held in ((weight, head.weight), (bias, head.bias)):
            if whole is None or not whole.requires_grad or not is_sharded(held):
                continue
            if getattr(whole.grad_fn, "grad_placements", None) is None:
                whole.register_hook(functools.partial(_average, mesh=held.device_mesh))


def _average(gradient: Tensor, mesh: Any) -> Tensor:
    """Return the mean over the ranks of a mesh, as FSDP2's own reduction; a collective."""
    gradient = gradient / mesh.size()
    for dim in range(mesh.ndim):
        dist.all_reduce(gradient, group=mesh.get_group(dim))
    return gradient
