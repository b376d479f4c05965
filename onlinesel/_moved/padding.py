"""Moved to :mod:`onlinesel.data.padding`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.data.padding")
