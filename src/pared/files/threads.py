"""Work shared out to threads: what runs in zlib and numpy does not hold Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    work: Callable[[T], R], items: Sequence[T], sizes: Sequence[int] | None = None, most: int | None = None
) -> list[R]:
    """The work done for every item; the results in the items' order.

    The threads live for this call only: no wait for threads that a fork lost, or that others hold.

    Args:
        work: called with one item.
        items: what there is to do.
        sizes: how much each is; the largest is begun first, so that no core waits for the last. Default: all equal.
        most: at most so many threads; default: one for each core that this process may use.

    >>> each(abs, [-2, 1, -3], sizes=[2, 1, 3])
    [2, 1, 3]
    """
    threads = min(most or usable_cores(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    order = range(len(items)) if sizes is None else sorted(range(len(items)), key=lambda i: -sizes[i])
    with ThreadPoolExecutor(threads) as pool:
        done = dict(zip(order, pool.map(lambda i: work(items[i]), order), strict=True))
    return [done[i] for i in range(len(items))]
