"""Moved to :mod:`onlinesel.scoring.loss_probe`."""

from onlinesel._moved import alias

__all__: list[str] = []

alias(__name__, "onlinesel.scoring.loss_probe")
