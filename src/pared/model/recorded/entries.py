"""Entries of dictionaries, such as the tensors, submodules and attributes of modules, as they were at one time."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any


class Entries:
    """Remembers what dictionaries hold under some of their keys.

    All that is done for each entry is done in C: this is asked at every call of a model, of hundreds of entries.

    Args:
        entries: each a dictionary, a key, and what it holds there; None stands for a missing key, too.
    """

    def __init__(self, entries: Iterable[tuple[dict[str, Any], str, object]]) -> None:
        known = list(entries)
        self._held = [held for held, _, _ in known]
        self._keys = [key for _, key, _ in known]
        self._values = [value for _, _, value in known]

    def are_as_they_were(self) -> bool:
        """Whether each dictionary still holds the very same object.

        >>> held = {"a": "x"}
        >>> entries = Entries([(held, "a", held["a"])])
        >>> before = entries.are_as_they_were()
        >>> held["a"] = "y"
        >>> before, entries.are_as_they_were()
        (True, False)
        """
        return all(map(is_, map(dict.get, self._held, self._keys), self._values))
