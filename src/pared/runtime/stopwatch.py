"""How long things take: forms of one computation, timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

# The best of many runs is compared: at least so many, and for short ones until so many seconds have passed, since a
# busy machine slows whole stretches of time. Runs before these warm caches and pack weights.
_LEAST_RUNS: Final = 5


_MOST_RUNS: Final = 200


_SECONDS: Final = 0.06


_WARM_UP: Final = 1


# Times the fastest, by the runs that a form had: what is slower is timed no more. One run may have been disturbed.
_HOPELESS: Final = {2: 2.0, 3: 1.5}


def fastest_ms(forms: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """The shortest time of each of several functions, in milliseconds; they run in turns, without gradients."""
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
