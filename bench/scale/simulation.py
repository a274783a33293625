"""How long tasks take on many workers, from what one task costs its worker and what it costs the driver.

Workers take one task after the other. The driver hands tasks out, a few for each worker ahead of the result that it
waits for, and takes results one at a time in the order of the tasks, as `RayExecutor.map` does.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

_AHEAD: Final = 3  # as `pared.executors.cluster` has it


@dataclass(frozen=True)
class Costs:
    """Seconds of one task.

    Args:
        work: on its worker, without what follows.
        handing: from where a worker could begin until it does, and until its result could be taken.
        driver: of the driver: handing it out, and taking its result and writing it.
    """

    work: float
    handing: float
    driver: float


def seconds(costs: Costs, tasks: int, workers: int) -> float:
    """How long it takes until the driver has written the results of all tasks."""
    free = [0.0] * workers  # when each worker is free
    heapq.heapify(free)
    done: list[float] = []  # when each task's result is there
    now = 0.0  # of the driver
    given = 0
    for taken in range(tasks):
        while given < min(tasks, taken + _AHEAD * workers):
            begin = max(now, heapq.heappop(free))
            end = begin + costs.handing + costs.work
            heapq.heappush(free, end)
            done.append(end)
            given += 1
        now = max(now, done[taken]) + costs.driver
    return now
