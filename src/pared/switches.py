"""What holds for the whole process, changed for a while: any number of threads may do so at once, and nothing is left.

Where a change can be kept to one thread, it is. Where it cannot, the first that needs it makes it and the last one
takes it back; or one thread waits for the other.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

ValueT = TypeVar("ValueT")

CAPTURING: Final = threading.RLock()  # held while torch captures a graph, which it says to all threads
DRAWING: Final = threading.RLock()  # held while the state of random numbers, or a model's mode, is put back in the end
_ENGINE: Final = threading.Lock()


class Switch(Generic[ValueT]):
    """A setting of the process that has another value while anyone is inside.

    Args:
        read: the setting.
        write: the setting.
        value: that it has inside.
    """

    def __init__(self, read: Callable[[], ValueT], write: Callable[[ValueT], object], value: ValueT) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.Lock()
        self._inside = 0
        self._before = value

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._read()
                self._write(self._value)
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._write(self._before)


def quiet_loggers(names: Sequence[str], level: int) -> Switch[list[int]]:
    """Loggers that say less inside. A logger may be in two of these switches if nobody is in both at once.

    Args:
        names: of the loggers.
        level: of what is still said.
    """
    loggers = [logging.getLogger(name) for name in names]

    def write(levels: list[int]) -> None:
        for logger, one in zip(loggers, levels, strict=True):
            logger.setLevel(one)

    return Switch(lambda: [logger.level for logger in loggers], write, [level] * len(loggers))


def _fast_paths() -> bool:
    import torch

    return torch.backends.mha.get_fastpath_enabled()


def _set_fast_paths(enabled: bool) -> None:
    import torch

    torch.backends.mha.set_fastpath_enabled(enabled)


# Inside, transformer layers call their parts, whose inputs would be unseen in one fused operator.
WITHOUT_FAST_PATHS: Final = Switch(_fast_paths, _set_fast_paths, False)


@contextlib.contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Let torch pack quantized weights for this engine; one thread at a time.

    Args:
        name: "onednn" or "fbgemm".
    """
    import torch

    with _ENGINE:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@contextlib.contextmanager
def ignoring(category: type[Warning] = Warning, message: str = "") -> Iterator[None]:
    """Ignore warnings in this thread, and in no other.

    `warnings.catch_warnings` replaces the filters of all threads, and where two overlap, those of the first are put
    back last. Here one filter is added and taken away again, and it only knows warnings of its own thread.

    Args:
        category: of the warnings.
        message: a regular expression for the beginning of their text; default: any text.
    """
    thread = threading.get_ident()

    class Here(type):
        def __subclasscheck__(cls, other: type) -> bool:
            return threading.get_ident() == thread and issubclass(other, category)

    found = Here("InThisThread", (Warning,), {})
    entry = ("ignore", re.compile(message, re.IGNORECASE) if message else None, found, None, 0)
    filters: Any = warnings.filters
    filters.insert(0, entry)
    try:
        yield
    finally:
        current: Any = warnings.filters
        for one in (filters, current):  # another list while somebody is in catch_warnings, who puts back the first
            one[:] = [other for other in one if other is not entry]
