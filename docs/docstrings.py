"""Docstrings as the reference shows them: roles are code, and examples are blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # the plural alone has its doctests shown as code


class Docstrings(griffe.Extension):
    """Rewrite every docstring before it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring."""
        if not obj.is_alias and obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
