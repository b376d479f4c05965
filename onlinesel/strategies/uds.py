"""UDS: train on rows whose logits carry much, and differ from what was trained lately.

Idea: the nuclear norm of a row's logit matrix grows with both the strength and the number of
directions of its predictions; the distance of its projection to those of recently chosen rows
keeps the same kind of row from being chosen over and over. Labels play no part.

Paper: Zou et al., "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning"
(arXiv:2510.16882).

Formula: ``s_i = ||X_i||_* + alpha * mean_q ||z_i - q||_2`` with ``X_i`` the row's logits, ``z_i``
their random projection and ``q`` the last ``capacity`` rows that were chosen; 0 for the mean while
there are none. ``w_i = 1`` for the ``keep`` largest ``s_i``, else 0; the chosen ``z_i`` then enter
the queue in ascending order of their ids and push out the oldest.

Where this differs from the released code, whose behaviour is :meth:`UDS.paper`: padding does not
count (``rows``), the projection does not depend on the side of the padding (``compact``), and its
scale is ``E||z||^2 = ||X||_F^2`` (``scale="unit"``), for which the paper's alpha of 1.5e-3 at 152k
vocabulary entries and 512 positions is 6.6: one number for all models. Generally ``alpha_unit =
alpha_paper * sqrt(vocab * time) / 2``.

Cost: one forward without gradient over the candidates, and on the hidden states a product with a
``d x d`` and one with a ``d x vocab_dim`` matrix; no logits. State: ``capacity * vocab_dim *
time_dim`` floats, 4 MiB by default.

When it loses: the norm grows almost in proportion to the length, so rows of mixed length are
ranked by length: sort candidates by length, or set ``length``. Loud garbage scores high, and
nothing here guards against it. Above two thirds kept it costs more time than it saves. In the
demo (half of the pool corrupted, 8 of 32 rows, five seeds; ``onlinesel.recipes.demo``) it beat
uniform at equal steps, 4.637 to 4.707, and lost at equal CPU time, 4.624 to 4.589.

If nothing qualifies: rows with a norm or projection that is not finite, and rows known to have no
labelled token, are never kept; if that is all of them, every weight is 0 and the queue stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from onlinesel.types import Selection, Signals, State, Strategy
from onlinesel.weights import order_by, top_rows

__all__ = ["UDS", "enqueue", "greedy_rows", "mean_distance"]

_ROWS = ("attention", "response", "all")
_LENGTHS = ("raw", "rows", "sqrt")
_SCALES = ("unit", "uds")


def _distances(embedding: Tensor, others: Tensor) -> Tensor:
    # Not through a matrix product, which cancels: norms reach 1e8 in the paper's scale.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(embedding, others, compute_mode=mode).double()


def mean_distance(embedding: Tensor, memory: Tensor) -> Tensor:
    """Return the mean Euclidean distance of each row to the rows of a memory.

    Args:
        embedding: ``(N, D)``.
        memory: ``(M, D)`` finite.

    Returns:
        ``(N,)`` float64; 0 for an empty memory, nan for a row that is not finite.

    Example:
        >>> import torch
        >>> memory = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> mean_distance(torch.tensor([[3.0, 4.0]]), memory).tolist()
        [4.5]
    """
    distance = _distances(embedding, memory).sum(dim=1) / max(memory.shape[0], 1)
    return torch.where(torch.isfinite(embedding).all(dim=1), distance, float("nan"))


def greedy_rows(
    utility: Tensor, embedding: Tensor, memory: Tensor, alpha: float, keep: int, ids: Tensor
) -> Tensor:
    """Choose rows one by one, each time counting those chosen before as part of the memory.

    Args:
        utility: ``(N,)``; rows that are not finite are never chosen.
        embedding: ``(N, D)``; likewise.
        memory: ``(M, D)``.
        alpha: Weight of the mean distance.
        keep: Number of rows.
        ids: ``(N,)`` int64; ties go to the lower id.

    Returns:
        ``(N,)`` float32 of zeros and ones.

    Example:
        Of two equal rows only one is chosen:

        >>> import torch
        >>> embedding = torch.tensor([[1.0], [1.0], [0.0]])
        >>> utility, memory = torch.tensor([9.0, 9.0, 8.5]), torch.empty(0, 1)
        >>> greedy_rows(utility, embedding, memory, 1.0, 2, torch.arange(3)).tolist()
        [1.0, 0.0, 1.0]
    """
    weights = torch.zeros(utility.shape[0])
    usable = torch.isfinite(utility) & torch.isfinite(embedding).all(dim=1)
    total = _distances(embedding, memory).sum(dim=1)
    for count in range(memory.shape[0], memory.shape[0] + keep):
        score = torch.where(usable, utility + alpha * total / max(count, 1), float("nan"))
        best = order_by(score, ids)[:1]
        if not bool(torch.isfinite(score[best])):
            break
        weights[best] = 1.0
        usable[best] = False
        total = total + _distances(embedding, embedding[best])[:, 0]
    return weights


def enqueue(state: State, embedding: Tensor, capacity: int) -> State:
    """Return the state after writing rows into its ring buffer.

    Args:
        state: ``queue (capacity, D)`` (absent before the first row), ``pointer``, ``count``.
        embedding: ``(K, D)`` rows, oldest first.
        capacity: Rows of the queue.

    Example:
        >>> import torch
        >>> state = {"pointer": torch.tensor(1), "count": torch.tensor(1)}
        >>> state["queue"] = torch.tensor([[7.0], [0.0]])
        >>> enqueue(state, torch.tensor([[8.0], [9.0]]), 2)["queue"].tolist()
        [[9.0], [8.0]]
    """
    rows = embedding.shape[0]
    if not rows:
        return state
    queue = state.get("queue", torch.zeros(capacity, embedding.shape[1]))
    at = (state["pointer"] + torch.arange(rows))[-capacity:] % capacity
    return {
        **state,
        "queue": queue.index_put((at,), embedding[-capacity:]),
        "pointer": (state["pointer"] + rows) % capacity,
        "count": (state["count"] + rows).clamp(max=capacity),
    }


@dataclass(frozen=True)
class UDS(Strategy):
    """Keep the rows of largest norm and distance; see the module for the method card.

    Args:
        alpha: Weight of the distance, >= 0. At 0 no embedding is needed.
        capacity: Rows of the queue.
        rows: Which logit rows count: ``"attention"`` (all but padding), ``"response"`` (those
            that predict a labelled token), or ``"all"``.
        length: Norm as it is (``"raw"``), or divided by the number of logit rows (``"rows"``) or
            by its root (``"sqrt"``).
        scale: Of the projection, ``"unit"`` or ``"uds"``; alpha belongs to it.
        vocab_dim: Size of the projection over the vocabulary.
        time_dim: Size of the projection over time.
        time: Positions that the projection covers; longer rows are refused. None for 131,072.
        compact: Move a row's positions to the front before projecting over time.
        projector_seed: Seed of the projection.
        greedy: Rows chosen earlier in the same step count towards the distance.

    Raises:
        ValueError: An argument that is none of these.

    Example:
        >>> import torch
        >>> from onlinesel import Selector, Signals
        >>> from onlinesel.strategies import UDS
        >>> signals = Signals(nuclear_norm=torch.tensor([5.0, 9.0]), embedding=torch.eye(2))
        >>> Selector(UDS()).select(signals, keep=1).rows.tolist()
        [1]
    """

    alpha: float = 6.6
    capacity: int = 1024
    rows: str = "attention"
    length: str = "raw"
    scale: str = "unit"
    vocab_dim: int = 128
    time_dim: int = 8
    time: int | None = None
    compact: bool = True
    projector_seed: int = 0
    greedy: bool = False

    needs: ClassVar[tuple[str, ...]] = ("nuclear_norm", "embedding")
    drops_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        if self.alpha == 0:
            object.__setattr__(self, "needs", ("nuclear_norm",))

    @classmethod
    def paper(cls, alpha: float = 2.5e-3, time: int = 512) -> UDS:
        """Return the released behaviour: padding counts, and alpha belongs to its scale."""
        return cls(alpha, rows="all", scale="uds", time=time, compact=False)

    @property
    def scorer_options(self) -> dict[str, Any]:
        """Return what the scorer must know to compute the norm and the projection."""
        names = ("vocab_dim", "time_dim", "time", "scale", "compact")
        projector = {name: getattr(self, name) for name in names} | {"seed": self.projector_seed}
        return {"rows": self.rows, "length": self.length, "projector": projector}

    def init(self) -> State:
        """Return an empty queue; its width is that of the first embedding."""
        zero = torch.zeros((), dtype=torch.int64)
        return {"pointer": zero, "count": zero.clone(), "projector": _marker(self)}

    def select(
        self, signals: Signals, state: State, *, keep: int, step: int, generator: torch.Generator
    ) -> tuple[Selection, State]:
        """Keep the ``keep`` best rows and remember them."""
        utility, ids = signals.require(self, "nuclear_norm"), signals.row_ids()
        if signals.tokens is not None:
            utility = torch.where(signals.tokens > 0, utility, float("nan"))
        if self.alpha == 0:
            return Selection(top_rows(utility, keep, ids), utility), state
        embedding = signals.require(self, "embedding")
        selection = _choose(self, utility, embedding, _memory(self, state, embedding), keep, ids)
        by_id = ids.argsort(stable=True)
        chosen = by_id[selection.weights[by_id] > 0]
        return selection, enqueue(state, embedding[chosen], self.capacity)


def _choose(
    method: UDS, utility: Tensor, embedding: Tensor, memory: Tensor, keep: int, ids: Tensor
) -> Selection:
    """Score the rows against the memory and keep the best."""
    distance = mean_distance(embedding, memory)
    scores = utility + method.alpha * distance
    if method.greedy:
        weights = greedy_rows(utility, embedding, memory, method.alpha, keep, ids)
    else:
        weights = top_rows(scores, keep, ids)
    kept = distance[weights > 0]
    return Selection(weights, scores, {"diversity": kept.sum() / max(kept.numel(), 1)})


def _marker(method: UDS) -> Tensor:
    """Return the numbers that a projection is made of, to know whose rows a queue holds."""
    m = method
    names = [_ROWS.index(m.rows), _SCALES.index(m.scale), int(m.compact)]
    return torch.tensor([m.projector_seed, m.vocab_dim, m.time_dim, m.time or 0, *names])


def _memory(method: UDS, state: State, embedding: Tensor) -> Tensor:
    """Return the valid rows of the queue, if they come from the projection of ``embedding``."""
    mine = _marker(method)
    if not torch.equal(state["projector"], mine):
        raise ValueError(
            "UDS: state must come from the same projector (seed, vocab_dim, time_dim, time, rows, "
            f"scale, compact) {mine.tolist()}, got {state['projector'].tolist()}. "
            "Keep the settings of the checkpoint, or start with an empty queue."
        )
    queue = state.get("queue", embedding[:0])
    if embedding.dim() != 2 or queue.shape[1:] != embedding.shape[1:]:
        raise ValueError(
            f"UDS: embedding must be (N, D) with the D of the queue {tuple(queue.shape[1:])}, got "
            f"{tuple(embedding.shape)}. Score every step with the same projector."
        )
    return queue[: int(state["count"])]


def _check(method: UDS) -> None:
    """Refuse hyper-parameters that mean nothing."""
    if not (math.isfinite(method.alpha) and method.alpha >= 0):
        raise ValueError(
            f"UDS: alpha must be finite and >= 0, got {method.alpha}. "
            "Use 6.6, or 0 for the nuclear norm alone."
        )
    for name in ("capacity", "vocab_dim", "time_dim", "time"):
        size = getattr(method, name)
        if size is not None and size < 1:
            raise ValueError(f"UDS: {name} must be at least 1, got {size}. Leave the default.")
    for name, allowed in (("rows", _ROWS), ("length", _LENGTHS), ("scale", _SCALES)):
        value = getattr(method, name)
        if value not in allowed:
            raise ValueError(
                f"UDS: {name} must be one of {', '.join(allowed)}, got {value!r}. "
                f"Leave it out for {getattr(UDS, name)!r}; help(UDS) tells them apart."
            )
