"""DomainSampler: the rows of an epoch, one by one, from domains in proportions that may move."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from onlinesel.mixing.types import Mixture

__all__ = ["DomainSampler"]

_CHUNK = 4096
"""Uniform numbers drawn at once: fixed, so that number i never depends on who asked when."""


def _generator(*names: object) -> torch.Generator:
    # Hashed, because the CPU generator uses 32 bits of its seed and sums of counters collide.
    digest = hashlib.sha256(" ".join(["DomainSampler", *map(str, names)]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _pick(uniform: Tensor, proportions: Tensor) -> Tensor:
    """Return the place of the domain that each uniform number falls into."""
    edges = proportions.cumsum(0)
    # Rounding may push a number past the end, or onto domains of share 0 there.
    last = int((proportions > 0).nonzero().max())
    return torch.searchsorted(edges, uniform * edges[-1], right=True).clamp(max=last)


@dataclass
class _Epoch:
    """What the draws of one epoch follow from, and how many were made.

    ``firsts[k]`` is the first draw made in proportions ``shares[k]``; ``start`` and ``cursors`` are
    the draws of each domain since the run began, before the first and after the last draw made.
    """

    number: int
    start: list[int]
    firsts: list[int]
    shares: list[Tensor]
    drawn: int = 0
    cursors: list[int] = field(default_factory=list)
    version: int = 0

    def piece(self, draw: int) -> tuple[Tensor, int | None]:
        """Return the proportions of a draw, and the first draw of the next ones if known."""
        after = bisect_right(self.firsts, draw)
        return self.shares[after - 1], self.firsts[after] if after < len(self.firsts) else None

    def change(self, first: int, proportions: Tensor) -> None:
        """Let proportions act from a draw on; what was to act from there on never will."""
        if self.firsts[-1] <= first and torch.equal(self.shares[-1], proportions):
            return
        while self.firsts and self.firsts[-1] >= first:
            self.firsts.pop()
            self.shares.pop()
        self.firsts.append(first)
        self.shares.append(proportions)
        self.version += 1


class DomainSampler(Sampler[int]):
    """Draw the rows of an epoch from domains, in the proportions of a mixture.

    Each draw takes a domain by chance, in the proportions in force when it is made, and then the
    next row of that domain: rows of a domain come in a shuffled order, all of them once before any
    comes back, and the order goes on across epochs. An epoch has the same length whatever the
    proportions are, so that schedules and the number of steps stay what the trainer made of them;
    a domain with a large share is repeated, and one with a small share not finished.

    **Look-ahead.** A loader draws ahead of training (workers, prefetching), so new proportions act
    from the next draw on, some steps after the losses that made them. Something that lists the
    whole sampler first (torch's ``DistributedSampler`` around it, as Lightning puts it) makes all
    draws of an epoch at its beginning: proportions then change from epoch to epoch only.

    **Ranks.** Every rank holds a copy and draws all rows; the shards are taken after it. The copies
    stay equal if they observe the same losses (gathered from all ranks) after the same number of
    draws. Where ranks may have drawn different numbers, pass ``at`` to :meth:`observe`.

    **Resume.** The draws of an epoch follow from seed, epoch, the domains' cursors at its beginning
    and the list of proportions with their first draws. All are in the state: iterating again after
    :meth:`load_state_dict` gives the very rows that were drawn, in the proportions of then, and
    goes on from there. The host skips those it has trained.

    **Cost.** Some microseconds a draw, and 24 bytes of memory a row. The state does not grow with
    the rows; it holds ``8 K`` bytes for each change of the proportions in the epoch.

    Args:
        domains: ``(rows,)`` int64, the domain of each row; any numbers.
        mixture: Sets the proportions. Where it takes one setting per domain, these are in ascending
            order of the domains' numbers.
        seed: Of the draws. Ranks must share it.
        length: Draws of an epoch; by default the number of rows.

    Attributes:
        epoch: Number of the epoch that the next ``iter`` draws; set by the host. The same number
            again gives the same rows again.

    Raises:
        TypeError: ``domains`` that are not integers, or a mixture that is none.
        ValueError: No rows, or a length below 1.

    Example:
        >>> import torch
        >>> from onlinesel.mixing import DomainSampler, FixedMixture
        >>> domains = torch.tensor([7] * 9 + [8])
        >>> sampler = DomainSampler(domains, FixedMixture((0.5, 0.5)), seed=0, length=1000)
        >>> rows = list(sampler)
        >>> 400 < rows.count(9) < 600, len(set(rows))
        (True, 10)
        >>> sampler.metrics()
        {'share/7': 0.5, 'share/8': 0.5}
    """

    def __init__(
        self, domains: Tensor, mixture: Mixture, *, seed: int, length: int | None = None
    ) -> None:
        if not isinstance(mixture, Mixture):
            raise TypeError(
                f"DomainSampler: mixture must be a Mixture instance, got {mixture!r}. "
                "Pass the method itself, for example ODM()."
            )
        if not isinstance(domains, Tensor) or domains.is_floating_point():
            kind = domains.dtype if isinstance(domains, Tensor) else type(domains).__name__
            raise TypeError(
                f"DomainSampler: domains must be an integer tensor, got {kind}. "
                "Number the domains, one number a row."
            )
        if domains.dim() != 1 or not domains.numel():
            raise ValueError(
                "DomainSampler: domains must have one number per row (rows,), got shape "
                f"{tuple(domains.shape)}. Pass the domain column of the dataset."
            )
        if length is not None and length < 1:
            raise ValueError(
                f"DomainSampler: length must be at least 1, got {length}. "
                "Say how many rows an epoch has, or leave it out for all."
            )
        self.mixture = mixture
        self.seed = seed
        self.epoch = 0
        self._length = length or domains.numel()
        self._labels, self._places = torch.unique(domains.cpu().long(), return_inverse=True)
        self._sizes = torch.bincount(self._places)
        # Rows of each domain, ascending: one tensor, cut where the next domain begins.
        self._rows = self._places.argsort(stable=True).split(self._sizes.tolist())
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._state = mixture.init(self._sizes)
        zeros = [0] * len(self._labels)
        self._plan = _Epoch(0, zeros, [0], [self.proportions], cursors=list(zeros))

    def __len__(self) -> int:
        return self._length

    @property
    def domains(self) -> Tensor:
        """Domain of each row, as it was given: ``(rows,)`` int64."""
        return self._labels[self._places]

    @property
    def proportions(self) -> Tensor:
        """Chance of each domain at a draw from now on: ``(K,)`` float64."""
        return self.mixture.proportions(self._state)

    def __iter__(self) -> Iterator[int]:
        if self.epoch != self._plan.number:
            start = self._plan.cursors
            self._plan = _Epoch(
                self.epoch, list(start), [0], [self.proportions], cursors=list(start)
            )
        return self._draws(self._plan)

    def _draws(self, plan: _Epoch) -> Iterator[int]:
        """Make the draws of an epoch; those made before come out as they were."""
        generator = _generator(self.seed, "epoch", plan.number)
        cursors = list(plan.start)
        for begin in range(0, self._length, _CHUNK):
            uniform = torch.rand(_CHUNK, generator=generator, dtype=torch.float64)
            draw, end = begin, min(begin + _CHUNK, self._length)
            while draw < end:
                version = plan.version
                proportions, stop = plan.piece(draw)
                stop = end if stop is None else min(stop, end)
                for place in _pick(uniform[draw - begin : stop - begin], proportions).tolist():
                    row = self._row(place, cursors[place])
                    cursors[place] += 1
                    draw += 1
                    if draw > plan.drawn:
                        plan.drawn = draw
                        plan.cursors[place] += 1
                    yield row
                    if plan.version != version:
                        break

    def _row(self, place: int, cursor: int) -> int:
        """Return the row that a domain gives at its draw number ``cursor``, from 0."""
        rows = self._rows[place]
        cycle, position = divmod(cursor, rows.shape[0])
        known, order = self._orders.get(place, (-1, rows))
        if known != cycle:
            generator = _generator(self.seed, "domain", int(self._labels[place]), cycle)
            order = rows[torch.randperm(rows.shape[0], generator=generator)]
            self._orders[place] = (cycle, order)
        return int(order[position])

    def observe(
        self,
        ids: Tensor,
        loss: Tensor,
        *,
        reference_loss: Tensor | None = None,
        at: int | None = None,
    ) -> None:
        """Learn from the rows of one optimizer step; call it once a step, on every rank alike.

        Losses of all candidates that were scored tell more of a domain than those of the rows that
        a strategy chose.

        Args:
            ids: ``(N,)`` int64 row numbers.
            loss: ``(N,)`` mean loss of each row; rows that are not finite are ignored.
            reference_loss: ``(N,)`` the same under a reference model, if the mixture needs it.
            at: Draw of the current epoch from which the new proportions act; by default the next
                one. Not before draws that were made.

        Raises:
            ValueError: Ids that are no row numbers, another number of losses than of ids, or ``at``
                before the draws made. Nothing is changed then.
        """
        ids = ids.cpu().long()
        bad = (ids < 0) | (ids >= self._places.shape[0])
        if bool(bad.any()):
            raise ValueError(
                f"DomainSampler: ids must be row numbers below {self._places.shape[0]}, got "
                f"{int(ids[bad][0])}. Number the rows of the dataset instead of hashing them."
            )
        for name, values in (("loss", loss), ("reference_loss", reference_loss)):
            if values is not None and values.shape != ids.shape:
                raise ValueError(
                    f"DomainSampler: {name} must have one entry per id {tuple(ids.shape)}, got "
                    f"{tuple(values.shape)}. Pass mean losses of rows."
                )
        plan = self._plan
        if at is not None and at < plan.drawn:
            raise ValueError(
                f"DomainSampler: at must be at least the number of draws made ({plan.drawn}), got "
                f"{at}. Pass a later draw, beyond what the loader looks ahead."
            )
        reference = None if reference_loss is None else reference_loss.detach().cpu().float()
        with torch.no_grad():
            self._state = self.mixture.observe(
                self._places[ids], loss.detach().cpu().float(), self._state,
                reference_loss=reference,
            )  # fmt: skip
        plan.change(plan.drawn if at is None else at, self.proportions)

    def metrics(self) -> dict[str, float]:
        """Return the share of each domain in the draws from now on, as ``share/<domain>``."""
        shares = zip(self._labels.tolist(), self.proportions.tolist(), strict=True)
        return {f"share/{label}": share for label, share in shares}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: plain numbers, text and CPU tensors."""
        plan = self._plan
        tensors = {f"mixture.{name}": value.clone() for name, value in self._state.items()}
        tensors |= {
            "labels": self._labels.clone(),
            "sizes": self._sizes.clone(),
            "start": torch.tensor(plan.start),
            "cursors": torch.tensor(plan.cursors),
            "firsts": torch.tensor(plan.firsts),
            "shares": torch.stack(plan.shares),
        }
        return {
            "mixture": repr(self.mixture),
            "seed": self.seed,
            "length": self._length,
            "epoch": plan.number,
            "drawn": plan.drawn,
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; its seed and epoch become this sampler's.

        Raises:
            ValueError: The state is of another mixture, of other domains or of another length.
                Nothing is changed then.
        """
        tensors = state["tensors"]
        mine = torch.stack([self._labels, self._sizes])
        theirs = torch.stack([tensors["labels"], tensors["sizes"]])
        for name, own, other, remedy in (
            ("mixture", repr(self.mixture), state["mixture"], "mixture and its settings"),
            ("length", self._length, state["length"], "length"),
            ("domains and their sizes", mine.tolist(), theirs.tolist(), "dataset"),
        ):
            if own != other:
                raise ValueError(
                    f"DomainSampler: state must be of the same {name} {own}, got {other}. "
                    f"Resume with the {remedy} that wrote it."
                )
        self._state = {
            name.removeprefix("mixture."): value.clone()
            for name, value in tensors.items()
            if name.startswith("mixture.")
        }
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])
        self._orders = {}
        self._plan = _Epoch(
            number=self.epoch,
            start=tensors["start"].tolist(),
            firsts=tensors["firsts"].tolist(),
            shares=list(tensors["shares"].clone()),
            drawn=int(state["drawn"]),
            cursors=tensors["cursors"].tolist(),
        )
