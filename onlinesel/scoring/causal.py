"""The scoring forward: from a model and a batch to the signals that a strategy needs.

One forward without gradient, in eval mode, through the wrapped model (so that DDP, FSDP and
DeepSpeed see every rank forward equally often). The hidden states are caught on their way into
the LM head, which then sees one position only: no tensor of shape ``(B, T, V)`` is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel._base.host import upload
from onlinesel.data.batch import IGNORED_LABEL, rows_in
from onlinesel.kernels import (
    HeadGram,
    JLProjector,
    LMHead,
    logit_nuclear_norm,
    shift_labels,
    token_scores,
)
from onlinesel.kernels._shards import gathered, shared_out
from onlinesel.types import Signals

__all__ = ["CausalLMScorer", "evaluating", "unwrap"]

_TOKEN_OUTPUTS = {"loss": "nll", "entropy": "entropy", "el2n": "el2n", "grad_norm": "el2n"}
_NOT_INPUTS = ("labels", "shift_labels", "reference_loss")
_LONGEST = 131_072  # a fixed number, so that the projection is the same for every model
_ROWS = ("attention", "response", "all")
_LENGTHS = ("raw", "rows", "sqrt")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that keep it as ``.module`` or ``._orig_mod``."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradient, and restore the mode of every submodule."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _catch_hidden(model: nn.Module, owner: str) -> Iterator[list[Tensor]]:
    """Catch what enters the LM head, and let the head see the last position only."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"{owner}: model must have an LM head, got {type(model).__name__} whose "
            "get_output_embeddings() gives None. Score a causal language model, or pass a scorer."
        )
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


class CausalLMScorer:
    """Score the rows of a causal language model's batches; a :data:`onlinesel.Scorer`.

    Rows without a labelled token get ``loss`` nan, so that no method selects them.

    A head that ranks hold in parts is read where it lies: under FSDP2 each rank reduces its own
    rows for ``nuclear_norm`` and ``embedding``, and what else needs the weight gathers it for the
    moment of a batch, under ZeRO-3 as well. All ranks must therefore score equally many batches.

    Args:
        needs: Signals to compute, a subset of :attr:`provides`.
        rows: Which logit rows enter ``nuclear_norm`` and ``embedding``: ``"attention"`` (all but
            padding), ``"response"`` (those that predict a labelled token) or ``"all"``.
        length: ``nuclear_norm`` as it is (``"raw"``), or divided by the number of rows that
            enter it (``"rows"``) or by the root of that number (``"sqrt"``).
        projector: Arguments of :class:`onlinesel.kernels.JLProjector` without ``vocab``; ``time``
            None covers rows of up to 131,072 tokens.
        reference: Where ``reference_loss`` comes from: another causal LM, ``"adapter"`` (the PEFT
            adapter of the scored model switched off), or None.
        refresh_every: Steps between rebuilds of ``W^T W`` and the folded projection if the head
            trains; :meth:`advance` counts them. 1 is exact.

    Raises:
        ValueError: An unknown signal or option.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from onlinesel.scoring import CausalLMScorer
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> CausalLMScorer(("loss",))(model, {"input_ids": ids, "labels": ids}).tokens.tolist()
        [3]
    """

    provides = (*_TOKEN_OUTPUTS, "nuclear_norm", "embedding", "reference_loss", "tokens", "ids")

    def __init__(
        self,
        needs: Sequence[str],
        *,
        rows: str = "attention",
        length: str = "raw",
        projector: Mapping[str, Any] | None = None,
        reference: nn.Module | str | None = None,
        refresh_every: int = 1,
    ) -> None:
        for name, value, allowed in (("rows", rows, _ROWS), ("length", length, _LENGTHS)):
            if value not in allowed:
                raise ValueError(
                    f"CausalLMScorer: {name} must be one of {', '.join(allowed)}, got {value!r}. "
                    f"Use {allowed[0]!r}; help(CausalLMScorer) tells them apart."
                )
        unknown = [name for name in needs if name not in self.provides]
        if unknown:
            raise ValueError(
                f"CausalLMScorer: needs must be among {', '.join(self.provides)}, got {unknown}. "
                "Use a strategy that reads these, or write a scorer that gives them."
            )
        self.needs = tuple(needs)
        self.reference = reference
        self._rows, self._length, self._refresh_every = rows, length, refresh_every
        self._projector_options = dict(projector or {})
        self._projector: JLProjector | None = None
        self._built: dict[str, Any] = {}
        self._fresh: tuple[nn.Module, LMHead] | None = None
        self._age = 0
        self._capped = False

    def advance(self) -> None:
        """Tell the scorer that the optimizer has stepped: what derives from the head is stale."""
        self._age += 1
        self._fresh = None

    def reset(self) -> None:
        """Forget everything that derives from a model, because another run begins."""
        self._built, self._fresh, self._age, self._capped = {}, None, 0, False

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        core: nn.Module | None = None,
        needs: Sequence[str] | None = None,
        around: AbstractContextManager[Any] | None = None,
        hosted: Mapping[str, Any] = MappingProxyType({}),
    ) -> Signals:
        """Score one batch.

        Args:
            model: The model, wrapped or not.
            batch: ``input_ids (B, T)``, ``labels (B, T)`` with -100 where no loss is taken,
                usually ``attention_mask (B, T)``; passed to the model but for the labels.
            core: The model inside the wrappers; found through ``.module`` by default.
            needs: Signals wanted this time, by default all of :attr:`needs`.
            around: Entered for the forward of the model itself, and not for that of a reference.
            hosted: The labels on the host, if they are known there; they are read then without
                waiting for the device.

        Returns:
            The signals asked for, on the batch's device, and ``tokens``, where the labels are read.
        """
        needs = self.needs if needs is None else needs
        core = unwrap(model) if core is None else core
        rows_in({k: v for k, v in batch.items() if isinstance(v, Tensor)}, "CausalLMScorer")
        read = {**batch, **hosted}
        labels = read["shift_labels"] if "shift_labels" in read else shift_labels(read["labels"])
        tokens = labels.ne(IGNORED_LABEL).sum(dim=1)
        found: dict[str, Tensor] = {"tokens": tokens}
        own = [n for n in needs if n in _TOKEN_OUTPUTS or n in ("nuclear_norm", "embedding")]
        if own:
            matrices = [name for name in ("nuclear_norm", "embedding") if name in own]
            # On its way while the host queues the forward. A head in parts is gathered after it:
            # ZeRO-3 is fetching ahead when a forward begins.
            if matrices and not self._capped and not shared_out(core.get_output_embeddings()):  # type: ignore[operator]
                self._derived(core, matrices)
            with around or nullcontext():
                hidden = self._hidden(model, core, batch)
            found.update(self._token_signals(hidden, core, labels, own))
            found.update(self._matrix_signals(hidden, core, batch, labels, matrices))
        if "reference_loss" in needs:
            found["reference_loss"] = self._reference_loss(model, core, batch, labels)
        return Signals(**found)

    @staticmethod
    def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k not in _NOT_INPUTS}

    def _hidden(self, model: nn.Module, core: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with evaluating(model), _catch_hidden(core, "CausalLMScorer") as caught:
            model(**self._inputs(batch), use_cache=False)
        if len(caught) != 1 or caught[0].dim() != 3:
            raise ValueError(
                "CausalLMScorer: model must call its LM head once per forward, got "
                f"{len(caught)} calls of {type(core).__name__}. Pass a scorer made for this model."
            )
        # Prompt-learning adapters put virtual tokens in front of the row's own.
        return caught[0][:, -batch["input_ids"].shape[1] :]

    @contextmanager
    def _head(self, core: nn.Module, *, sharded: bool = False) -> Iterator[LMHead]:
        """Read the head: once per step if this rank holds it whole, else gathered for the moment.

        Adapters on a head make a new weight, which is worth keeping; what was gathered from other
        ranks is not, since it would stay in memory while the model trains.
        """
        module = core.get_output_embeddings()  # type: ignore[operator]
        if shared_out(module):
            with gathered(module):
                yield LMHead.from_model(core, sharded=sharded)
            return
        if self._fresh is None or self._fresh[0] is not core:
            self._fresh = (core, LMHead.from_model(core))
        yield self._fresh[1]

    def _derived(self, core: nn.Module, needs: Sequence[str]) -> dict[str, Any]:
        """Return what derives from the head for these signals, rebuilt when it is stale.

        That is ``head``, an outline, with ``gram`` and ``fold``; or the whole head alone under a
        soft cap, which leaves no shortcut.
        """
        trains = any(p.requires_grad for p in core.get_output_embeddings().parameters())  # type: ignore[operator]
        if self._built.get("core") is not core or (trains and self._age >= self._refresh_every):
            self._built, self._age = {"core": core}, 0
        built = self._built
        wanted = {"nuclear_norm": "gram", "embedding": "fold"}
        if "head" in built and all(wanted[name] in built for name in needs):
            return built
        with self._head(core, sharded=True) as head:
            if head.softcap is not None:
                self._capped = True
                return {"head": head.whole()}
            built["head"] = head.outline()
            if "nuclear_norm" in needs:
                gram = HeadGram(head)
                gram.begin()
                built["gram"] = gram.outline()
            if "embedding" in needs:
                built["fold"] = self._make_projector(head).fold(head)
        return built

    def _token_signals(
        self, hidden: Tensor, core: nn.Module, labels: Tensor, needs: Sequence[str]
    ) -> dict[str, Tensor]:
        wanted = {n: _TOKEN_OUTPUTS[n] for n in needs if n in _TOKEN_OUTPUTS}
        if not wanted:
            return {}
        outputs = tuple(dict.fromkeys(wanted.values()))
        with self._head(core) as head:
            scores = token_scores(hidden, head, labels, outputs=outputs)
        count = scores.mask.sum(dim=1).to(torch.float32)
        count = torch.where(count > 0, count, float("nan"))
        result = {}
        for name, output in wanted.items():
            value = getattr(scores, output)
            summed = value.square().sum(dim=1).sqrt() if name == "grad_norm" else value.sum(dim=1)
            result[name] = summed / count
        return result

    def _matrix_signals(
        self,
        hidden: Tensor,
        core: nn.Module,
        batch: Mapping[str, Any],
        labels: Tensor,
        needs: Sequence[str],
    ) -> dict[str, Tensor]:
        if not needs:
            return {}
        rows = None
        if self._rows == "response":
            rows = upload(labels.ne(IGNORED_LABEL), hidden.device)
        elif self._rows == "attention" and batch.get("attention_mask") is not None:
            rows = batch["attention_mask"].ne(0)
        built, result = self._derived(core, needs), {}
        head = built["head"]
        if "nuclear_norm" in needs:
            result["nuclear_norm"] = self._nuclear_norm(hidden, head, rows, built.get("gram"))
        if "embedding" in needs:
            compact = self._projector_options.get("compact", True)
            result["embedding"] = self._make_projector(head).project(
                hidden, built.get("fold", head), rows, compact=compact
            )
        return result

    def _nuclear_norm(
        self, hidden: Tensor, head: LMHead, rows: Tensor | None, gram: HeadGram | None
    ) -> Tensor:
        norm = logit_nuclear_norm(hidden, head, rows, gram=gram)
        if self._length == "raw":
            return norm
        full = hidden.new_full((hidden.shape[0],), hidden.shape[1], dtype=torch.float32)
        count = (full if rows is None else rows.sum(dim=1)).clamp(min=1).to(norm)
        return norm / (count if self._length == "rows" else count.sqrt())

    def _make_projector(self, head: LMHead) -> JLProjector:
        if self._projector is None:
            options = {k: v for k, v in self._projector_options.items() if k != "compact"}
            time = options.pop("time", None) or _LONGEST
            self._projector = JLProjector(head.vocab_size, time, **options)
        return self._projector

    def _reference_loss(
        self, model: nn.Module, core: nn.Module, batch: Mapping[str, Any], labels: Tensor
    ) -> Tensor:
        if "reference_loss" in batch:
            return batch["reference_loss"]
        switch: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.reference, nn.Module):
            model, core = self.reference, unwrap(self.reference)
            switch = gathered(model)  # ZeRO-3 takes every model apart that is loaded under it
        elif self.reference == "adapter" and hasattr(core, "disable_adapter"):
            switch = core.disable_adapter()  # type: ignore[operator]
        else:
            raise ValueError(
                "CausalLMScorer: reference must be a model, 'adapter' on a PEFT model, or losses "
                f"carried in the batch, got {self.reference!r}. RHO-Loss compares with it."
            )
        with switch:
            hidden = self._hidden(model, core, batch)
            return self._token_signals(hidden, core, labels, ("loss",))["loss"]
