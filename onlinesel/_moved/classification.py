"""Moved to :mod:`onlinesel.scoring.classification`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.scoring.classification")
