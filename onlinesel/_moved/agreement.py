"""Moved to :mod:`onlinesel.parallel.agreement`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.parallel.agreement")
