"""Hidden states, labels and temperatures of the tokens that count, checked and flattened."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from onlinesel._base.host import upload
from onlinesel.kernels._checks import check_hidden
from onlinesel.kernels.head import LMHead

__all__ = ["Tokens", "inverse_temperature", "put_back", "take_tokens"]


class Tokens(NamedTuple):
    """The n tokens that go through the head.

    Attributes:
        mask: Bool of the shape of the labels, whether the label counts.
        kept: ``(n,)`` places of the tokens in the flattened mask, or None for all places.
        states: ``(n, d)``.
        targets: ``(n,)`` int64 vocabulary entries.
        inverse: ``(n,)`` one over the temperature in the accumulation dtype, or None for 1.
        invalid: ``(n,)`` tokens whose label or temperature could not be refused, or None.
    """

    mask: Tensor
    kept: Tensor | None
    states: Tensor
    targets: Tensor
    inverse: Tensor | None
    invalid: Tensor | None


def take_tokens(
    owner: str,
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    temperature: Tensor | float | None,
    ignore_index: int,
    padded: bool,
    vocab: int,
) -> Tokens:
    """Check and flatten the inputs of a scorer, and leave the ignored tokens out.

    Args:
        owner: Who asks, for errors.
        hidden: ``(..., d)``.
        head: Its hidden size and dtypes count.
        labels: ``(...)`` integer, on the device of ``hidden`` or on the host, where they are read
            without a wait.
        temperature: A number, a scalar tensor, ``(...)``, or None.
        ignore_index: Label value of the tokens to leave out.
        padded: Keep every token, so that no shape depends on a value and nothing waits for the
            device. What would be refused otherwise is marked invalid.
        vocab: Labels must be below it.
    """
    check_hidden(owner, head, hidden)
    _check_labels(owner, hidden, labels)
    device = hidden.device
    labels = upload(labels, device) if padded else labels
    inverse = inverse_temperature(owner, temperature, labels, head.accumulation_dtype(hidden))
    mask = labels != ignore_index
    states, targets = hidden.reshape(-1, head.hidden_size), labels.reshape(-1).long()
    if padded:
        targets = torch.where(mask.reshape(-1), targets, 0)
        invalid = (targets < 0) | (targets >= vocab)
        if inverse is not None:
            invalid = invalid | ~(inverse > 0) | torch.isinf(inverse)
        return Tokens(mask, None, states, targets, inverse, invalid)
    kept = mask.reshape(-1).nonzero().squeeze(1)
    whole = kept.numel() == targets.numel()
    if not whole:
        targets, inverse = targets[kept], None if inverse is None else inverse[kept]
    _check_values(owner, targets, inverse, temperature, vocab)
    mask, targets = upload(mask, device), upload(targets, device)
    inverse = None if inverse is None else upload(inverse, device)
    if whole:
        return Tokens(mask, None, states, targets, inverse, None)
    kept = upload(kept, device)
    return Tokens(mask, kept, states[kept], targets, inverse, None)


def put_back(values: Tensor, tokens: Tokens) -> Tensor:
    """Put the values of the tokens at their places, zeros (False) where the label is ignored."""
    mask = tokens.mask
    if tokens.invalid is not None:
        values = values.reshape(mask.shape)
        return torch.where(mask, values, torch.zeros_like(values))
    if tokens.kept is None:
        return values.reshape(mask.shape)
    return values.new_zeros(mask.numel()).index_copy(0, tokens.kept, values).reshape(mask.shape)


def inverse_temperature(
    owner: str, temperature: Tensor | float | None, labels: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return one over the temperature of each flattened token, or None where there is none."""
    if temperature is None:
        return None
    if not isinstance(temperature, Tensor):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(_temperature_error(owner, temperature))
        return torch.full((labels.numel(),), 1.0 / temperature, dtype=dtype, device=labels.device)
    if temperature.dim() > 0 and temperature.shape != labels.shape:
        raise ValueError(
            f"{owner}: temperature must be one number or of shape {tuple(labels.shape)}, got shape "
            f"{tuple(temperature.shape)}. Give one temperature per label."
        )
    given = temperature.detach().to(device=labels.device, dtype=dtype)
    return given.expand(labels.shape).reshape(-1).reciprocal()


def _check_labels(owner: str, hidden: Tensor, labels: Tensor) -> None:
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{owner}: labels must be of shape {tuple(hidden.shape[:-1])}, got "
            f"{tuple(labels.shape)}. Align them with hidden first, see shift_labels."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{owner}: labels must be integers, got {labels.dtype}. Pass token ids.")


def _check_values(
    owner: str,
    targets: Tensor,
    inverse: Tensor | None,
    temperature: Tensor | float | None,
    vocab: int,
) -> None:
    """Refuse labels outside the vocabulary, which would score another token silently."""
    if targets.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(targets)).tolist()
    if low < 0 or high >= vocab:
        raise ValueError(
            f"{owner}: labels must be in [0, {vocab}) or ignore_index, got a label "
            f"{low if low < 0 else high}. Check the tokenizer, or mark the token ignored."
        )
    if isinstance(temperature, Tensor) and inverse is not None:
        bad = ~(inverse > 0) | torch.isinf(inverse)
        if bool(bad.any()):
            found = float(inverse[bad][0].reciprocal())
            raise ValueError(_temperature_error(owner, found))


def _temperature_error(owner: str, value: float) -> str:
    return (
        f"{owner}: temperature must be positive and finite, got {value}. "
        "Pass None for logits as they are."
    )
