"""Collectives of the decision: gather what the ranks know, move the rows that change rank.

Every function here is called by all ranks at the same point, with the same number and shapes of
collectives whatever the data hold. Without a process group each is the identity. Columns travel
side by side as bytes: a float32 would lose ids above 2**24, no backend knows every dtype, and for
a thousand ranks one collective more costs more than all that they send.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onlinesel.data.batch import gather_rows
from onlinesel.parallel.exchanging import (
    Sizes,
    arrived_rows,
    packed_bytes,
    pickled_rows,
    structure,
    widened,
)
from onlinesel.types import Signals

__all__ = [
    "Gathering",
    "begin_gather",
    "check_agreement",
    "exchange_rows",
    "gather_signals",
    "largest_over_ranks",
    "rank",
    "sum_over_ranks",
    "world_size",
]


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


_REST = "what is no tensor, pickled"
_SMALL = 2**20
"""Bytes of all ranks below which gathering is a sum; the same on every rank, so all do the same."""


def _begin(tensor: Tensor) -> tuple[Tensor, Any]:
    """Start to gather a tensor; return where all ranks' will lie, ``(W, *shape)``, and a handle.

    Little is gathered as a sum in which every rank fills its own place and leaves zeros elsewhere:
    a reduction goes up and down a tree, in a number of hops that grows with the logarithm of the
    ranks, where gathering passes through all of them.
    """
    ranks = world_size()
    if ranks * tensor.nbytes <= _SMALL:
        whole = tensor.new_zeros(ranks, *tensor.shape)
        whole[rank()] = tensor
        return whole, dist.all_reduce(whole, async_op=True)
    whole = tensor.new_empty(ranks * tensor.shape[0], *tensor.shape[1:])
    # torch 2.13 renamed the function and warns of the older name.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    handle = getattr(dist, name)(whole, tensor.contiguous(), async_op=True)
    return whole.view(ranks, *tensor.shape), handle


def _gather(tensor: Tensor) -> Tensor:
    whole, handle = _begin(tensor)
    handle.wait()
    return whole


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def _largest(numbers: Sequence[int], device: torch.device | str) -> list[int]:
    """Return the largest value of each number over all ranks."""
    values = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def largest_over_ranks(number: int, device: torch.device | str = "cpu") -> int:
    """Return the largest of a number over all ranks, each of which must ask."""
    return number if world_size() == 1 else _largest([number], device)[0]


def _digest(*parts: Any) -> int:
    """Return 56 bits that differ, for all that matters, if any of the contents differ."""
    state = hashlib.blake2b(digest_size=7)
    for part in parts:
        state.update(part)
    return int.from_bytes(state.digest(), "little")


def check_agreement(owner: str, *tensors: Tensor, device: torch.device | str = "cpu") -> None:
    """Raise on every rank if the ranks do not hold the same values.

    All ranks decide for themselves, which is exact as long as they compute the same bits; a
    processor of another make or a seed of its own would send rows astray without a word. Costs one
    reduction of two numbers.

    Args:
        owner: Name used in the error.
        *tensors: What should be equal everywhere.
        device: Where the process group's tensors must live.

    Raises:
        ValueError: The values differ between ranks.
    """
    if world_size() == 1:
        return
    digest = _digest(*(t.detach().cpu().contiguous().numpy() for t in tensors))
    # The largest digest and the negative of the smallest: equal where all ranks agree.
    largest, smallest = _largest([digest, -digest], device)
    if largest != -smallest:
        digests = _gather(torch.tensor([digest], device=device))
        raise ValueError(
            f"{owner}: ranks must reach the same decision, got digests "
            f"{digests.flatten().tolist()}. Give all ranks the same strategy, seed, checkpoint "
            "and kind of processor, or scope='rank'."
        )


def _packed(columns: Mapping[str, Tensor], device: torch.device | str) -> Tensor:
    """Lay columns of ``n`` rows side by side as bytes: ``(n, bytes)`` uint8."""
    # A column of one row counts as contiguous with any stride; a copy has that of its bytes.
    whole = (v.clone(memory_format=torch.contiguous_format) for v in columns.values())
    flat = (v.view(v.shape[0], math.prod(v.shape[1:])) for v in whole)
    return torch.cat([v.view(torch.uint8) for v in flat], dim=1).to(device)


def _unpacked(rows: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take apart rows of bytes into columns as those that were packed."""
    sizes = [math.prod(v.shape[1:]) * v.element_size() for v in like.values()]
    # A copy of its own starts where its dtype may start.
    parts = [p.clone(memory_format=torch.contiguous_format) for p in rows.split(sizes, dim=1)]
    return {
        name: part.flatten().view(v.dtype).view(rows.shape[0], *v.shape[1:])
        for (name, v), part in zip(like.items(), parts, strict=True)
    }


@dataclass(frozen=True)
class Gathering:
    """Signals of all ranks on their way; from :func:`begin_gather`.

    Attributes:
        named: This rank's signals, by name.
        size: Number of this rank's rows.
        most: Rows that every rank sends, filled up with zeros.
        sent: ``(8 + most * bytes,)`` number of rows, then the rows; kept until it has been sent.
        whole: ``(W, 8 + most * bytes)`` where those of all ranks arrive.
        handle: Of the collective; None without a process group.
    """

    named: dict[str, Tensor]
    size: int
    most: int
    sent: Tensor
    whole: Tensor
    handle: Any

    def wait(self) -> tuple[dict[str, Tensor], list[int]]:
        """Return the signals of all ranks, on the CPU, and the number of rows of each rank.

        Raises:
            ValueError: A rank has more rows than ``most`` allows, on every rank.
        """
        if self.handle is None:
            return dict(self.named), [self.size]
        self.handle.wait()
        whole = self.whole.cpu()
        counts = whole[:, :8].clone().view(torch.int64)
        if int(counts.max()) > self.most:
            raise ValueError(
                f"begin_gather: most must be at least the rows of every rank, got {self.most} and "
                f"ranks of up to {int(counts.max())} rows. Pass the largest number that a step can "
                "have, or None."
            )
        rows = whole[:, 8:].unflatten(1, (self.most, -1))
        real = torch.arange(self.most) < counts
        found = rows.flatten(0, 1) if bool(real.all()) else rows[real]
        return _unpacked(found, self.named), counts.flatten().tolist()


def begin_gather(
    known: Signals, device: torch.device | str = "cpu", *, most: int | None = None
) -> Gathering:
    """Start to gather what is known before the scores: ids, tokens, groups.

    Pass the result to :func:`gather_signals` once the scores are there: what has begun travels
    while the model scores.

    Args:
        known: This rank's candidates, the same signals on every rank.
        device: Where the process group's tensors must live (the GPU for NCCL).
        most: Rows that no rank exceeds, the same on every rank. Without it the ranks first find
            the largest number among them, for which each waits for all others.

    Example:
        >>> import torch
        >>> from onlinesel import Signals
        >>> from onlinesel.parallel.distributed import begin_gather, gather_signals
        >>> started = begin_gather(Signals(ids=torch.tensor([7, 9])))
        >>> signals, counts = gather_signals(Signals(loss=torch.ones(2)), started=started)
        >>> signals.ids.tolist(), signals.loss.tolist(), counts
        ([7, 9], [1.0, 1.0], [2])
    """
    named, size = known.to("cpu").present(), known.size
    if world_size() == 1:
        nothing = torch.empty(0)
        return Gathering(named, size, size, nothing, nothing, None)
    if most is None:
        (most,) = _largest([size], device)
    rows = _packed(named, "cpu")
    sent = rows.new_zeros(8 + most * rows.shape[1])
    sent[:8] = torch.tensor([size]).view(torch.uint8)
    mine = rows[:most].flatten()
    sent[8 : 8 + mine.shape[0]] = mine
    sent = sent.to(device)
    return Gathering(named, size, most, sent, *_begin(sent))


def gather_signals(
    signals: Signals, device: torch.device | str = "cpu", *, started: Gathering | None = None
) -> tuple[Signals, list[int]]:
    """Concatenate the signals of all ranks, in the order of the ranks.

    Args:
        signals: This rank's candidates; ranks may hold different numbers of rows.
        device: Where the process group's tensors must live (the GPU for NCCL).
        started: What :func:`begin_gather` returned for the same rows. Its signals need not be
            among ``signals``, and are not sent again.

    Returns:
        The signals of all candidates, the same bits on every rank (on the CPU), and the number of
        rows of each rank.

    Raises:
        ValueError: ``started`` is of another number of rows.
    """
    started = begin_gather(signals, device) if started is None else started
    if started.size != signals.size:
        raise ValueError(
            f"gather_signals: started must be of the same rows ({signals.size}), got "
            f"{started.size} of them. Begin with the candidates that are scored."
        )
    found, counts = started.wait()
    rest = {n: v for n, v in signals.present().items() if n not in started.named}
    if rest:
        late, _ = begin_gather(Signals(**rest), device, most=max(counts)).wait()
        found |= late
    return Signals(**found), counts


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: v for n, v in sorted(batch.items()) if isinstance(v, Tensor) and v.dim()}


def _alike(sizes: Sizes, device: torch.device | str) -> dict[str, Any]:
    """Return rows of the same sizes on all ranks, having checked that their columns are the same.

    One reduction does where the ranks' tokens differ in one width alone. Where more than that
    differs, or could, they first tell each other that their columns are the same.
    """
    kinds, width = structure(sizes.rows), sizes.width()
    digest = _digest(repr((kinds, sizes.apart_from_width())).encode())
    widest, largest, smallest = _largest([width or 0, digest, -digest], device)
    if largest == -smallest and width is not None:
        targets = {name: widest for name in sizes.axes.columns if sizes.follows(name)}
        return widened(sizes, targets)
    digest = _digest(repr(kinds).encode())
    largest, smallest = _largest([digest, -digest], device)
    if largest != -smallest:
        raise ValueError(
            "exchange_rows: batches must have the same columns on all ranks, got others than "
            f"{kinds} (what it is, or its one value). Let the collator give every batch the same."
        )
    return widened(sizes, sizes.targets(_largest(sizes.numbers(), device)))


def _moving(mine: Tensor, others: Tensor) -> Tensor:
    """Return which rows move between this rank and another, in the order of the other ranks.

    Args:
        mine: ``(K,)`` ranks on this end of the way.
        others: ``(K,)`` ranks on the other.
    """
    moving = ((mine == rank()) & (mine != others)).nonzero().flatten()
    return moving[others[moving].argsort(stable=True)]


def exchange_rows(
    batches: Sequence[dict[str, Any]],
    local: Sequence[tuple[int, int]],
    owners: Tensor,
    targets: Tensor,
    *,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any] | None, list[int]]:
    """Send rows to the ranks that will train them.

    Each row goes to its new rank alone. All ranks know from the decision how many rows go where, so
    they agree on the width of the rows and on nothing else before they send.

    Args:
        batches: This rank's candidate batches, with the same keys on every rank.
        local: ``(batch, row)`` of each of this rank's rows among the ``K``, in their order.
        owners: ``(K,)`` rank that holds each row, the same on every rank.
        targets: ``(K,)`` rank that shall have it, the same on every rank.
        pad_id: Token that fills ``input_ids`` where rows of different widths meet.
        device: Where the process group's tensors must live.

    Returns:
        A batch of the rows that came to this rank (None if none did), and their positions among
        the ``K``, in the batch's order. Arrays and lists travel pickled.

    Raises:
        ValueError: Batches of different columns, or sizes that neither agree nor follow the width
            of the tokens, on every rank; or no process group.
    """
    moves = owners != targets
    if not bool(moves.any()):
        return None, []
    if world_size() == 1:
        raise ValueError(
            "exchange_rows: targets must be 0 without a process group, got "
            f"{targets.tolist()}. Start torch.distributed first."
        )
    leaving, coming = _moving(owners, targets), _moving(targets, owners)
    places = [local[i] for i in ((owners == rank()).cumsum(0) - 1)[leaving].tolist()]
    # A rank that gives nothing still takes part, with a row of its own as the pattern.
    sample = gather_rows(batches, places or [(0, 0)], pad_id=pad_id)
    alike = _alike(Sizes.of(sample, batches, pad_id), device)
    rows = _tensors(alike)
    rest = pickled_rows(alike)
    if rest:
        (longest,) = _largest([max(map(len, rest))], device)
        rows = {**rows, _REST: packed_bytes(rest, longest)}
    give = torch.bincount(targets[leaving], minlength=world_size()).tolist()
    take = torch.bincount(owners[coming], minlength=world_size()).tolist()
    packed = _packed(rows, device)[: len(places)]
    whole = packed.new_empty(len(coming), packed.shape[1])
    dist.all_to_all_single(whole, packed, take, give)
    if not len(coming):
        return None, []
    arrived = _unpacked(whole, rows)
    others = arrived.pop(_REST).cpu() if rest else None
    return arrived_rows(arrived, others, batches[0]), coming.tolist()
