"""Settings of the whole process, changed for a while by any number of threads at once, and restored afterwards.

A change is kept to one thread where that is possible. Otherwise the first thread that needs it makes it and the last
one undoes it; or one thread waits for the other.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import gc
import logging
import os
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from torch import nn

ValueT = TypeVar("ValueT")

CAPTURING: Final = threading.RLock()  # held while torch captures a graph, a state that all threads see
DRAWING: Final = threading.RLock()  # held while random numbers are drawn, or a model's mode is changed, and restored
_ENGINE: Final = threading.Lock()


class Switch(Generic[ValueT]):
    """A setting of the process, as `read` and `write` see it, that has another value while any thread is inside."""

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


def quiet_loggers(names: Sequence[str], level: int) -> Switch[Mapping[str, int] | int]:
    """A switch inside which loggers and those below them have this level, whatever their own was.

    Two switches with a logger in common must not overlap in time.
    """

    def loggers() -> dict[str, logging.Logger]:
        # Those without a level of their own have that of the logger above. Each change of a level walks through all
        # loggers of the process, of which some libraries have thousands.
        known = dict(logging.root.manager.loggerDict)
        wanted = {name for name, one in known.items() if isinstance(one, logging.Logger) and one.level and below(name)}
        return {name: logging.getLogger(name) for name in {*names, *wanted}}

    def below(name: str) -> bool:
        return any(name.startswith(f"{one}.") for one in names)

    def write(levels: Mapping[str, int] | int) -> None:
        if isinstance(levels, int):
            levels = dict.fromkeys(loggers(), levels)
        for name, one in levels.items():
            logging.getLogger(name).setLevel(one)

    return Switch(lambda: {name: logger.level for name, logger in loggers().items()}, write, level)


def _fast_paths() -> bool:
    import torch

    return torch.backends.mha.get_fastpath_enabled()


def _set_fast_paths(enabled: bool) -> None:
    import torch

    torch.backends.mha.set_fastpath_enabled(enabled)


# Inside, transformer layers call their submodules; in one fused operator the inputs of those could not be observed.
WITHOUT_FAST_PATHS: Final = Switch(_fast_paths, _set_fast_paths, False)


def _set_thresholds(thresholds: tuple[int, int, int]) -> None:
    if gc.get_threshold()[0]:  # 0: collections are switched off
        gc.set_threshold(*thresholds)


_MANY_TENSORS: Final = 1_000
_RARELY: Final = Switch(gc.get_threshold, _set_thresholds, (50_000, 10, 10))  # the first: new objects


def rare_collections(tensors: int) -> contextlib.AbstractContextManager[None]:
    """Let Python look for unreachable objects less often while there are many tensors.

    A model of thousands of tensors is hundreds of thousands of objects, each copy of it as many again. Python would
    look through all of them every few copies, which takes a fourth of the time of a fit.
    """
    return _RARELY if tensors > _MANY_TENSORS else contextlib.nullcontext()


_ASKED: Final = threading.local()  # how many threads there are outside of `threads`, by the thread that is inside


def threads_asked() -> int:
    """The number of threads that the user lets torch compute with, from this thread; also inside `threads`."""
    import torch

    asked: int | None = getattr(_ASKED, "threads", None)
    return torch.get_num_threads() if asked is None else asked


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with this number of threads, where it is called from this thread, and from no other."""
    import torch

    before, outer = torch.get_num_threads(), getattr(_ASKED, "threads", None)
    everywhere = threads_asked()

    def set_here(number: int) -> None:
        # OpenMP and MKL keep a number for each thread. Torch also keeps one for threads that have not computed yet,
        # which is set again from one of those: it stays as it was.
        torch.set_num_threads(number)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.set_num_threads, everywhere).result()

    _ASKED.threads = everywhere
    set_here(count)
    try:
        yield
    finally:
        set_here(before)
        _ASKED.threads = outer


def end_idle_threads() -> None:
    """Let the threads end that torch computed with for this one, when another runtime is to compute with its own.

    After each parallel loop OpenMP's threads wait for the next one by running in a circle, for several milliseconds,
    and other threads find their processors taken. Torch starts new ones when it needs them, in less than a tenth of a
    millisecond. Where torch was built without OpenMP 5, nothing happens.
    """
    import torch

    pause = _pause_of(torch._C.__file__)
    if pause is not None and torch.get_num_threads() > 1 and not _FORKED:
        pause(_SOFT)


_SOFT: Final = 1  # omp_pause_soft: what programs have set stays
_FORKED: Final[list[bool]] = []  # empty, but in a child, where the threads are gone: OpenMP would wait for their end
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))


@functools.cache
def _pause_of(library: str) -> Any:
    """OpenMP's function that ends idle threads, as a library's dependencies have it; None if none does."""
    try:
        return ctypes.CDLL(library).omp_pause_resource_all
    except (AttributeError, OSError):
        return None


_DEVICE: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("device", default="cpu")


def device() -> str:
    """The kind of device that the costly parts of a fit are to be computed on, from this thread: "cpu" or "cuda"."""
    return _DEVICE.get()


@contextlib.contextmanager
def computing_on(kind: str) -> Iterator[None]:
    """Let them be computed there, in this thread."""
    before = _DEVICE.set(kind)
    try:
        yield
    finally:
        _DEVICE.reset(before)


@contextlib.contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Let torch prepare quantized weights for "onednn" or "fbgemm"; one thread at a time."""
    import torch

    with _ENGINE:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of torch (on all devices), NumPy and Python at the end: they are the user's."""
    import numpy as np
    import torch

    drawn = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


@contextlib.contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; the training flags of their modules are restored at the end. Hold `DRAWING` meanwhile."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def ignoring(category: type[Warning] = Warning, message: str = "") -> Iterator[None]:
    """Ignore warnings in this thread, and in no other.

    `warnings.catch_warnings` replaces the filters of all threads, and when two overlap, the first may restore its
    filters last. Here one filter is added and removed again, and it matches only in its own thread.

    Args:
        category: the class of the warnings; default: all.
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
        for known in (filters, current):  # these differ while another thread is in catch_warnings
            known[:] = [other for other in known if other is not entry]
