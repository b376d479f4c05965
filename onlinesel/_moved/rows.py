"""Moved to :mod:`onlinesel.data.rows`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.data.rows")
