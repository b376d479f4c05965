"""Token weights for preference pairs: the contract, and TARS as far as it is text.

A preference loss compares two sums over tokens, ``sum_t log pi(y_t) / pi_ref(y_t)`` of the chosen
and of the rejected answer. A method of this module says how much each token counts in them, ``sum_t
w_t log pi(y_t) / pi_ref(y_t)``; everything after the sums stays the trainer's own loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

__all__ = [
    "TARS",
    "PreferenceTerms",
    "PreferenceTokens",
    "PreferenceWeights",
    "differing_tokens",
    "draw_positions",
]


@dataclass(frozen=True)
class PreferenceTokens:
    """What is known about the tokens of ``N`` pairs: chosen rows, then rejected ones; on the CPU.

    Attributes:
        ids: ``(2N, T)`` int64, prompt, completion and padding.
        mask: ``(2N, T)`` bool, True for the tokens of the completion that have a log-probability.
        values: What :attr:`PreferenceWeights.needs` names, each ``(2N, T)`` float32 and 0 outside
            the mask.
        special: ``(S,)`` int64, the tokenizer's special tokens (begin, end, padding, ...).
        vocabulary: Number of tokens of the tokenizer.
    """

    ids: Tensor
    mask: Tensor
    values: Mapping[str, Tensor]
    special: Tensor
    vocabulary: int

    def require(self, owner: object, name: str) -> Tensor:
        """Return the value ``name``, or say who needs it.

        Raises:
            ValueError: The value is missing.
        """
        if name not in self.values:
            raise ValueError(
                f"{type(owner).__name__}: values must hold '{name}', got {sorted(self.values)}. "
                f"Name it in {type(owner).__name__}.needs."
            )
        return self.values[name]


@dataclass(frozen=True)
class PreferenceTerms:
    """What the loss uses: a weight for each token, and what the models read.

    Attributes:
        weights: ``(2N, T)`` float32 >= 0, the factor of each token's log-ratio: 1 changes nothing,
            0 ignores the token. Outside the completion it has no effect.
        inputs: ``(2N, T)`` int64 token ids that policy and reference read in place of the batch's;
            what they are to predict stays the batch's. None leaves the batch as it is.
    """

    weights: Tensor
    inputs: Tensor | None = None

    def __post_init__(self) -> None:
        weights = self.weights.detach().to(torch.float32)
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError(
                "PreferenceTerms: weights must be finite and >= 0, got "
                f"{weights.flatten()[:8].tolist()}. Give tokens that must not count weight 0."
            )
        object.__setattr__(self, "weights", weights)


class PreferenceWeights(ABC):
    """How much each token of a preference pair counts: hyper-parameters and one pure function.

    Example:
        A user's own method is a few lines and needs no registration:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from onlinesel.rl.preference import PreferenceTerms, PreferenceWeights
        >>> @dataclass(frozen=True)
        ... class NoSpecialTokens(PreferenceWeights):
        ...     def weigh(self, tokens, *, generator):
        ...         return PreferenceTerms((~torch.isin(tokens.ids, tokens.special)).float())
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """What :meth:`weigh` reads of :attr:`PreferenceTokens.values`.

        ``"policy"`` and ``"reference"`` are the log-probability of each token under the two models
        in nats, detached, for the batch as it is. Any other name is a value of each token that the
        user gives with the data.
        """
        return ()

    @abstractmethod
    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        """Return the weights of all tokens.

        Args:
            tokens: The batch; not to be changed.
            generator: On the CPU; the only source of randomness.
        """


def _matches(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of a longest common subsequence, last first.

    The table of lengths grows along a row by 0 or 1: one bit a cell, a row an integer.
    """
    places: dict[int, int] = {}
    for j, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << j
    everything = (1 << len(second)) - 1
    row, rows = everything, []  # bit j is 0 where the length grows from column j to j + 1
    for token in first:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & everything
        rows.append(row)
    found = []
    i, j = len(first), len(second)
    while i and j:
        if rows[i - 1] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
            if not i or rows[i - 1] >> (j - 1) & 1:
                j -= 1
                found.append((i, j))
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def differing_tokens(
    first: Sequence[int], second: Sequence[int], *, min_run: int = 1
) -> tuple[Tensor, Tensor]:
    """Mark the tokens in which two texts differ: those outside a longest common subsequence.

    The common beginning and then the common end are matched first. Which of several longest
    subsequences is taken between them is fixed but arbitrary.

    Args:
        first: Token ids.
        second: Token ids.
        min_run: Stretches that match count as differing if they are shorter than this, unless both
            texts begin or end with them. Unrelated texts share many single tokens in order.

    Returns:
        ``(len(first),)`` and ``(len(second),)`` bool, True where a token differs.

    Example:
        >>> [mark.int().tolist() for mark in differing_tokens([5, 6, 7, 8], [5, 9, 7, 7, 8])]
        [[0, 1, 0, 0], [0, 1, 1, 0, 0]]
    """
    head = _common(first, second)
    first_rest, second_rest = first[head:], second[head:]
    tail = _common(first_rest[::-1], second_rest[::-1])
    ends = len(first) - tail, len(second) - tail
    inner = _matches(first[head : ends[0]], second[head : ends[1]])
    marks = torch.ones(len(first), dtype=torch.bool), torch.ones(len(second), dtype=torch.bool)
    for mark, end in zip(marks, ends, strict=True):
        mark[:head] = mark[end:] = False
    run = 0
    for (i, j), before in zip(inner, [*inner[1:], None], strict=False):
        run += 1
        if before != (i - 1, j - 1):
            if run >= min_run:
                marks[0][head + i : head + i + run] = marks[1][head + j : head + j + run] = False
            run = 0
    return marks


def draw_positions(weights: Tensor, count: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw positions of each row without replacement, each next one in proportion to its weight.

    Args:
        weights: ``(B, T)`` >= 0; a position of weight 0 is never drawn.
        count: ``(B,)`` how many; a row that has fewer positions of positive weight gives those.
        generator: On the CPU.

    Returns:
        ``(B, T)`` bool.

    Example:
        >>> import torch
        >>> weights, count = torch.tensor([[0.0, 0.2, 1.0, 0.7]]), torch.tensor([3])
        >>> draw_positions(weights, count, generator=torch.Generator()).tolist()
        [[False, True, True, True]]
    """
    # The order in which exponential clocks of these rates ring is the order of such draws.
    rings = torch.empty(weights.shape, dtype=torch.float64).exponential_(generator=generator)
    possible = weights > 0
    rings = torch.where(possible, rings / weights.double(), torch.inf)
    place = rings.argsort(dim=1, stable=True).argsort(dim=1)
    return (place < count[:, None]) & possible


@dataclass(frozen=True)
class TARS(PreferenceWeights):
    """Weigh the tokens in which the answers differ, and hide tokens that the answer rests on least.

    Idea: of two answers to one prompt, the tokens that both share say little about why one is
    better; and tokens that are not grounded in what was asked let the loss be lowered by habits of
    wording. The first count less than the others, some of the second are hidden from the models.

    Paper: Zhang et al., "TARS: MinMax Token-Adaptive Preference Strategy for Hallucination
    Reduction in MLLMs" (arXiv:2507.21584). The weight of differing tokens is that of dense DPO in
    RLHF-V, Yu et al. (arXiv:2312.00849).

    Formula: the loss is the trainer's, of ``sum_t w_t log pi(y_t) / pi_ref(y_t)`` for either
    answer. ``w_t = differing`` outside the longest common subsequence of the two answers (matches
    of fewer than ``min_run`` tokens in a row do not count as common), 1 inside. Then ``floor(share
    n)`` of the ``n`` tokens of each answer that are not special are drawn without replacement in
    proportion to ``1 - c_t``, with ``c_t`` in [0, 1] the relevance of the token (dividing by the
    largest, as the paper does, changes nothing): their ``w_t`` is 0, and with ``replace_with``
    both models read another token in their place.

    **What of the paper is not here.** It is a method for models that see images. Its relevance is
    the CLIP similarity of a token to the image, which the user must bring as a column; its loss has
    a second term with a noised image, and a third that aligns spectra of hidden states of perturbed
    and clean answers. Neither term is built, so the figures of the paper do not apply.

    Where this differs from the paper's released code: there the share is ``min(0.001 / (gap +
    0.01), 0.5)``, with ``gap`` the distance of the two largest ``1 - c_t``, hence 0.1 at most, of
    all tokens of the sequence, and at least one token; special tokens are drawn and then spared.
    The weight of differing tokens is defined there but not applied. RLHF-V divides by the sum of
    the weights; here, as in TARS, nothing is divided: where most tokens differ, ``differing=4`` is
    little else than four times ``beta``. ``relevance=None`` (all tokens alike) is a comparison
    of the paper's code. ``relevance="reference"`` is ours, for text without relevance of its own:
    ``1 - c_t`` is the probability that the reference gives the token, so that those are hidden
    which the words before them already settle.

    Cost: the alignment takes 0.6 ms for a pair of 512 tokens and 3 ms for one of 2048, on one CPU
    core; drawing and replacing add half of that. No forward, except that
    ``relevance="reference"`` together with ``replace_with`` takes a second one of the reference.
    No memory.

    When it loses: on unrelated answers, in which nearly everything differs (0.8 of the tokens of
    random texts with word frequencies as in language; 0.4 with ``min_run=1``); with a large share,
    which takes the signal away with the wording; with ``replace_with`` on short answers, where a
    replaced token spoils the rest. None of this has been measured in training here.

    If nothing qualifies: answers shorter than ``1 / share`` have no token hidden, and neither have
    those whose every ``c_t`` is 1 or nan.

    Args:
        differing: Weight of the tokens in which the answers differ; 1 turns it off.
        min_run: Shortest stretch of matching tokens that counts as common; 3 is the released
            code's.
        share: Part of the tokens that is hidden, of each answer; 0 turns it off, the paper's is
            about 0.1.
        relevance: None, ``"reference"``, or the name of a value of each token, 1 for the most
            relevant; nan counts as 1.
        replace_with: None keeps what the models read; an id (of a mask token) or ``"random"``.

    Raises:
        ValueError: An argument is out of range; on use, a relevance outside [0, 1].

    Example:
        >>> import torch
        >>> from onlinesel.rl.preference import TARS, PreferenceTokens
        >>> ids = torch.tensor([[3, 5, 6, 1], [3, 5, 7, 1]])
        >>> mask = torch.tensor([[False, True, True, True]]).expand(2, 4)
        >>> tokens = PreferenceTokens(ids, mask, {}, torch.tensor([0, 1]), 8)
        >>> TARS(min_run=1).weigh(tokens, generator=torch.Generator()).weights.tolist()
        [[1.0, 1.0, 4.0, 1.0], [1.0, 1.0, 4.0, 1.0]]
    """

    differing: float = 4.0
    min_run: int = 3
    share: float = 0.0
    relevance: str | None = None
    replace_with: int | str | None = None

    def __post_init__(self) -> None:
        other = self.replace_with is not None and self.replace_with != "random"
        for bad, name, rule, got, remedy in (
            (not 0 <= self.differing < float("inf"), "differing", "at least 0 and finite",
             self.differing, "Use 4.0, or 1.0 to turn it off."),
            (self.min_run < 1, "min_run", "at least 1", self.min_run, "Use 3."),
            (not 0 <= self.share < 1, "share", "in [0, 1)", self.share,
             "Use 0.1, or 0.0 to turn it off."),
            (self.relevance == "policy", "relevance", "None, 'reference' or the name of a column",
             "'policy'", "The policy's forward comes after the choice."),
            (self.relevance is not None and self.share == 0, "share", "positive with relevance",
             self.share, "Relevance says which tokens are hidden: use share=0.1."),
            (self.replace_with is not None and self.share == 0, "share",
             "positive with replace_with", self.share, "Use share=0.1."),
            (other and not (isinstance(self.replace_with, int) and self.replace_with >= 0),
             "replace_with", "None, 'random' or a token id", repr(self.replace_with),
             "Give the id of the tokenizer's mask token."),
        ):  # fmt: skip
            if bad:
                raise ValueError(f"TARS: {name} must be {rule}, got {got}. {remedy}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The relevance, if it is not the same for all tokens."""
        return () if self.relevance is None else (self.relevance,)

    def weigh(self, tokens: PreferenceTokens, *, generator: torch.Generator) -> PreferenceTerms:
        """Return the weights, and the perturbed inputs if tokens are replaced."""
        weights = torch.ones(tokens.ids.shape)
        if self.differing != 1:
            weights[self._differs(tokens)] = self.differing
        if self.share == 0:
            return PreferenceTerms(weights)
        free = tokens.mask & ~torch.isin(tokens.ids, tokens.special)
        count = (self.share * free.sum(dim=1).double() + 1e-6).floor()
        hidden = draw_positions(
            torch.where(free, 1.0 - self._relevance(tokens), 0.0), count, generator=generator
        )
        weights[hidden] = 0.0
        if self.replace_with is None:
            return PreferenceTerms(weights)
        return PreferenceTerms(weights, self._replace(tokens, hidden, generator))

    def _differs(self, tokens: PreferenceTokens) -> Tensor:
        marks = torch.zeros_like(tokens.mask)
        pairs = tokens.ids.shape[0] // 2
        for chosen in range(pairs):
            rows = (chosen, chosen + pairs)
            texts = [tokens.ids[row][tokens.mask[row]].tolist() for row in rows]
            for row, mark in zip(rows, differing_tokens(*texts, min_run=self.min_run), strict=True):
                marks[row, tokens.mask[row]] = mark
        return marks

    def _relevance(self, tokens: PreferenceTokens) -> Tensor:
        """Return ``c_t``, ``(2N, T)``."""
        if self.relevance is None:
            return torch.zeros(tokens.ids.shape)
        if self.relevance == "reference":
            return 1.0 - tokens.require(self, "reference").exp()
        values = tokens.require(self, self.relevance).nan_to_num(nan=1.0)
        wrong = values[tokens.mask & ~((values >= 0) & (values <= 1))]
        if wrong.numel():
            raise ValueError(
                f"TARS: {self.relevance} must be in [0, 1] for every token, got "
                f"{wrong[0].item():g}. Scale it, 1 for the most relevant tokens."
            )
        return values

    def _replace(
        self, tokens: PreferenceTokens, hidden: Tensor, generator: torch.Generator
    ) -> Tensor:
        if not isinstance(self.replace_with, int):
            ordinary = torch.ones(tokens.vocabulary, dtype=torch.bool)
            ordinary[tokens.special] = False
            ids = ordinary.nonzero().flatten()
            drawn = torch.randint(ids.shape[0], tokens.ids.shape, generator=generator)
            return torch.where(hidden, ids[drawn], tokens.ids)
        if self.replace_with >= tokens.vocabulary:
            raise ValueError(
                f"TARS: replace_with must be an id below {tokens.vocabulary}, got "
                f"{self.replace_with}. Give the id of the tokenizer's mask token."
            )
        return tokens.ids.masked_fill(hidden, self.replace_with)
