"""One name for one thing in every host: old names warn, and names of other hosts are explained."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["OF_OTHER_HOSTS", "OF_THE_TRAINER", "spelled"]

OF_THE_TRAINER = {
    "mixture": "Pass order=DomainSampler(domains, mixture), of onlinesel.mixing.",
    "shadow": "Only the Trainer's OnlineSelection watches without a change; Uniform() trains all.",
    "scorer": "It is called score.",
    "record_text": "Rows are not decoded here: no tokenizer is known. Their ids are recorded.",
}
"""Arguments that transformers' Trainer alone has, with what to do elsewhere."""

OF_OTHER_HOSTS = {
    "order": "The trainer's own sampler counts; write mixture= for domains.",
    "accumulate": "gradient_accumulation_steps of the training arguments counts.",
}
"""Arguments that transformers' Trainer has not, with what to do there."""

P = ParamSpec("P")
R = TypeVar("R")


def spelled(
    owner: str, *, old: Mapping[str, str] | None = None, elsewhere: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function or ``__init__`` be called with names that it had, or that other hosts have.

    Type checkers see the names of today alone.

    Args:
        owner: Name used in messages.
        old: New names by those they had; an old one warns for one version.
        elsewhere: What to do instead, by names of arguments that other hosts have.

    Example:
        >>> @spelled("f", elsewhere={"mixture": "Pass order=."})
        ... def f(order: int = 0) -> int:
        ...     return order
        >>> f(order=3)
        3
        >>> f(mixture=1)
        Traceback (most recent call last):
        ValueError: f: mixture must be left out, got 1. Pass order=.
    """
    old, elsewhere = dict(old or {}), dict(elsewhere or {})

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            named: dict[str, Any] = given
            for name in named.keys() & elsewhere.keys():
                raise ValueError(
                    f"{owner}: {name} must be left out, got {named[name]!r}. {elsewhere[name]}"
                )
            for name in named.keys() & old.keys():
                new = old[name]
                if new in named:
                    raise ValueError(
                        f"{owner}: {new} must be given once, got {name} as well. Leave {name} out: "
                        f"it is the old name of {new}."
                    )
                warnings.warn(
                    f"{owner}: {name} is called {new} now; the old name goes in the next version.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                named[new] = named.pop(name)
            return function(*args, **given)

        return call

    return decorate
