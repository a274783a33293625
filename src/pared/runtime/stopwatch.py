"""How long things take: several forms of one computation, or whatever happens between two moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import torch

FormT = TypeVar("FormT")

# The fastest of many runs counts, because a busy machine slows whole stretches of time: at least 5 runs, and for short
# ones up to 200 until 0.06 seconds have passed. One run before these warms caches and packs weights.
_LEAST_RUNS: Final = 5
_MOST_RUNS: Final = 200
_SECONDS: Final = 0.06
_WARM_UP: Final = 1

# After this number of runs, a form that takes more than this multiple of the fastest's time is timed no more. After a
# single run none is given up: that run may have been disturbed.
_HOPELESS: Final = {2: 2.0, 3: 1.5}


class Stopwatch:
    """Adds up the seconds between each `start` and the `stop` after it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self) -> None:
        """Start, or go on."""
        self.seconds -= time.perf_counter()

    def stop(self) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


def fastest_ms(forms: Mapping[FormT, Callable[[], object]]) -> dict[FormT, float]:
    """The shortest time of each of several functions, in milliseconds; they run in turn, without gradients."""
    best = dict.fromkeys(forms, math.inf)
    with torch.inference_mode():
        begin = time.perf_counter()
        for attempt in range(_WARM_UP + _MOST_RUNS):
            bound = _HOPELESS.get(min(attempt - _WARM_UP, max(_HOPELESS)), math.inf) * min(best.values())
            for form, run in forms.items():
                if best[form] > bound:
                    continue
                start = time.perf_counter()
                run()
                if attempt >= _WARM_UP:
                    best[form] = min(best[form], time.perf_counter() - start)
            if attempt >= _WARM_UP + _LEAST_RUNS and time.perf_counter() - begin > _SECONDS:
                break
    return {form: 1e3 * seconds for form, seconds in best.items()}
