"""The state of a GRPO run as flat tensors, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from onlinesel.callbacks._shared.belonging import check_settings, warn_of_no_state
from onlinesel.callbacks._shared.checkpoint import load_selection, save_selection
from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks.grpo.checks import refuse
from onlinesel.callbacks.grpo.decide import Filler, Group
from onlinesel.callbacks.grpo.watch import Watch
from onlinesel.data.fingerprint import code_digest, rows_digest, same_rows
from onlinesel.parallel.distributed import world_size

__all__ = [
    "buffer_tensors",
    "fill_tensors",
    "load_run",
    "part",
    "prefixed",
    "restore_buffer",
    "restore_fill",
    "save_run",
]

_NAME = "rollouts"
_FIELDS = ("rewards", "outcome", "weights", "lengths")


def prefixed(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries under a name of their own."""
    return {f"{name}.{key}": value for key, value in state.items()}


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries that :func:`prefixed` put under a name."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def fill_tensors(filler: Filler, watch: Watch) -> dict[str, Tensor]:
    """Return everything that is remembered from batch to batch."""
    state = {
        "generator": filler.generator.get_state(),
        "acceptance": torch.tensor(filler.acceptance, dtype=torch.float64),
        "barren": torch.tensor(watch.barren),
        "idle": torch.tensor(watch.idle),
    }
    for name in ("gate", "rollouts"):
        selector = getattr(filler, name)
        if selector is not None:
            own = selector.state_dict()
            state |= prefixed(own["tensors"] | {"step": torch.tensor(own["step"])}, name)
    pools = {"pool": filler.pool, "order": filler.order}
    for name, pool in pools.items():
        if pool is not None:
            state |= prefixed(pool.state_dict(), name)
    for i, group in enumerate(filler.carried):
        fields = {name: getattr(group, name) for name in _FIELDS}
        rows = prefixed(group.rows or {}, "rows")
        state |= prefixed({**fields, **rows, "prompt": torch.tensor(group.prompt)}, f"carried.{i}")
    return state


def restore_fill(filler: Filler, watch: Watch, state: Mapping[str, Tensor]) -> None:
    """Put both where :func:`fill_tensors` was taken."""
    filler.generator.set_state(state["generator"])
    filler.acceptance = float(state["acceptance"])
    watch.barren, watch.idle = int(state["barren"]), int(state.get("idle", 0))
    for name in ("gate", "rollouts"):
        selector = getattr(filler, name)
        if selector is not None:
            own = part(state, name)
            step = int(own.pop("step"))
            strategy = repr(selector.strategy)
            selector.load_state_dict({"strategy": strategy, "step": step, "tensors": own})
    for name in ("pool", "order"):
        pool = getattr(filler, name)
        if pool is not None:
            pool.load_state_dict(part(state, name))
    filler.carried = []
    while own := part(state, f"carried.{len(filler.carried)}"):
        fields: dict[str, Any] = {name: own[name] for name in _FIELDS}
        rows = part(own, "rows")
        filler.carried.append(Group(prompt=int(own["prompt"]), rows=rows, **fields))


def buffer_tensors(trainer: Any) -> dict[str, Tensor]:
    """Return the generation batch that the trainer is in the middle of; empty between two."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    state = {"step": torch.tensor(trainer._step)}
    if trainer._step % every:
        for i, batch in enumerate(trainer._buffered_inputs or []):
            lists = {n: torch.tensor(v) for n, v in batch.items() if isinstance(v, list)}
            columns = {n: v.cpu() for n, v in batch.items() if isinstance(v, Tensor)}
            state |= prefixed(columns, f"buffer.{i}") | prefixed(lists, f"lists.{i}")
    return state


def restore_buffer(trainer: Any, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the trainer back into the middle of its generation batch."""
    trainer._step = int(state["step"])
    buffer: list[dict[str, Any]] = []
    while columns := part(state, f"buffer.{len(buffer)}"):
        lists = part(state, f"lists.{len(buffer)}")  # how many images each row has
        values: dict[str, Any] = {name: value.to(device) for name, value in columns.items()}
        buffer.append(values | {name: value.tolist() for name, value in lists.items()})
    trainer._buffered_inputs = buffer or None


def save_run(
    trainer: Any, folder: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint of the selection: what all ranks share, and each rank's own batch.

    Args:
        trainer: A GRPO trainer.
        folder: The trainer's own checkpoint.
        tensors: What :func:`load_run` returns.
        facts: What :func:`load_run` compares and returns.
    """
    args = trainer.args
    save_selection(folder, buffer_tensors(trainer), {}, rank=args.process_index, name=_NAME)
    if args.should_save:
        where = {"step": trainer.state.global_step, "world_size": world_size()}
        where |= {"rows": _rows(trainer), "rewards": _rewards(trainer)}
        own = {name: value.detach().cpu() for name, value in tensors.items()}
        save_selection(folder, own, {**facts, **where}, rank=None, name=_NAME)


def _rows(trainer: Any) -> dict[str, Any] | None:
    """Return what the problems are recognised by; None for a stream."""
    dataset = trainer.train_dataset
    if is_stream(dataset):
        return None
    return rows_digest(dataset, workers=trainer.args.dataloader_num_workers)


def _rewards(trainer: Any) -> dict[str, str]:
    """Return what the reward functions are recognised by."""
    pairs = zip(trainer.reward_func_names, trainer.reward_funcs, strict=True)
    return {name: code_digest(function) for name, function in pairs}


def _check_data(trainer: Any, facts: Mapping[str, Any], owner: str) -> None:
    """Refuse other problems, whose numbers would mean others, and tell of other rewards."""
    before, now = facts.get("rows"), _rows(trainer)
    if not same_rows(before, now):
        refuse(
            "train_dataset", f"the checkpoint's ({before})", now,
            "What is believed of problems belongs to their numbers: resume with the same rows in "
            "the same order, or begin a run from the model alone.",
        )  # fmt: skip
    old, new = facts.get("rewards", {}), _rewards(trainer)
    moved = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    if old and moved:
        warnings.warn(
            f"{owner}: reward functions are not all those that wrote the checkpoint ("
            f"{', '.join(moved)} changed, or Python did). Pass rates that were learnt of the "
            "problems, and the generation batch that goes on, are of the old ones.",
            stacklevel=2,
        )


def load_run(
    trainer: Any, checkpoint: str | None, facts: Mapping[str, Any], owner: str
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the selection's state of a checkpoint and put the trainer's batch back.

    Args:
        trainer: A GRPO trainer.
        checkpoint: Folder of the checkpoint, None for a new run.
        facts: What must be as it was.
        owner: Who says so.

    Returns:
        Tensors and facts; None if there are none.

    Raises:
        ValueError: The run that wrote the checkpoint had other settings.
    """
    if checkpoint is None:
        return None
    found = load_selection(checkpoint, rank=None, name=_NAME, owner=owner)
    if found is None:
        warn_of_no_state(owner, checkpoint)
        return None
    check_settings(refuse, found[1], {**facts, "world_size": world_size()}, checkpoint)
    _check_data(trainer, found[1], owner)
    own = load_selection(checkpoint, rank=trainer.args.process_index, name=_NAME, owner=owner)
    assert own is not None
    restore_buffer(trainer, own[0], trainer.args.device)
    return found
