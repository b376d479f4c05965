"""Guard reward functions: an error on one rank becomes the same error on all of them.

The trainer gathers the rewards of all ranks; a rank whose reward function raised would never come
to that gather, and the others would wait for it until the process group gives up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import is_async_callable

from onlinesel.parallel.distributed import world_size

__all__ = ["RewardGuard"]


class RewardGuard:
    """Run reward functions so that none can stop a single rank.

    Args:
        timeout: Seconds that one call may take; None for no bound.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._errors: list[tuple[str, BaseException]] = []

    def wrap(self, functions: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """Return the functions, guarded; reward models are left as they are."""
        return [
            function if isinstance(function, nn.Module) else self._guarded(function, name)
            for function, name in zip(functions, names, strict=True)
        ]

    def _guarded(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        if is_async_callable(function):

            async def guarded_async(**kwargs: Any) -> Any:
                try:
                    given = await asyncio.wait_for(function(**kwargs), self.timeout)
                    return self._checked(_listed(given), kwargs)
                except Exception as error:
                    return self._note(name, error, kwargs)

            return guarded_async

        def guarded(**kwargs: Any) -> Any:
            def rewards(**kwargs: Any) -> Any:
                return _listed(function(**kwargs))

            try:
                call = rewards if self.timeout is None else self._timed(rewards)
                return self._checked(call(**kwargs), kwargs)
            except Exception as error:
                return self._note(name, error, kwargs)

        return guarded

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function run in a thread that is left behind if it takes too long."""

        def timed(**kwargs: Any) -> Any:
            answer: Future[Any] = Future()
            device = torch.cuda.current_device() if torch.cuda.is_available() else None

            def call() -> None:
                try:
                    if device is not None:
                        torch.cuda.set_device(device)  # a new thread begins on the first one
                    answer.set_result(function(**kwargs))
                except Exception as error:  # handed to the thread that waits
                    answer.set_exception(error)

            threading.Thread(target=call, daemon=True).start()
            try:
                return answer.result(self.timeout)
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {self.timeout} seconds") from error

        return timed

    @staticmethod
    def _checked(given: list[Any] | None, kwargs: dict[str, Any]) -> list[Any]:
        expected = len(kwargs["completions"])
        if given is None or len(given) != expected:
            found = "None" if given is None else f"{len(given)} rewards"
            raise TypeError(f"{found} instead of one reward for each of {expected} completions")
        # What cannot become a tensor would raise later, on this rank alone.
        torch.tensor([torch.nan if value is None else float(value) for value in given])
        return given

    def _note(self, name: str, error: BaseException, kwargs: dict[str, Any]) -> list[None]:
        """Keep an error for :meth:`check`, which all ranks reach, and score nothing until then."""
        self._errors.append((_function(name), error))
        return [None] * len(kwargs["completions"])

    def number(self, what: str, rule: Callable[..., Any], *args: Any) -> float:
        """Return what a rule says about one completion, nan for None; an error is kept."""
        try:
            said = rule(*args)
            return float("nan") if said is None else float(said)
        except Exception as error:
            self._errors.append((f"{what} must be a number or None for each completion", error))
            return float("nan")

    def check(self) -> None:
        """Raise on every rank what any rank met; called by all ranks after the rewards.

        Raises:
            RuntimeError: A reward function failed, with its error as the cause on its rank.
        """
        mine = [(rule, f"{type(error).__name__}: {error}") for rule, error in self._errors]
        found = gather_object([mine]) if world_size() > 1 else [mine]
        cause = self._errors[0][1] if self._errors else None
        self._errors = []
        for rank, errors in enumerate(found):
            for rule, what in errors:
                raise RuntimeError(
                    f"RolloutSelection: {rule}, got {what} on rank {rank}. Mend it; for a "
                    "completion that cannot be scored it may return None."
                ) from cause


def _listed(given: Any) -> list[Any] | None:
    """Return rewards as a list; a generator computes them only here."""
    return None if given is None else list(given)


def _function(name: str) -> str:
    return f"reward function '{name}' must return one reward for each completion"
