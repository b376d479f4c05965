"""Moved to :mod:`onlinesel.data.randomness`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.data.randomness")
