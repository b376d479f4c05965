"""Wrapping methods of one instance, and putting back what was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["overridden", "restore", "restore_all", "take_off", "wrap"]

_MISSING = object()


@contextmanager
def overridden(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of one instance, and leave its ``__dict__`` afterwards as it was."""
    before = {name: owner.__dict__.get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        restore(owner, before)


def restore(owner: Any, before: Mapping[str, Any]) -> None:
    """Put instance attributes back; those that were the class's own are taken off."""
    for name, value in before.items():
        if value is _MISSING:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = value


def take_off(callback: Any, before: Mapping[str, Any]) -> None:
    """Take a callback off its trainer, whose methods are then its own again."""
    trainer = callback.trainer
    restore(trainer, before)
    if callback in trainer.callback_handler.callbacks:
        trainer.remove_callback(callback)


def restore_all(before: list[tuple[Any, dict[str, Any]]]) -> None:
    """Put back what :func:`wrap` returned of several instances, the last first."""
    while before:
        restore(*before.pop())


def wrap(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Put methods over an instance's; returns what :func:`restore` needs."""
    before = {name: owner.__dict__.get(name, _MISSING) for name in methods}
    owner.__dict__.update(methods)
    return before
