"""The (d, d) factor of an LM head, from which the nuclear norm of any logits follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from onlinesel._base.host import Arriving
from onlinesel.kernels._columns import merge_columns, sum_over_vocabulary
from onlinesel.kernels._product import full_precision
from onlinesel.kernels.head import LMHead

__all__ = ["HeadGram"]

_VOCAB_CHUNK = 4096


class HeadGram:
    """The factor ``R`` of an LM head, ``R^T R = W^T W``, kept until it is told to forget.

    It costs one (V, d) by (V, d) product and a Cholesky factorisation, so keep one instance for
    as long as the head does not change. **Nothing detects a change**: fused optimizers move a
    weight without moving its version counter. Call :meth:`invalidate` after each step that trains
    the head, or :meth:`follow` its optimizer; under a small learning rate every tenth step is
    enough for 1e-3.

    Under LoRA adapters of rank r on a frozen base ``W`` the product ``W^T W`` is kept, and a
    refresh is exact with a (V, d) by (V, r) product: with ``C = [W, B]`` and ``T = [I; s A]`` the
    weight is ``C T``, and its Gram matrix ``T^T (C^T C) T``.

    Args:
        head: The head. A soft cap is allowed here but leaves no use for the factor. Where its
            weight is a DTensor cut by rows, each rank multiplies its own rows and the products
            are summed over the ranks: :meth:`root` is then a collective.
        root: The factor, if it is known; then ``head`` may be an outline.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
        >>> gram = HeadGram(LMHead(weight))
        >>> gram.root().T @ gram.root()
        tensor([[25.,  0.],
                [ 0.,  4.]])
    """

    def __init__(self, head: LMHead, root: Tensor | None = None) -> None:
        self._head = head
        self._root = root
        self._begun: _Factoring | None = None
        self._base: Tensor | None = None

    @property
    def head(self) -> LMHead:
        """The head the factor belongs to."""
        return self._head

    def invalidate(self, head: LMHead | None = None) -> None:
        """Forget the factor, because the weight changed.

        What derives from a frozen base alone is kept, unless a head is given.

        Args:
            head: The head to use from now on: a new object, or this one after its frozen base has
                changed all the same (loaded, or merged with adapters).
        """
        self._root = self._begun = None
        if head is not None:
            self._head, self._base = head, None

    def follow(self, optimizer: Any, every: int = 10) -> RemovableHandle:
        """Invalidate the factor after every so many steps of an optimizer.

        For a head whose tensors are the trained ones or share their memory, as those that
        ``LMHead.from_model`` reads do unless they had to be gathered: then call :meth:`invalidate`
        with a new head. A step that a gradient scaler skips does not count.

        Args:
            optimizer: The one that moves the head's weight: of torch, or a wrapper that keeps it
                as ``.optimizer`` (accelerate, DeepSpeed).
            every: Steps that one factor serves.

        Returns:
            A handle; its ``remove()`` ends it.

        Raises:
            ValueError: ``every`` is below 1.
            TypeError: There is no optimizer of torch in it.
        """
        if every < 1:
            raise ValueError(
                f"HeadGram.follow: every must be at least 1, got {every}. Pass 1 to compute the "
                "factor again after each step."
            )
        inner = optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                "HeadGram.follow: optimizer must be one of torch, or keep one as .optimizer, got "
                f"{type(optimizer).__name__}. Call invalidate() after its steps."
            )
        steps = 0

        def after(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps % every == 0:
                self.invalidate()

        return inner.register_step_post_hook(after)

    def begin(self) -> None:
        """Start to compute ``R``, for which :meth:`root` then need not wait for other work.

        On a GPU the host must know whether the factorisation succeeded. What is queued between the
        two calls is not waited for.
        """
        if self._root is not None or self._begun is not None:
            return
        head = self._head
        with full_precision(head.device):
            apart = _gram(head, self._base)
            if head.frozen:
                self._base = apart[: head.hidden_size, : head.hidden_size]
            self._begun = _Factoring(merge_columns(head, merge_columns(head, apart).T))

    def outline(self) -> HeadGram:
        """Return the factor, as far as it is, with an outline of its head, which has no memory."""
        found = HeadGram(self._head.outline(), self._root)
        found._begun = self._begun
        return found

    def root(self) -> Tensor:
        """Return ``R``, computing it on the first call.

        Returns:
            ``(d, d)``, or ``(d + 1, d + 1)`` with a bias, whose column is the last; float32, or
            float64 for a float64 weight. Without the scale of the head.
        """
        if self._root is None:
            self.begin()
            assert self._begun is not None
            dtype = torch.promote_types(self._head.weight.dtype, torch.float32)
            self._root, self._begun = self._begun.root().to(dtype), None
        return self._root


def _gram(head: LMHead, base: Tensor | None) -> Tensor:
    """Return ``C^T C`` in float64, the columns of ``C`` being base, adapters and bias.

    Args:
        head: The head.
        base: The block of the base, (d, d), if it is known.
    """
    # Squaring halves the digits, so the CPU, where float64 is cheap, multiplies in it as well.
    exact = head.weight.dtype == torch.float64 or head.device.type == "cpu"
    known = 0 if base is None else len(base)

    def product(_: slice, columns: Tensor) -> Tensor:
        return (columns.T @ columns[:, known:]).double()

    total = sum_over_vocabulary(
        head, product, _VOCAB_CHUNK, torch.float64 if exact else torch.float32
    )
    if base is None:
        return total
    return torch.cat((torch.cat((base, total[:known].T)), total), 1)


class _Factoring:
    """A Cholesky factorisation of a positive semidefinite float64 matrix, on its way."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._lower, info = torch.linalg.cholesky_ex(matrix)
        self._info = Arriving(info)

    def root(self) -> Tensor:
        """Return ``R`` with ``R^T R`` equal to the matrix."""
        matrix = self._matrix
        if int(self._info.get()) == 0:
            return self._lower.T
        if not bool(torch.isfinite(matrix).all()):
            return torch.full_like(matrix, torch.nan)
        # Fewer independent vocabulary entries than hidden units. Rare and once per weight version,
        # so it runs on the CPU, whose solver is the reliable one.
        with torch.no_grad():
            values, vectors = torch.linalg.eigh(matrix.cpu())
            root = values.clamp(min=0.0).sqrt().unsqueeze(1) * vectors.T
        return root.to(matrix.device)
