"""Between host and device: many tensors in one copy, and copies that nobody waits for.

Reading a value of a device makes the host wait until the device has done all its work, and until
the host has queued more the device idles. What decides about rows, their labels and masks, is
therefore read once a step, in one copy. Rows are picked, cut and joined on the host in the same way
as on the device, so that nothing has to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Arriving",
    "host_columns",
    "to_host",
    "upload",
]

_READ = ("labels", "attention_mask")

Batch = Mapping[str, Any]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the host, with one copy and one wait for all that lie on one device.

    Example:
        >>> import torch
        >>> from onlinesel._base.host import to_host
        >>> [t.tolist() for t in to_host([torch.tensor([1, 2]), torch.tensor(True)])]
        [[1, 2], True]
    """
    found = list(tensors)
    away: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            away.setdefault(tensor.device, []).append(place)
    for places in away.values():
        flat = [tensors[i].detach().contiguous().reshape(-1).view(torch.uint8) for i in places]
        brought = torch.cat(flat).cpu().split([part.numel() for part in flat])
        for i, part in zip(places, brought, strict=True):
            # A copy of its own starts where its dtype may start.
            found[i] = part.clone().view(tensors[i].dtype).view(tensors[i].shape)
    return found


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a small tensor on a device, to which it is copied while the host goes on.

    Example:
        >>> import torch
        >>> from onlinesel._base.host import upload
        >>> upload(torch.tensor([1, 2]), "cpu").tolist()
        [1, 2]
    """
    device = torch.device(device)
    plain = torch.compiler.is_compiling() or device.type in ("cpu", "mps", "meta")
    if plain or tensor.device.type != "cpu":
        return tensor.to(device)
    # From memory that may be paged out the driver may wait for the device before it copies.
    return tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """A small tensor on its way to the host, which waits for it only if it asks too early.

    What is queued after it is not waited for, so the device goes on with that.

    Example:
        >>> import torch
        >>> from onlinesel._base.host import Arriving
        >>> Arriving(torch.tensor([1, 2])).get().tolist()
        [1, 2]
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.device.type not in ("cpu", "mps"):
            self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.Event(tensor.device)
            self._event.record(torch.accelerator.current_stream(tensor.device))

    def get(self) -> Tensor:
        """Return the tensor on the host."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return self._tensor.cpu()


def host_columns(
    batches: Sequence[Batch],
    *others: Sequence[Tensor],
    given: Sequence[Batch] | None = None,
) -> tuple[list[dict[str, Tensor]], list[list[Tensor]]]:
    """Bring the labels and masks of batches to the host, and other tensors with them.

    Args:
        batches: Batches on any device.
        *others: Lists of tensors that are wanted as well.
        given: The same batches as they were on the host, if the caller has them: what lies there of
            the columns need not come back.

    Returns:
        The columns of each batch that lie on a device, on the host; and the lists of others. A
        batch of the host has none: it can be read as it is.

    Example:
        >>> import torch
        >>> from onlinesel._base.host import host_columns
        >>> host_columns([{"labels": torch.ones(1, 2)}], [torch.tensor([7])])
        ([{}], [[tensor([7])]])
    """
    columns = [
        (m, name, value if given is None else given[m].get(name, value))
        for m, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.device.type != "cpu" and _is_read(name, value)
    ]
    found = iter(to_host([*(value for *_, value in columns), *(t for o in others for t in o)]))
    hosted: list[dict[str, Tensor]] = [{} for _ in batches]
    for m, name, _ in columns:
        hosted[m][name] = next(found)
    return hosted, [[next(found) for _ in other] for other in others]


def _is_read(name: str, value: Tensor) -> bool:
    """Return whether the values of a column decide about rows: labels of classes, flat masks."""
    if value.is_floating_point() or not name.endswith(_READ):
        return False
    return value.dim() == 2 or (value.dim() > 0 and name.endswith("labels"))
