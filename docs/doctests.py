"""An extension of mkdocstrings: examples at the end of a docstring (`>>> ...`) get a section, shown as code."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts the heading that griffe looks for above the first `>>>`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is None:
            return
        lines = obj.docstring.value.splitlines()
        first = next((index for index, line in enumerate(lines) if line.startswith(">>>")), None)
        if first is not None:
            examples = [f"    {line}".rstrip() for line in lines[first:]]
            obj.docstring.value = "\n".join([*lines[:first], "Examples:", *examples])
