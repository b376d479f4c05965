"""Moved to :mod:`onlinesel._base.host`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel._base.host")
