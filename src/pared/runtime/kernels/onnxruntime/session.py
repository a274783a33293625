"""A graph in ONNX Runtime, opened for each number of threads and in each process: its threads do not survive a fork."""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from pared.switches import end_idle_threads

_ERRORS: Final = 3  # and no warnings
_UNREPORTED: Final = "ORT_DISABLE_TELEMETRY"


@contextmanager
def unreported() -> Iterator[None]:
    """Import ONNX Runtime inside without the thread that reports its use: a forked process waits for it at its end."""
    before = os.environ.get(_UNREPORTED)
    os.environ[_UNREPORTED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_UNREPORTED]
        else:
            os.environ[_UNREPORTED] = before


class Sessions:
    """A graph that several threads may run at once.

    Args:
        graph: the bytes of an ONNX file.
    """

    def __init__(self, graph: bytes) -> None:
        self._graph = graph
        self._known: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        _ALIVE.add(self)

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """The outputs of these names, for inputs on the CPU by their names."""
        end_idle_threads()
        arrays = {name: tensor.detach().resolve_neg().numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(array) for array in self._here().run(outputs, arrays)]

    def _here(self) -> Any:
        """That for as many threads as torch has now."""
        key = os.getpid(), torch.get_num_threads()
        found = self._known.get(key)
        if found is None:
            with self._lock:
                found = self._known.get(key)
                if found is None:
                    found = self._known[key] = self._opened(key[1])
        return found

    def _opened(self, threads: int) -> Any:
        with unreported():
            onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = _ERRORS
        # Threads that wait by running would take the processors that torch computes the next layer with.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])

    def stay(self) -> None:
        """Never free what was opened in a parent process: that would wait for threads that are gone."""
        for one in self._known.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
        self._lock = threading.Lock()


_ALIVE: Final[weakref.WeakSet[Sessions]] = weakref.WeakSet()


def _after_fork() -> None:
    for sessions in list(_ALIVE):
        sessions.stay()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
