"""How long things take: several forms of one computation, or whatever happens between two moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from pared.errors import reason_of

FormT = TypeVar("FormT")

# The fastest of many runs counts, because a busy machine slows whole stretches of time: at least 5 runs, and for short
# ones up to 200 until 0.06 seconds have passed, or a second on a busy machine. One run before these warms caches and
# packs weights. Where three runs of all forms have taken long, they are enough, and where they take longer, one is:
# noise is a small share of them. Where one form is left, all is decided.
_LEAST_RUNS: Final = 5
_FEW_RUNS: Final = 3
_RUNS_OF_THE_LAST: Final = 2
_MOST_RUNS: Final = 200
_SECONDS: Final = 0.06
_BUSY_SECONDS: Final = 1.0
_ENOUGH_SECONDS: Final = 0.1
_LONG_RUN: Final = 0.1  # seconds, of which little can be a disturbance ...
_FAR: Final = 3.0  # ... so that one run is enough of a form that takes this many times as long as the fastest
_LONG_SECONDS: Final = 1.0
_WARM_UP: Final = 1

# After this number of runs besides the first, a form that takes more than this multiple of the fastest's time is timed
# no more. After a single run none is given up: that run may have been disturbed.
_HOPELESS: Final = {1: 5.0, 2: 2.0, 3: 1.5}

# A machine is busy if it gives this process less than one processor for this share of the time.
_BUSY: Final = 1.25


@dataclass
class Spent:
    """Seconds of the clock, and of processors working for this process: with several threads more than of the clock."""

    clock: float = 0.0
    processor: float = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether other processes were given the processor meanwhile."""
        return self.clock > _BUSY * self.processor

    @property
    def seconds(self) -> float:
        """The time without that which other processes were given: exact for one thread, a bound for several.

        >>> Spent(3.0, 1.0).seconds, Spent(3.0, 5.5).seconds
        (1.0, 3.0)
        """
        return min(self.clock, self.processor or self.clock)  # some systems count processor time in large steps

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Add what is spent inside."""
        clock, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.clock += time.perf_counter() - clock
            self.processor += time.process_time() - processor


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


class FormError(Exception):
    """One of the functions that are timed raised the exception that is the cause.

    Args:
        form: which.
    """

    def __init__(self, form: object) -> None:
        super().__init__(form)
        self.form = form


def fastest_ms(
    forms: Mapping[FormT, Callable[[], object]], warm: Mapping[FormT, float] = MappingProxyType({})
) -> dict[FormT, float]:
    """The shortest time of each of several functions, in milliseconds; they run in turn, without gradients.

    What other processes were given meanwhile does not count, so far as that is known: see `Spent`.

    Args:
        forms: the functions.
        warm: those that have run before, with the seconds of a run like the later ones; infinite: that is not known.

    Raises:
        FormError: one of them raised an exception.
    """
    best = {form: warm.get(form, math.inf) for form in forms}
    total = Spent()
    with torch.no_grad():  # a model may take gradients in its own forward, as of an energy: no `inference_mode`
        for attempt in range(_WARM_UP + _MOST_RUNS):
            runs = attempt - _WARM_UP  # of each, besides the first
            bound = _HOPELESS.get(min(runs, max(_HOPELESS)), math.inf) * min(best.values())
            most = max(_LONG_RUN, _FAR * min(best.values()))
            hopeless = {form for form in warm if most < best.get(form, 0.0) < math.inf}
            left = [form for form in forms if best[form] <= bound and form not in (warm if runs < 0 else hopeless)]
            if runs >= _RUNS_OF_THE_LAST and len(left) == 1 < len(forms):
                break
            for form in left:
                spent = Spent()
                try:
                    with spent.adding():
                        forms[form]()
                except Exception as error:
                    raise FormError(form) from error
                total.clock, total.processor = total.clock + spent.clock, total.processor + spent.processor
                best[form] = min(best[form], spent.seconds)
            if _is_enough(runs, sum(best.values()), total):
                break
    return {form: 1e3 * seconds for form, seconds in best.items()}


def _is_enough(runs: int, each: float, total: Spent) -> bool:
    """Whether so many runs besides the first and one more tell what is fastest.

    Args:
        runs: of the forms that are left.
        each: the seconds of one run of all forms.
        total: what all runs took.
    """
    if runs < 0:
        return False
    if total.seconds > _LONG_SECONDS or (runs + 1 >= _FEW_RUNS and each > _ENOUGH_SECONDS):
        return True
    return runs >= _LEAST_RUNS and total.clock > (_BUSY_SECONDS if total.is_busy else _SECONDS)


def times_of(
    forms: dict[str, Callable[[], Any] | str], warm: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float] | None:
    """The shortest time of each form, in milliseconds; the reason takes the place of a form that raises an exception.

    Args:
        forms: the forms, or why there is none.
        warm: those that have run before, with the seconds of a run like the later ones; infinite: that is not known.

    Returns:
        None if it is the form "float32" that raises one.
    """
    try:
        return fastest_ms({name: form for name, form in forms.items() if not isinstance(form, str)}, warm)
    except FormError as error:
        forms[str(error.form)] = reason_of(error.__cause__ or error)
        return None if error.form == "float32" else times_of(forms, warm)


class TooSlowError(Exception):
    """What `Patience` allows is not enough."""


class Patience(TorchFunctionMode):
    """While it is entered, an operator that comes too late raises `TooSlowError`, as a capture may take minutes.

    Args:
        seconds: the processor time in seconds that may be spent in any case.
        an_operator: seconds more for each operator.
    """

    def __init__(self, seconds: float, an_operator: float) -> None:
        super().__init__()
        self._seconds, self._an_operator = seconds, an_operator
        self._begun = time.thread_time()
        self._operators = 0

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, if there is time left."""
        if getattr(func, "__name__", "") != "__get__":  # an attribute such as `shape`
            self._operators += 1
        spent = time.thread_time() - self._begun
        if spent > self._seconds + self._an_operator * self._operators:
            raise TooSlowError(f"its first {self._operators} operators took {spent:.1f} s of processor")
        return func(*args, **(kwargs or {}))
