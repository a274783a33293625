"""How long things take: several forms of one computation, or whatever happens between two moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from pared.errors import reason_of

FormT = TypeVar("FormT")
_TASKS: Final = Path("/proc/self/task")

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
# After the run of another form, numbers and code have left the caches, and the threads of a runtime sleep.
_SHORT_RUN: Final = 2e-3  # seconds
_IN_A_ROW: Final = 3

# After this number of runs besides the first, a form that takes more than this multiple of the fastest's time is timed
# no more. After a single run none is given up: that run may have been disturbed.
_HOPELESS: Final = {1: 5.0, 2: 2.0, 3: 1.5}

# A machine is busy if it gives this process less than one processor for this share of the time, or if the process waits
# for processors this much longer than it runs on them. Its own threads may wait for each other, too.
_BUSY: Final = 1.25
_BUSY_WAITING: Final = 0.5

# A run was disturbed if threads of this process that could run did not for this share of the time. (Several threads of
# a disturbed run took at least the time of one, and at most that of the clock.)
_DISTURBED: Final = 0.05
_UNDISTURBED_RUNS: Final = 2  # of each form that may be fastest, or else as many as there is time for on a busy machine


@dataclass
class Spent:
    """Seconds of the clock, and of processors working for this process: with several threads more than of the clock.

    Args:
        clock: seconds of the clock.
        processor: seconds of all threads on processors, those of other runtimes included.
        waited: seconds in which threads could run and others did, of all threads together; 0 where no system tells.
    """

    clock: float = 0.0
    processor: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(self.clock + other.clock, self.processor + other.processor, self.waited + other.waited)

    @property
    def is_busy(self) -> bool:
        """Whether other processes were given the processor meanwhile."""
        return self.clock > _BUSY * self.processor or self.waited > _BUSY_WAITING * self.processor

    @property
    def is_disturbed(self) -> bool:
        """Whether the clock says more than the work took."""
        return self.clock > _BUSY * self.processor or self.waited > _DISTURBED * self.clock

    def least(self, threads: int) -> float:
        """The least seconds that the work can have taken with this number of threads.

        >>> Spent(3.0, 4.0).least(2), Spent(6.0, 4.0, 5.0).least(2)
        (3.0, 2.0)
        """
        return self.processor / threads if self.is_disturbed else self.seconds

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
        waited = waited_seconds()
        clock, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.clock += time.perf_counter() - clock
            self.processor += time.process_time() - processor
            self.waited += max(0.0, waited_seconds() - waited)  # threads may have ended


def waited_seconds() -> float:
    """How long the threads of this process have waited for a processor that other threads had; 0 but on Linux."""
    total = 0
    try:
        for thread in _TASKS.iterdir():
            total += int((thread / "schedstat").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):  # another system, or a thread that has ended
        return total / 1e9
    return total / 1e9


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
    forms: Mapping[FormT, Callable[[], object]],
    warm: Mapping[FormT, float] = MappingProxyType({}),
    *,
    in_a_row: bool = False,
) -> dict[FormT, float]:
    """The shortest time of each of several functions, in milliseconds; they run in turn, without gradients.

    What other processes were given meanwhile does not count, so far as that is known: see `Spent`. Of disturbed runs of
    several threads only bounds are known, so that none of them is given up for the upper one.

    Args:
        forms: the functions.
        warm: those that have run before, with the seconds of a run like the later ones; infinite: that is not known.
        in_a_row: make a short run again at once, as a model is called again and again, and a layer in it is not.

    Raises:
        FormError: one of them raised an exception.
    """
    threads = torch.get_num_threads()
    best = {form: warm.get(form, math.inf) for form in forms}
    least = dict(best)  # lower bounds
    undisturbed = dict.fromkeys(forms, 0)
    total = Spent()
    with torch.no_grad():  # a model may take gradients in its own forward, as of an energy: no `inference_mode`
        for attempt in range(_WARM_UP + _MOST_RUNS):
            runs = attempt - _WARM_UP  # of each, besides the first
            fastest = min(best.values())
            bound = _HOPELESS.get(min(runs, max(_HOPELESS)), math.inf) * fastest
            most = max(_LONG_RUN, _FAR * fastest)
            hopeless = {form for form in warm if most < least.get(form, 0.0) < math.inf}
            left = [form for form in forms if least[form] <= bound and form not in (warm if runs < 0 else hopeless)]
            if runs >= _RUNS_OF_THE_LAST and len(left) == 1 < len(forms):
                break
            for form in left:
                quiet = False
                for _ in range(_IN_A_ROW if in_a_row and best[form] < _SHORT_RUN else 1):
                    spent = Spent()
                    try:
                        with spent.adding():
                            forms[form]()
                    except Exception as error:
                        raise FormError(form) from error
                    total += spent
                    best[form] = min(best[form], spent.seconds)
                    least[form] = min(least[form], spent.least(threads))
                    quiet |= not spent.is_disturbed
                undisturbed[form] += runs >= 0 and quiet
            is_known = all(undisturbed[form] >= _UNDISTURBED_RUNS for form in left)
            if _is_enough(runs, sum(best.values()), total, is_known=is_known or threads == 1):
                break
    return {form: 1e3 * seconds for form, seconds in best.items()}


def _is_enough(runs: int, each: float, total: Spent, *, is_known: bool) -> bool:
    """Whether this number of runs, besides the first and one more, tells what is fastest.

    Args:
        runs: their number, of each form that is left.
        each: the seconds of one run of all forms.
        total: what all runs took.
        is_known: whether there are undisturbed runs of all forms that are left, or none are needed.
    """
    if runs < 0:
        return False
    if total.seconds > _LONG_SECONDS or (is_known and runs + 1 >= _FEW_RUNS and each > _ENOUGH_SECONDS):
        return True
    busy = total.is_busy or not is_known
    return runs >= _LEAST_RUNS and total.clock > (_BUSY_SECONDS if busy else _SECONDS)


def times_of(
    forms: dict[str, Callable[[], Any] | str],
    warm: Mapping[str, float] = MappingProxyType({}),
    *,
    in_a_row: bool = False,
) -> dict[str, float] | None:
    """The shortest time of each form, in milliseconds; the reason takes the place of a form that raises an exception.

    Args:
        forms: the forms, or why there is none.
        warm: those that have run before, with the seconds of a run like the later ones; infinite: that is not known.
        in_a_row: see `fastest_ms`.

    Returns:
        None if it is the form "float32" that raises one.
    """
    try:
        runs = {name: form for name, form in forms.items() if not isinstance(form, str)}
        return fastest_ms(runs, warm, in_a_row=in_a_row)
    except FormError as error:
        forms[str(error.form)] = reason_of(error.__cause__ or error)
        return None if error.form == "float32" else times_of(forms, warm, in_a_row=in_a_row)


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
