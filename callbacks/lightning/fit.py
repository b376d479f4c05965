"""What is wrapped for the time of a fit, and how a fit goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onlinesel.callbacks._shared.wrapping import wrap
from onlinesel.callbacks.lightning.data import Stream, Token
from onlinesel.callbacks.lightning.run import begin_epoch, move_progress

__all__ = ["go_on", "wrap_fit"]


def wrap_fit(
    trainer: Any,
    module: Any,
    streamed: Callable[[Any], Any],
    decided: Callable[[Token, Any, Any], Any],
) -> list[tuple[Any, dict[str, Any]]]:
    """Wrap what the trainer will call in a fit; returns what puts it back.

    Args:
        trainer: The trainer.
        module: Its module.
        streamed: Gives what the trainer iterates, in the place of a loader.
        decided: Gives what trains, in the place of a token; told the module's and the strategy's
            own transfer.
    """
    loader, strategy = trainer.fit_loop._data_source, trainer.strategy
    give, move = loader.dataloader, strategy.batch_to_device
    prepare, streams = module._on_before_batch_transfer, []  # type: ignore[var-annotated]

    # Functions and no methods of the callback: a copy of the module must not copy the trainer.
    def dataloader() -> Any:  # strategies ask for it as well
        if not streams:
            streams.append(streamed(give()))
        return streams[0]

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, Token) else prepare(batch, dataloader_idx)

    def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(batch, Token):
            return decided(batch, prepare, move)
        return move(batch, *args, **kwargs)

    return [
        (loader, wrap(loader, {"dataloader": dataloader})),
        (strategy, wrap(strategy, {"batch_to_device": batch_to_device})),
        (module, wrap(module, {"_on_before_batch_transfer": on_before_batch_transfer})),
    ]


def go_on(trainer: Any, stream: Stream, over: bool) -> Any:
    """Stand where a checkpoint stands, in the trainer's own count of batches as well.

    Args:
        trainer: Has restored all of its own.
        stream: What it iterates, whose reader stands there already.
        over: Whether the epoch of the checkpoint had no more batches.

    Returns:
        What ``trainer.val_check_batch`` is to be again after this epoch; None if it stays.
    """
    loop, size, reader = trainer.fit_loop.epoch_loop, trainer.num_training_batches, stream.reader
    behind, val_check = min(reader.behind(), size), None
    if over or not loop.restarting or behind == size:
        reader.end_epoch()
        if loop.restarting:
            begin_epoch(trainer.fit_loop)
    else:
        ahead = stream.size - behind if reader.order is None else reader.ahead()
        stream.standing = behind, ahead
        if trainer.val_check_batch == size > behind + ahead:
            val_check, trainer.val_check_batch = size, behind + ahead
        move_progress(loop.batch_progress, behind)
    if stream.begun:  # the trainer has fetched ahead, of the first epoch
        iter(trainer.fit_loop._data_fetcher)
    return val_check
