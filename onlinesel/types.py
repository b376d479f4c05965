"""The contract: what a method sees, what it answers, and what a method is.

A step of training asks one question of a method: *given these candidate rows, how much does each
one count?* Everything else (where the rows come from, which rank owns them, how the loss is
normalised) belongs to the host. So a method is two pure functions, :meth:`Strategy.init` and
:meth:`Strategy.select`, over two value types, :class:`Signals` in and :class:`Selection` out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Normalize", "Scope", "Scorer", "Selection", "Signals", "State", "Strategy"]

State = dict[str, Tensor]
"""What a method remembers between steps: a flat mapping of names to tensors."""

Scope = Literal["global", "rank", "batch"]
"""What competes: all candidates of a step, those of each process, or those of each micro-batch."""

Normalize = Literal["tokens", "samples", "rows"]
"""What the loss is divided by: labelled tokens, rows with a mean each, or the number of rows."""


@dataclass(frozen=True)
class Signals:
    """What is known about ``N`` candidate rows, one entry a row.

    All fields are optional: a scorer fills exactly what the strategy's ``needs`` name. Tensors are
    detached; scores are float32, ``ids``, ``group`` and ``tokens`` are int64. Ids are never kept
    as floats, which lose integers above 2**24.

    Attributes:
        ids: ``(N,)`` int64, stable identity of each row. Ties are broken towards the lower id.
        loss: ``(N,)`` mean negative log-likelihood per labelled token, in nats.
        reference_loss: ``(N,)`` the same under a reference model.
        entropy: ``(N,)`` mean predictive entropy over labelled tokens, in nats.
        el2n: ``(N,)`` mean over labelled tokens of ``||softmax(z) - onehot(y)||_2``.
        grad_norm: ``(N,)`` upper bound of the per-row gradient norm with respect to the logits,
            ``sqrt(sum_t ||softmax(z_t) - onehot(y_t)||^2) / n``.
        nuclear_norm: ``(N,)`` nuclear norm of the row's logit matrix.
        embedding: ``(N, k)`` projection of the row's logits.
        reward: ``(N,)`` outcome of a rollout.
        group: ``(N,)`` int64, the prompt that a rollout belongs to, or the source or domain that a
            row comes from.
        tokens: ``(N,)`` int64, number of labelled tokens.

    Example:
        >>> import torch
        >>> from onlinesel import Signals
        >>> Signals(loss=torch.tensor([2.0, 0.5])).size
        2
    """

    ids: Tensor | None = None
    loss: Tensor | None = None
    reference_loss: Tensor | None = None
    entropy: Tensor | None = None
    el2n: Tensor | None = None
    grad_norm: Tensor | None = None
    nuclear_norm: Tensor | None = None
    embedding: Tensor | None = None
    reward: Tensor | None = None
    group: Tensor | None = None
    tokens: Tensor | None = None

    _INTEGERS: ClassVar[frozenset[str]] = frozenset({"ids", "group", "tokens"})

    def __post_init__(self) -> None:
        sizes = {}
        for name, value in self.present().items():
            dtype = torch.int64 if name in self._INTEGERS else torch.float32
            if dtype is torch.int64 and value.is_floating_point():
                raise TypeError(
                    f"Signals: {name} must be an integer tensor, got {value.dtype}. "
                    "Carry ids as int64: floats lose integers above 2**24."
                )
            object.__setattr__(self, name, value.detach().to(dtype))
            sizes[name] = value.shape[0] if value.dim() else -1
        if not sizes or min(sizes.values()) < 1 or len(set(sizes.values())) != 1:
            raise ValueError(
                f"Signals: fields must be non-empty tensors of one length N, got {sizes}. "
                "Give every signal one entry per candidate row."
            )

    def present(self) -> dict[str, Tensor]:
        """Return the signals that are filled, by name, in the order of the fields."""
        # Not through dataclasses.fields, which costs more than all that a step does with them.
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def size(self) -> int:
        """Number of candidate rows ``N``."""
        return next(iter(self.present().values())).shape[0]

    def require(self, owner: object, name: str) -> Tensor:
        """Return the signal ``name``, or say who needs it and how to get it.

        Args:
            owner: The strategy that asks; its class names the error.
            name: Field of this class.

        Raises:
            ValueError: The signal is missing.
        """
        value = self.present().get(name)
        if value is None:
            needs = tuple(getattr(owner, "needs", (name,)))
            remedy = f"Use a scorer that provides '{name}'."
            if name not in needs:
                remedy = f"Name it in the class: needs = {(*needs, name)!r}."
            raise ValueError(
                f"{type(owner).__name__}: signals must hold '{name}', got "
                f"{sorted(self.present())}. {remedy}"
            )
        return value

    def row_ids(self) -> Tensor:
        """Return ``ids``, or the row numbers where no ids are known: ``(N,)`` int64."""
        if self.ids is not None:
            return self.ids
        return torch.arange(self.size, device=next(iter(self.present().values())).device)

    def map(self, function: Callable[[Tensor], Tensor]) -> Signals:
        """Return new signals with ``function`` applied to every field that is filled."""
        return replace(self, **{name: function(value) for name, value in self.present().items()})

    def take(self, rows: Tensor) -> Signals:
        """Return the signals of ``rows`` (an index or a boolean mask), in that order."""
        return self.map(lambda value: value[rows])

    def finite(self, names: Sequence[str]) -> Tensor:
        """Return which rows have only finite numbers in these signals: ``(N,)`` bool."""
        found = [value for name, value in self.present().items() if name in names]
        flat = [torch.isfinite(value.reshape(self.size, -1)).all(dim=1) for value in found]
        return torch.stack(flat).all(dim=0) if flat else torch.ones(self.size, dtype=torch.bool)

    def to(self, device: torch.device | str) -> Signals:
        """Return the signals on ``device``: these, where they are there already."""
        if torch.device(device) == torch.device("cpu") and all(
            value.device.type == "cpu" for value in self.present().values()
        ):
            return self
        return self.map(lambda value: value.to(device))


@dataclass(frozen=True)
class Selection:
    """How much each candidate row counts in this step.

    Selecting, filtering and weighting are one thing: a weight of 0 drops the row, and combining
    two methods is multiplying their weights.

    Attributes:
        weights: ``(N,)`` float32 >= 0, relative to the candidate batch ((N, T) for token methods).
        scores: ``(N,)`` what the method ranked the rows by, for reports; None if it ranks nothing.
        metrics: Scalars about the decision, as tensors or numbers, logged by the host.

    Example:
        >>> import torch
        >>> from onlinesel import Selection
        >>> Selection(torch.tensor([1.0, 0.0, 2.0])).rows.tolist()
        [0, 2]
    """

    weights: Tensor
    scores: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("scores", self.scores)):
            if not isinstance(value, Tensor) and (name == "weights" or value is not None):
                raise TypeError(
                    f"Selection: {name} must be a tensor, got {type(value).__name__}. "
                    f"Write torch.tensor({name})."
                )
        weights = self.weights.detach().to(torch.float32)
        if not bool(((weights >= 0) & (weights < torch.inf)).all()):  # nan is neither
            raise ValueError(
                "Selection: weights must be finite and >= 0, got "
                f"{weights.flatten()[:8].tolist()}. Give non-finite rows weight 0."
            )
        object.__setattr__(self, "weights", weights)
        if self.scores is not None and self.scores.shape != weights.shape[:1]:
            raise ValueError(
                f"Selection: scores must be one number a row {tuple(weights.shape[:1])}, got shape "
                f"{tuple(self.scores.shape)}. Leave them out where the method ranks nothing."
            )
        metrics = {name: torch.as_tensor(value) for name, value in self.metrics.items()}
        object.__setattr__(self, "metrics", metrics)

    @property
    def rows(self) -> Tensor:
        """Index of the rows that train, ascending: ``(K,)`` int64."""
        alive = self.weights > 0 if self.weights.dim() == 1 else (self.weights > 0).any(dim=1)
        return alive.nonzero().flatten()


class Strategy(ABC):
    """One method: hyper-parameters as the fields of a frozen dataclass, and two pure functions.

    A strategy does no I/O, no collectives, mutates nothing and draws only from the generator it
    is handed; what it must remember goes into the state that it returns. It knows nothing of
    ranks: the host gathers the candidates of every rank before it asks.

    Attributes:
        needs: Signals that :meth:`select` reads; the host's scorer computes exactly these.
        observes: Signals of the rows that trained, which the training forward gives for nothing;
            handed to :meth:`observe` after each step.
        normalize: How the method defines its loss: ``"tokens"`` (``D = sum_i w_i n_i``) or
            ``"samples"`` (``D = sum_i w_i`` over per-row means), ``"rows"`` (per-row means over the
            number of rows that train). The host's ``normalize`` wins.
        drops_only: Whether all it does is to train ``keep`` of the candidates with weight 1. Hosts
            refuse such a method where there is one candidate for each row that trains: it would
            pay for scores and drop nothing.

    Example:
        A user's own method is a few lines and needs no registration:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from onlinesel import Selection, Selector, Signals, Strategy
        >>> @dataclass(frozen=True)
        ... class Shortest(Strategy):
        ...     needs = ("tokens",)
        ...     def select(self, signals, state, *, keep, step, generator):
        ...         tokens = signals.require(self, "tokens")
        ...         threshold = tokens.sort().values[keep - 1]
        ...         return Selection((tokens <= threshold).float()), state
        >>> selector = Selector(Shortest())
        >>> selector.select(Signals(tokens=torch.tensor([5, 2, 9])), keep=1).weights.tolist()
        [0.0, 1.0, 0.0]
    """

    needs: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[tuple[str, ...]] = ()
    normalize: ClassVar[Normalize] = "tokens"
    drops_only: ClassVar[bool] = False

    @property
    def scorer_options(self) -> dict[str, Any]:
        """Keyword arguments of the scorer that belong to the method (which rows count, ...)."""
        return {}

    def __repr__(self) -> str:
        """Name the method and its settings; a checkpoint is recognised by it."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({settings})"

    def needs_at(self, step: int) -> tuple[str, ...]:
        """Return the signals that :meth:`select` reads at ``step``: a subset of ``needs``.

        A host that asks first saves the scoring forward of steps that decide without it.
        """
        return self.needs

    def needs_for(self, step: int, rows: int) -> tuple[str, ...]:
        """Return the signals that :meth:`select` reads at ``step`` from ``rows`` candidates.

        For a method that decides without its signals where there are too few candidates: a host
        then saves the forward that would compute them. By default the number plays no part.
        """
        return self.needs_at(step)

    def init(self) -> State:
        """Return the state before the first step."""
        return {}

    @abstractmethod
    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Decide about one set of candidates.

        Args:
            signals: The candidates; :attr:`needs` are present.
            state: What :meth:`init` or the previous call returned. Not to be changed in place.
            keep: Number of rows that the run trains per decision, ``1 <= keep <= N``. A method
                that only weighs may ignore it.
            step: Optimizer step, counted from 0.
            generator: The only source of randomness (CPU).

        Returns:
            The decision and the new state.
        """

    def observe(self, signals: Signals, state: State) -> State:
        """Learn from the rows that just trained; returns the new state."""
        return state

    def merge(self, states: Sequence[State]) -> State:
        """Unite what several ranks remember, each of its own rows, when their number changes.

        The default takes the first state. A method that remembers by id unites all of them.
        """
        return dict(states[0])

    def epoch_plan(self, rows: int, *, epoch: int, seed: int) -> Tensor | None:
        """Return the row numbers of one epoch in their order, or None to leave the loader alone.

        The length must not depend on ``epoch``: a trainer fixes its schedule from the first one.
        """
        return None

    def draw_epoch(
        self, rows: int, state: State, *, step: int, generator: torch.Generator
    ) -> State:
        """Decide at the start of an epoch which of its rows are read at all; see rows_of_epoch.

        For methods that decide from what they remember, before anything is loaded. Called by hosts
        whose order of rows is their own, where ids are row numbers; others never call it, and the
        method decides when a row comes up.

        Args:
            rows: Size of the dataset; 0 to forget an earlier draw.
            state: As in :meth:`select`.
            step: Optimizer step with which the epoch begins.
            generator: The only source of randomness (CPU).
        """
        return state

    def rows_of_epoch(self, state: State) -> Tensor | None:
        """Return which rows the drawn epoch reads: ``(rows,)`` bool; None for all of them."""
        return None


Scorer = Callable[[Any, Mapping[str, Any]], Signals]
"""``(model, batch) -> Signals``: computes what a strategy needs, in one forward without grad."""
