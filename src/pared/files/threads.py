"""Work divided among threads, which run at once while zlib and NumPy work: those release Python's lock."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

_TURNS: Final = 64  # of each thread: to hand over a single item takes longer than most small items do
_SMALL: Final = 1024  # numbers, or bytes: work on fewer keeps Python's lock nearly all of the time

_MOST: Final = contextvars.ContextVar[int | None]("most", default=None)

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """The number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST.get() or cores)


@contextmanager
def at_most(cores: int) -> Iterator[None]:
    """Use at most this number of cores while the context lasts: others have work, too.

    >>> with at_most(1):
    ...     usable_cores()
    1
    """
    token = _MOST.set(cores)
    try:
        yield
    finally:
        _MOST.reset(token)


def each(
    work: Callable[[T], R], items: Sequence[T], sizes: Sequence[int] | None = None, most: int | None = None
) -> list[R]:
    """Call a function for every item, in threads; its results in the order of the items.

    The threads live for this call only: a pool that outlives it would be broken after a fork.

    Args:
        work: called with one item.
        items: the arguments.
        sizes: the numbers or bytes of each; the largest begin first, and where most are small there are no threads.
            Default: all take equally long.
        most: the largest number of threads; default: one for each core that this process may use.

    >>> each(abs, [-2, 1, -3], sizes=[2, 1, 3])
    [2, 1, 3]
    """
    threads = min(most or usable_cores(), len(items))
    if threads <= 1 or (sizes is not None and sum(sizes) < _SMALL * len(items)):
        return [work(item) for item in items]
    order = range(len(items)) if sizes is None else sorted(range(len(items)), key=lambda i: -sizes[i])
    turns = [order[first :: _TURNS * threads] for first in range(min(_TURNS * threads, len(items)))]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda turn: [work(items[i]) for i in turn], turns))
    done = {
        i: result for turn, results in zip(turns, found, strict=True) for i, result in zip(turn, results, strict=True)
    }
    return [done[i] for i in range(len(items))]


def apart(work: Callable[[], R]) -> R:
    """Call a function in a thread of its own, and wait for its result, or for what it raises.

    OpenMP ties its pool of threads to the thread that first computed in parallel. A fork copies the calling thread and
    none of the pool's: the child would never stop waiting for them. The pool of a thread that has ended is gone, so
    who calls this may fork afterwards.

    >>> apart(lambda: 1 + 1)
    2
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, work).result()
