"""What a callback says of the trainer and the checkpoint before a run begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_added", "check_own", "check_settings", "warn_of_no_state", "warn_of_workers"]


def check_added(callback: Any) -> None:
    """Refuse to train with a callback that wraps the trainer and is told nothing by it."""
    if callback not in callback.trainer.callback_handler.callbacks:
        name = type(callback).__name__
        raise ValueError(
            f"{name}: callback must be among the trainer's callbacks, got one that was only "
            f"constructed. Write trainer.add_callback({name}(trainer, ...))."
        )


def warn_of_no_state(owner: str, checkpoint: str) -> None:
    """Say that a run goes on without what its selection had learnt."""
    warnings.warn(
        f"{owner}: {checkpoint} has no state of the selection, which begins anew: what it "
        "remembers and draws is not that of the run that wrote the checkpoint. "
        "save_only_model=True keeps no such state: set it to False for runs that will be resumed.",
        stacklevel=2,
    )


def check_own(callback: Any, running: bool, args: Any) -> None:
    """Refuse a callback among the callbacks of a trainer that it does not wrap.

    Args:
        callback: The callback, with its own ``trainer``.
        running: Whether that one is training, with its methods wrapped.
        args: The arguments of the trainer that begins to train.
    """
    if not running or args is not callback.trainer.args:
        name = type(callback).__name__
        raise ValueError(
            f"{name}: trainer must be the one that the callback was made for, got another one or "
            f"one that it was detached from. Write trainer.add_callback({name}(trainer, ...)) with "
            "the same trainer twice."
        )


def warn_of_workers(args: Any) -> None:
    """Say what the trainer does with workers that persist: they begin in an epoch of their own."""
    if args.dataloader_persistent_workers and args.dataloader_num_workers:
        warnings.warn(
            "OnlineSelection: with dataloader_persistent_workers torch draws a number where the "
            "workers begin, which a resumed run does an epoch later. Dropout, and an order without "
            "a seed, are others than in the uninterrupted run from the next epoch on: set it to "
            "False where that matters.",
            stacklevel=2,
        )


def check_settings(
    refuse: Callable[[str, str, object, str], Any],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    checkpoint: str | None = None,
) -> None:
    """Refuse to resume with other settings than those that wrote a checkpoint.

    Args:
        refuse: Raises the host's designed error.
        before: The checkpoint's facts.
        now: The settings of this run.
        checkpoint: Its folder, where there is one.
    """
    what = "Resume" if checkpoint is None else f"Resume {checkpoint}"
    for name, value in now.items():
        if before.get(name) != value:
            refuse(
                name, f"the checkpoint's ({before.get(name)})", value,
                f"{what} with the arguments that wrote it.",
            )  # fmt: skip
