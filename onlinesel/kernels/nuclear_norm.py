"""The nuclear norm of a sample's logits, without the logits.

The logits of a sample are ``Z = H W^T``. With ``R^T R = W^T W``, a (d, d) factor of the head that
is computed once, ``Z`` and the (T, d) matrix ``A = H R^T`` have the same singular values, so a
vocabulary of 150,000 entries costs no more than one of d. A bias is one more column of ``W`` that
meets a column of ones in ``H``; the scale is a factor. A soft cap is not linear: the (T, T) matrix
``Z Z^T`` is then summed over vocabulary parts instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from onlinesel.kernels._checks import check_hidden, check_rows
from onlinesel.kernels._product import full_precision
from onlinesel.kernels.gram import HeadGram
from onlinesel.kernels.head import LMHead

__all__ = ["logit_nuclear_norm"]

_METHODS = ("auto", "gram", "svd", "polar", "stream")
_VOCAB_CHUNK = 4096
# Singular values below this share of the norm may not converge. It is where float32 loses them: at
# 1e-5 and ten steps the many small ones of a spectrum of condition 1e7 left 1e-4 of the sum out.
_POLAR_STEPS, _POLAR_LOWER = 13, 3.0e-7
# No step aims below this share of its upper bound: the polynomial that is best down to a tiny lower
# bound takes some large singular values close to 0, where float32 rounds their directions away.
_POLAR_CUSHION = 0.024
# Whose tensor cores multiply float64 as fast as the others do float32, by their data sheets: A100,
# H100 and H200. B200 does half of that, and most others a small part.
_FAST_DOUBLE = ((8, 0), (9, 0))
_POLAR_SAFETY = 1.01  # without it, rounding pushes a singular value past 1 and the steps diverge


def logit_nuclear_norm(
    hidden: Tensor,
    head: LMHead,
    rows: Tensor | None = None,
    *,
    method: str = "auto",
    gram: HeadGram | None = None,
) -> Tensor:
    """Return the sum of singular values of each sample's (T, V) logits.

    Exact up to rounding for every method, bias and scale included. A sample with a nan or inf
    among its rows gives nan and leaves the others alone; one without rows gives 0.

    Source: UDS, Utility-Diversity Sampling (arXiv 2510.16882), which builds the logits. Polar
    coefficients: Polar Express (arXiv 2505.16932).

    Args:
        hidden: ``(B, T, d)`` states that enter the head.
        head: The LM head.
        rows: ``(B, T)`` mask of the rows that count, or None for all. Other rows may hold
            anything, nan included.
        method: ``"gram"``: eigenvalues of the smaller of ``A A^T`` and ``A^T A`` in float64, found
            on the CPU. ``"polar"``: products only, for accelerators, where solvers are slow; in
            float32, or in float64 where that is as fast (A100, H100, H200). Singular values
            below 3e-7 of their norm may count in part. ``"svd"``: singular values of ``A`` in
            float64, for audits. ``"stream"``: ``Z Z^T`` in float64 over vocabulary parts, which
            alone knows soft caps. ``"auto"``: stream under a soft cap, else polar on an accelerator
            and gram on a CPU.
        gram: The cached factor of this head, or None to compute it for this call.

    Returns:
        ``(B,)`` float32, or float64 when an input is.

    Raises:
        ValueError: A shape or the method is not as stated, or a method that needs linear logits
            was asked for under a soft cap.

    Example:
        >>> import torch
        >>> head = LMHead(torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]]))
        >>> logit_nuclear_norm(torch.eye(2)[None], head)
        tensor([7.])
    """
    check_hidden("logit_nuclear_norm", head, hidden, dims=3)
    mask = check_rows("logit_nuclear_norm", hidden, rows)
    chosen = _choose(method, head, hidden.device)
    with full_precision(hidden.device):
        return _measure(chosen, hidden, head, mask, gram)


def _measure(
    chosen: str, hidden: Tensor, head: LMHead, mask: Tensor, gram: HeadGram | None
) -> Tensor:
    """Return the nuclear norms by the method that was chosen."""
    dtype = head.accumulation_dtype(hidden)
    if chosen == "stream":
        grams = _stream(hidden, head, mask)
        if hidden.device.type != "cpu":
            return _gram_polar(_padded(grams, hidden)).to(dtype)
        return _gather(map(_spectral_sum, grams), hidden, dtype)
    root = _root_for(gram or HeadGram(head), head).to(device=hidden.device, dtype=dtype)
    if chosen == "polar":
        norms = _polar(_reduce(hidden.to(dtype), head, mask.unsqueeze(2), root))
    else:
        measure = _svd_sum if chosen == "svd" else _gram_sum
        # Sample by sample: the solvers are sequential anyway, and each pays for its own rows.
        kept = (states[rows_].to(dtype) for states, rows_ in zip(hidden, mask, strict=True))
        parts = (_reduce(h, head, h.new_ones(len(h), 1).bool(), root) for h in kept)
        norms = _gather(map(measure, parts), hidden, dtype)
    return abs(head.scale) * norms


def _choose(method: str, head: LMHead, device: torch.device) -> str:
    if method not in _METHODS:
        raise ValueError(
            f"logit_nuclear_norm: method must be one of {', '.join(_METHODS)}, got {method!r}. "
            'Pass "auto" to let the device decide.'
        )
    if method == "auto":
        if head.softcap is not None:
            return "stream"
        return "gram" if device.type == "cpu" else "polar"
    if head.softcap is not None and method != "stream":
        raise ValueError(
            f'logit_nuclear_norm: method must be "stream" or "auto" under a soft cap, got '
            f"{method!r}. Soft-capped logits are not linear in hidden, so the shortcut is off."
        )
    return method


def _root_for(gram: HeadGram, head: LMHead) -> Tensor:
    """Return the factor, after a check that it can be this head's."""
    root, wanted = gram.root(), head.hidden_size + (head.bias is not None)
    if root.shape[0] != wanted:
        raise ValueError(
            f"logit_nuclear_norm: gram must be of this head, of size {wanted}, got "
            f"{root.shape[0]}. Build HeadGram(head), or call gram.invalidate(head)."
        )
    return root


def _reduce(states: Tensor, head: LMHead, counted: Tensor, root: Tensor) -> Tensor:
    """Return ``A = [H, 1] R^T``, which has the singular values of the logits.

    Rows where ``counted`` (..., T, 1) is False become zero rows, which add no singular value.
    """
    width = states.shape[-1]
    out = states.masked_fill(~counted, 0.0) @ root[:, :width].T
    return out if head.bias is None else out + counted * root[:, width]


def _gather(sums: Iterable[Tensor], hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Collect one number per sample into a vector beside ``hidden``."""
    return torch.tensor([float(value) for value in sums], device=hidden.device, dtype=dtype)


def _gram_sum(reduced: Tensor) -> Tensor:
    """Nuclear norm by the smaller of ``A A^T`` and ``A^T A``: same non-zero eigenvalues."""
    wide = reduced.double()
    return _spectral_sum(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide)


def _svd_sum(reduced: Tensor) -> Tensor:
    """Nuclear norm by singular values; nan where the solver would raise."""
    wide = reduced.double().cpu()
    finite = bool(torch.isfinite(wide).all())
    return torch.linalg.svdvals(wide).sum() if finite else wide.new_tensor(torch.nan)


def _spectral_sum(gram: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues; nan where the solver would raise."""
    gram = gram.cpu()
    # A nan or inf anywhere in a row is on its diagonal too.
    if not math.isfinite(float(gram.trace())):
        return gram.new_tensor(torch.nan)
    return torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().sum()


def _stream(hidden: Tensor, head: LMHead, mask: Tensor) -> list[Tensor]:
    """Return ``Z Z^T`` of each sample, summed over vocabulary parts.

    The tiles are squared in float64: rounded in float32, a Gram matrix has negative eigenvalues,
    which an eigenvalue solver may clamp and the polar iteration may not.
    """
    dtype = head.accumulation_dtype(hidden)
    samples = [hidden[i][mask[i]] for i in range(len(hidden))]
    totals = [torch.zeros(len(s), len(s), dtype=torch.float64, device=s.device) for s in samples]
    # The vocabulary is the outer loop, so that each part of the weight is cast once for the batch.
    for start in range(0, head.vocab_size, _VOCAB_CHUNK):
        part = head.part(start, start + _VOCAB_CHUNK, dtype)
        for total, sample in zip(totals, samples, strict=True):
            tile = part.logits(sample).double()
            total += tile @ tile.T
    return totals


def _padded(grams: list[Tensor], hidden: Tensor) -> Tensor:
    """Stack Gram matrices into (B, T, T); rows and columns of zeros add no eigenvalue."""
    out = hidden.new_zeros((len(grams), hidden.shape[1], hidden.shape[1]), dtype=torch.float64)
    for whole, gram in zip(out, grams, strict=True):
        whole[: len(gram), : len(gram)] = gram
    return out


def _gram_polar(grams: Tensor) -> Tensor:
    """Return the nuclear norms of matrices from their (B, T, T) float64 ``Z Z^T``, by products.

    The polar iteration multiplies ``X`` from the left by polynomials of ``X X^T``, which all
    commute: their product and ``X X^T`` are enough, and ``X`` itself is never needed.
    """
    size = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None]
    scale = (_POLAR_SAFETY * size).clamp(min=torch.finfo(grams.dtype).tiny ** 0.5)
    g = grams / scale.square()
    product = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(g)
    one = product
    for step, (c1, c3, c5) in enumerate(_polar_coefficients(_POLAR_STEPS, _POLAR_LOWER)):
        q = c1 * one + c3 * g + c5 * (g @ g)
        product = q @ product if step else q
        if step < _POLAR_STEPS - 1:
            g = q @ g @ q
    return (product * grams).sum(dim=(1, 2)) / scale[:, 0, 0]


def _polar(reduced: Tensor) -> Tensor:
    """Return the nuclear norm ``<A, polar(A)>`` of a batch of matrices, by products only.

    Where float64 is fast and the matrices are wide, their (T, T) Gram matrices take fewer products.
    Else not in TF32, although the products are most of the time on a GPU: factors rounded to its 10
    bits were emulated, and cost between 1e-5 and 5e-4 of the norm.
    """
    a = reduced if reduced.shape[1] <= reduced.shape[2] else reduced.mT
    if 2 * a.shape[2] >= 3 * a.shape[1] and _doubles(a.device):
        wide = a.double()
        return _gram_polar(wide @ wide.mT).to(a.dtype)
    size = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
    # Zero samples divide by a tiny number and stay 0.
    x = a / (_POLAR_SAFETY * size).clamp(min=torch.finfo(a.dtype).tiny)
    for c1, c3, c5 in _polar_coefficients(_POLAR_STEPS, _POLAR_LOWER):
        g = x @ x.mT
        x = torch.baddbmm(x, c3 * g + c5 * (g @ g), x, beta=c1)
    return (a * x).sum(dim=(1, 2))


def _doubles(device: torch.device) -> bool:
    """Return whether a device multiplies float64 as fast as float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_DOUBLE


@lru_cache
def _polar_coefficients(steps: int, lower: float) -> list[tuple[float, float, float]]:
    """Return odd quintics whose composition takes [lower, 1] to 1.

    Each is the minimax polynomial of the interval the ones before it leave, or of its upper part,
    and then scaled to be as far from 1 at the lower end as at the upper.
    """
    upper, out = 1.0, []
    for step in range(steps):
        c1, c3, c5 = _minimax_quintic(max(lower, _POLAR_CUSHION * upper), upper)
        low, high = (x * (c1 + x**2 * (c3 + x**2 * c5)) for x in (lower, upper))
        if lower < _POLAR_CUSHION * upper:
            scale = 2.0 / (low + high)
            c1, c3, c5, low = c1 * scale, c3 * scale, c5 * scale, low * scale
        lower, upper = low, 2.0 - low
        safe = _POLAR_SAFETY if step < steps - 1 else 1.0
        out.append((c1 / safe, c3 / safe**3, c5 / safe**5))
    return out


def _minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Return a, b, c so that a x + b x^3 + c x^5 is closest to 1 on [lower, upper] (Remez)."""
    if lower / upper >= 1.0 - 5.0e-6:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner, outer = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    before = torch.inf
    for _ in range(100):
        points = torch.tensor([lower, inner, outer, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack((points, points**3, points**5, signs), 1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        if abs(before - error) <= 1.0e-15:
            break
        before = error
        # The new inner points are the extrema of the polynomial.
        middle, spread = -3 * b / (10 * c), (9 * b * b - 20 * a * c) ** 0.5 / (10 * c)
        inner, outer = sorted((abs(middle - spread) ** 0.5, abs(middle + spread) ** 0.5))
    return a, b, c
