"""Adapters for trainers, one module a framework: the only place that imports one.

Import the module you need, always by its full name (`from onlinesel.callbacks.hf import ...`);
this package itself imports nothing.
"""
