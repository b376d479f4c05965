"""Moved to :mod:`onlinesel.data.order`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.data.order")
