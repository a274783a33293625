"""Values that are too large to send: what is sent says how another process opens them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakKeyDictionary

ValueT_co = TypeVar("ValueT_co", covariant=True)


class Opener(Protocol[ValueT_co]):
    """Opens a value where it is called. It can be pickled, unless the value is this process's alone."""

    @property
    def memory(self) -> int:
        """The most bytes that the value takes."""

    def __call__(self) -> AbstractContextManager[ValueT_co]:
        """The value, until the context ends."""


_OPENERS: Final[WeakKeyDictionary[Any, Opener[Any]]] = WeakKeyDictionary()


@contextmanager
def sendable(value: Any, opener: Opener[Any]) -> Iterator[None]:
    """Remember, until the context ends, how other processes open a value.

    Args:
        value: any object that can be hashed and referred to weakly, such as a model.
        opener: gives what is equal to it.
    """
    _OPENERS[value] = opener
    try:
        yield
    finally:
        del _OPENERS[value]


def opener_of(value: Any) -> Opener[Any] | None:
    """How other processes open a value; None if they cannot."""
    return _OPENERS.get(value)
