"""What the Hugging Face callback leaves in a checkpoint, and takes up on any number of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from onlinesel.callbacks._shared.belonging import check_settings, warn_of_no_state
from onlinesel.callbacks._shared.checkpoint import load_selections, save_selection
from onlinesel.callbacks._shared.record import reference_kind, trainer_settings
from onlinesel.callbacks.hf.checks import refuse
from onlinesel.selector import Selector
from onlinesel.types import Strategy

__all__ = ["record_facts", "resume_run", "run_facts", "save_run", "trained_steps"]


def run_facts(callback: Any, strategy: Strategy) -> dict[str, Any]:
    """Return the settings of a callback that a checkpoint is held against."""
    mixture = callback.mixture
    return {
        "strategy": repr(strategy),
        "candidates": callback.candidates,
        "scope": callback.scope,
        "normalize": callback.normalize,
        "ids": callback.ids,
        "seed": callback.seed,
        "groups": callback.groups,
        "mixture": None if mixture is None else repr(mixture),
    }


def record_facts(callback: Any) -> dict[str, Any]:
    """Return what the record of a run says of it, in which its arm and its seeds are found."""
    strategy, trainer = callback.selector.strategy, callback.trainer
    return {
        **run_facts(callback, strategy),
        "name": type(strategy).__name__,
        "shadow": callback.shadow or None,
        "reference": reference_kind(callback._reference),
        "trainer_seed": trainer.args.seed,
        "settings": trainer_settings(trainer),
    }


def trained_steps(checkpoint: str) -> int:
    """Return the optimizer steps that a trainer's checkpoint has trained."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_bytes())
    return int(state["global_step"])


def save_run(
    folder: str, selector: Selector, domains: Any, facts: dict[str, Any], rank: int | None
) -> None:
    """Write the state of a run.

    Args:
        folder: The checkpoint.
        selector: The selector.
        domains: The sampler of a mixture, or None.
        facts: The callback's settings, with ``world_size`` and ``data``.
        rank: Process that the state belongs to, None if all hold the same.
    """
    state = selector.state_dict()
    tensors, facts = state["tensors"], facts | {"step": state["step"]}
    if domains is not None:
        mixed = domains.state_dict()
        moved = mixed.pop("tensors")
        tensors = tensors | {f"domains.{name}": value for name, value in moved.items()}
        facts["domains"] = mixed
    if not rank:
        _remove_others(Path(folder), None if rank is None else facts["world_size"])
    save_selection(folder, tensors, facts, rank=rank)


def _remove_others(folder: Path, processes: int | None) -> None:
    """Remove states that another number of processes left in a folder that is written again.

    Args:
        folder: The checkpoint; may not be there yet.
        processes: How many have a state of their own now, None if all share one.
    """
    for file in folder.glob("selection*"):
        found = re.fullmatch(r"selection(?:-rank(\d+))?\.(?:json|safetensors)", file.name)
        if found is None:
            continue
        stays = processes is None if found[1] is None else int(found[1]) < (processes or 0)
        if not stays:
            file.unlink()


def resume_run(
    checkpoint: str,
    selector: Selector,
    domains: Any,
    settings: dict[str, Any],
    rank: int | None,
    world_size: int,
) -> dict[str, Any] | None:
    """Take up the state of a run.

    Where another number of ranks decided each for itself, a rank takes the memory and the
    generator of the old rank of its number, counted round; what the strategy remembers by id is
    united from all of them, and ranks that there were not keep their fresh generator.

    Args:
        checkpoint: The folder.
        selector: As it was built for this rank.
        domains: The sampler of a mixture, or None.
        settings: What the checkpoint's facts must agree with.
        rank: This process, None if all hold the same state.
        world_size: Number of processes.

    Returns:
        The facts, None if the checkpoint has no selection.

    Raises:
        ValueError: Files are missing or damaged, or belong to other settings.
    """
    states = load_selections(checkpoint, rank=rank, world_size=world_size)
    if not states:
        warn_of_no_state("OnlineSelection", checkpoint)
        return None
    step = states[0][1]["step"]
    for _, facts in states:
        check_settings(refuse, facts, settings | {"step": step}, checkpoint)
    me = rank or 0
    tensors, facts = states[me % len(states)]
    if len(states) == 1 and (rank is None or facts["world_size"] == world_size):
        selector.load_state_dict(_state(tensors, facts))
    else:
        selector.load_states([_state(*state) for state in states], me, world_size)
    if domains is not None:
        start = "domains."
        mixed = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        domains.load_state_dict({**facts["domains"], "tensors": mixed})
    return facts


def _state(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    return {"strategy": facts["strategy"], "step": facts["step"], "tensors": tensors}
