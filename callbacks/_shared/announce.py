"""What a run says about itself: one line when it starts, and one when it ends.

The lines go to the logger ``onlinesel``. Where nobody has set up logging they appear on standard
error; ``logging.getLogger("onlinesel").setLevel("WARNING")`` turns them off.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from torch import nn

from onlinesel.data.loader import CandidateLoader
from onlinesel.types import Strategy

__all__ = [
    "counted",
    "epoch_steps",
    "forwards_of",
    "opening",
    "percent",
    "rollout_opening",
    "say",
    "scoring_share",
]

_LOGGER = logging.getLogger("onlinesel")


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to standard error as it is at the moment, and not when the handler was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def say(line: str) -> None:
    """Write a line to the log of the program, or to standard error where it has none."""
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.INFO)
    if _LOGGER.hasHandlers():
        _LOGGER.info(line)
        return
    handler = _StandardError()
    _LOGGER.addHandler(handler)
    try:
        _LOGGER.info(line)
    finally:
        _LOGGER.removeHandler(handler)


def opening(
    strategy: Strategy,
    model: nn.Module,
    *,
    candidates: int,
    rows: int | None,
    steps: int | None,
    without: int | None,
    ids: str,
    reference: object = None,
    own_scorer: bool = False,
    checkpointing: bool = False,
    reused: bool = False,
    shadow: bool = False,
) -> str:
    """Return the line with which a run starts.

    Args:
        strategy: The method.
        model: What trains.
        candidates: Candidates for each row that trains.
        rows: Rows that train in a step, over all processes; None where a loader does not tell.
        steps: Optimizer steps of an epoch; None without a length.
        without: Optimizer steps of an epoch without selection.
        ids: How rows are told apart.
        reference: Where reference losses come from.
        own_scorer: Whether the user's own function scores.
        checkpointing: Whether activations are computed again.
        reused: Whether the scoring forward is the training forward.
        shadow: Whether all rows train, whatever is chosen.

    Example:
        >>> from onlinesel.strategies import TopLoss
        >>> counts = {"rows": 8, "candidates": 4, "steps": 25, "without": 100}
        >>> print(opening(TopLoss(), nn.Linear(2, 2), **counts, ids="row numbers"))
        TopLoss trains 8 of 32 candidate rows a step; an epoch has 25 steps instead of 100; ids: \
row numbers; scoring is about 57 % of the work of a step
    """
    if shadow:
        what = f"would train 1 in {candidates} rows, and all of them train (shadow)"
    elif rows is None:
        what = (
            f"trains 1 in {candidates} candidate rows" if candidates > 1 else "decides about rows"
        )
    elif candidates > 1:
        what = f"trains {rows} of {rows * candidates} candidate rows a step"
    else:
        what = f"decides about the {rows} rows of a step"
    epoch = "the length of an epoch is not known"
    if steps is not None:
        epoch = f"an epoch has {counted(steps, 'step')}"
        epoch += ", as without" if steps == without else f" instead of {without:,}"
    cost = _cost(
        strategy, model, candidates=1 if shadow else candidates, rows=rows, reference=reference,
        own_scorer=own_scorer, checkpointing=checkpointing, reused=reused,
    )  # fmt: skip
    return f"{type(strategy).__name__} {what}; {epoch}; ids: {ids}; {cost}"


def rollout_opening(trainer: Any, parts: Mapping[str, Any]) -> str:
    """Return the line with which a GRPO run starts.

    Args:
        trainer: TRL's.
        parts: The callback's, by the name of their argument.
    """
    gate, refill, prompts = (parts[name] for name in ("gate", "refill", "prompts"))
    size, dataset = trainer.num_generations, trainer.train_dataset
    groups = trainer.args.generation_batch_size // size
    source = f"{counted(groups, 'problem')} of a stream"
    if hasattr(dataset, "__len__"):
        source = f"{groups:,} of {counted(len(dataset), 'problem')}"
    chosen = "in the loader's order" if prompts is None else f"chosen by {type(prompts).__name__}"
    others = [type(p).__name__ for n, p in parts.items() if p is not None and n != "refill"]
    line = (
        f"{' + '.join(others) or 'GRPO'}: a generation batch is {source}, {chosen}, "
        f"with {size} completions each; an epoch has as many steps as without; "
        "ids: row numbers; "
    )
    if gate is None:
        return f"{line}every group trains"
    line += f"{type(gate).__name__} drops groups that were generated"
    if refill is None or not refill.max_rounds:
        return f"{line}, and nothing takes their place"
    return f"{line}, and up to {counted(refill.max_rounds, 'further call')} take their place"


def _cost(
    strategy: Strategy,
    model: nn.Module,
    *,
    candidates: int,
    rows: int | None,
    reference: object,
    own_scorer: bool,
    **how: bool,
) -> str:
    """Return what scoring is expected to cost, in words."""
    if rows is not None and not _suffice(strategy, rows * candidates):
        return "no scoring: so few rows are all weighed alike"
    forwards = forwards_of(strategy.needs, reference)
    if own_scorer:
        forwards = min(forwards, 1)
    if not forwards:
        return "no scoring"
    share = scoring_share(model, candidates=candidates, forwards=forwards, **how)
    cost = f"scoring is about {percent(share)} of the work of a step"
    return f"{cost}, if your scorer is one forward" if own_scorer else cost


def _suffice(strategy: Strategy, rows: int) -> bool:
    """Return whether so many candidates are enough for the method to read its signals."""
    asked = strategy.needs_at(0)
    return not asked or bool(strategy.needs_for(0, rows))


def percent(share: float) -> str:
    """Return a share as whole per cent."""
    return f"{100 * share:.0f} %"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def forwards_of(needs: Sequence[str], reference: object) -> int:
    """Return how many forwards score a candidate.

    Args:
        needs: Signals that the method reads.
        reference: A model or ``"adapter"``, which forward as well, or a column, which does not.
    """
    computed = [name for name in needs if name not in ("ids", "tokens", "group", "reference_loss")]
    compared = "reference_loss" in needs and (
        isinstance(reference, nn.Module) or reference == "adapter"
    )
    return bool(computed) + compared


def scoring_share(
    model: nn.Module, *, candidates: int, forwards: int, checkpointing: bool, reused: bool
) -> float:
    """Return the part of a step that scoring takes, in counted work.

    A forward of a row is one, its backward one for the states and one more for the weights as far
    as they train, and checkpointing forwards once more. What a reused forward saves is counted.

    Args:
        model: Tells how much of it trains.
        candidates: Candidates for each row that trains.
        forwards: That score a candidate.
        checkpointing: Whether activations are computed again.
        reused: Whether rows that train have been forwarded when they were scored.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    training = sum(size for size, trains in sizes if trains) / max(sum(s for s, _ in sizes), 1)
    train = 2 + training + checkpointing
    scoring = max(candidates * forwards - (reused and forwards > 0), 0)
    return scoring / (scoring + train)


def epoch_steps(reader: CandidateLoader) -> tuple[int | None, int | None]:
    """Return the optimizer steps of an epoch, and how many it would have without selection."""
    try:
        steps = len(reader)
    except TypeError:
        return None, None
    plain = copy.copy(reader)  # that is never read, only asked for its length
    plain.candidates = 1
    dataset: Any = getattr(reader.loader, "dataset", None)
    if reader.order is not None and dataset is not None:
        plain.order = range(len(dataset))
    return steps, len(plain)
