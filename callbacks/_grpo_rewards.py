"""Guard reward functions: an error on one rank becomes the same error on all of them.

The trainer gathers the rewards of all ranks; a rank whose reward function raised would never come
to that gather, and the others would wait for it until the process group gives up.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from onlinesel.distributed import world_size

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
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004
        ):

            async def guarded_async(**kwargs: Any) -> Any:
                try:
                    given = await asyncio.wait_for(function(**kwargs), self.timeout)
                    return self._checked(given, kwargs)
                except Exception as error:
                    return self._note(name, error, kwargs)

            return guarded_async

        def guarded(**kwargs: Any) -> Any:
            try:
                call = function if self.timeout is None else self._timed(function)
                return self._checked(call(**kwargs), kwargs)
            except Exception as error:
                return self._note(name, error, kwargs)

        return guarded

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function run in a thread that is left behind if it takes too long."""

        def timed(**kwargs: Any) -> Any:
            answer: Future[Any] = Future()

            def call() -> None:
                try:
                    answer.set_result(function(**kwargs))
                except Exception as error:  # handed to the thread that waits
                    answer.set_exception(error)

            threading.Thread(target=call, daemon=True).start()
            return answer.result(self.timeout)

        return timed

    @staticmethod
    def _checked(given: Any, kwargs: dict[str, Any]) -> Any:
        expected = len(kwargs["completions"])
        if given is None or len(given) != expected:
            found = "None" if given is None else f"{len(given)} rewards"
            raise TypeError(f"{found} instead of one reward for each of {expected} completions")
        return given

    def _note(self, name: str, error: BaseException, kwargs: dict[str, Any]) -> list[None]:
        self._errors.append((name, error))
        return [None] * len(kwargs["completions"])

    def check(self) -> None:
        """Raise on every rank what any rank met; called by all ranks after the rewards.

        Raises:
            RuntimeError: A reward function failed, with its error as the cause on its rank.
        """
        mine = [(name, f"{type(error).__name__}: {error}") for name, error in self._errors]
        found = gather_object([mine]) if world_size() > 1 else [mine]
        cause = self._errors[0][1] if self._errors else None
        self._errors = []
        for rank, errors in enumerate(found):
            for name, what in errors:
                raise RuntimeError(
                    f"RolloutSelection: reward function '{name}' must return one reward for each "
                    f"completion, got {what} on rank {rank}. Return None for a completion that "
                    "cannot be scored."
                ) from cause
