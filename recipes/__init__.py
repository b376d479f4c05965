"""Runs from end to end, each a module with its measured result in the header.

Start one with `python -m onlinesel.recipes.<name>`; this package itself imports nothing.
"""
