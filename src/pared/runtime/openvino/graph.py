"""A model's call that OpenVINO runs, within the model's own object."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Final
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pared.errors import ModelError, reason_of
from pared.model.contents import Contents, same
from pared.runtime.graphs.call_kinds import Bound
from pared.runtime.graphs.capturing.capture import Captured, Size
from pared.runtime.graphs.capturing.kept import Checks
from pared.runtime.graphs.capturing.outputs import Outputs
from pared.runtime.graphs.graph import FiniteInputs, fits
from pared.runtime.onnx.engines import OpenVinoSession
from pared.runtime.openvino.caches.inside import Inside, is_joined, kept_inside
from pared.runtime.openvino.caches.session import CachedSession
from pared.runtime.openvino.conversion import Result, contents_for, converted
from pared.switches import threads_asked

_OLDEST: Final = (2025, 0)
_ANY: Final = -1  # as OpenVINO writes a size that may vary


def is_installed() -> bool:
    """Whether there may be graphs in OpenVINO here."""
    return find_spec("openvino") is not None


def _check_version() -> None:
    version = metadata.version("openvino")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        raise ModelError(
            f"version {version} is installed, and {'.'.join(map(str, _OLDEST))} is the oldest that is known to work",
            where="OpenVINO",
            remedy="pip install --upgrade 'pared[fast]'",
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """What a graph is besides what runs.

    Args:
        note: that of the capture.
        sizes: the sizes of each input, by its name.
        outputs: turns leaves into the model's output.
        leaves: constants, and the places of results.
        inside: which numbers of caches it keeps; None if callers give all of them.
    """

    note: str
    sizes: Mapping[str, tuple[Size, ...]]
    outputs: Outputs
    leaves: tuple[object, ...]
    inside: Inside | None = None


class _Sessions:
    """What runs a graph, compiled once for each number of threads.

    Args:
        graph: makes the graph of OpenVINO, for a number of threads that is not compiled yet.
        inside: which numbers of caches it keeps, if it does.
    """

    def __init__(self, graph: Callable[[], Any], inside: Inside | None) -> None:
        self.graph, self.inside = graph, inside
        self.known: dict[int, OpenVinoSession] = {}
        self._lock = threading.Lock()

    def here(self) -> OpenVinoSession:
        """That for as many threads as torch has now."""
        threads = threads_asked()
        with self._lock:
            if threads not in self.known:
                self.known[threads] = self.session(self.graph(), threads)
            return self.known[threads]

    def session(self, model: Any, threads: int) -> OpenVinoSession:
        """That of a graph, or of what was compiled of it."""
        if self.inside is None:
            return OpenVinoSession(model, threads)
        return CachedSession(model, threads, self.inside)


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A captured call with the numbers of a model."""

    contents: Contents
    leaves: tuple[object, ...]
    sessions: _Sessions


# `fit` makes the same model to time it, to measure it and to return it: what was made of a call and these numbers
# serves again as long as the capture lives.
_COMPILED: Final[WeakKeyDictionary[Captured, list[_Compiled]]] = WeakKeyDictionary()


def _compiled(model: nn.Module, captured: Captured) -> _Compiled:
    contents = contents_for(model, captured)
    known = _COMPILED.setdefault(captured, [])
    for one in known:
        if same(one.contents, contents):
            return one
    graph, leaves = converted(model, captured, contents)
    made = _Compiled(contents, leaves, _sessions(graph, captured))
    made.sessions.here()  # what cannot be compiled is not kept
    known.append(made)
    return made


def _sessions(graph: Any, captured: Captured) -> _Sessions:
    """What runs a graph; it keeps caches if that saves copying them."""
    shapes = {name: [_ANY if one.fixed is None else one.fixed for one in own] for name, own in captured.inputs.items()}
    found = kept_inside(graph, shapes)
    if found is not None:
        keeping, inside = found
        sessions = _Sessions(lambda: keeping, inside)
        if is_joined(sessions.here(), inside):
            return sessions
    return _Sessions(lambda: graph, None)


class OpenVinoGraph:
    """A model's call as a graph of OpenVINO with the model's codes; several threads may run it at once.

    It is compiled again for another number of threads, and shared with other models of the same numbers.

    Args:
        model: the quantized model, or a submodel of it.
        captured: a call of a float model of the same architecture; it is not changed.

    Attributes:
        note: that of the capture.
        parts: what it is besides what was compiled.
        checks: the calls for which it is known to be right.

    Raises:
        ModelError: OpenVINO cannot run the graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        try:
            _check_version()
            made = _compiled(model, captured)
        except Exception as error:  # whatever the runtime makes of a graph costs this form, not the user's call
            raise ModelError(
                f"OpenVINO cannot run it: {reason_of(error)}", where="graph", remedy="Nothing needs to be done."
            ) from error
        parts = Parts(captured.note, captured.inputs, captured.outputs, made.leaves, made.sessions.inside)
        self._begin(parts, made.sessions)

    @classmethod
    def again(cls, parts: Parts, threads: int, compiled: bytes, made: Callable[[], OpenVinoGraph]) -> OpenVinoGraph:
        """A graph whose parts outlived the process in which it was made.

        Args:
            parts: its parts.
            threads: the number of threads for which it was compiled.
            compiled: what was compiled.
            made: makes the graph from the model, for another number of threads.
        """
        _check_version()
        found = object.__new__(cls)
        sessions = _Sessions(lambda: made()._sessions.graph(), parts.inside)
        sessions.known[threads] = sessions.session(compiled, threads)
        found._begin(parts, sessions)
        return found

    def _begin(self, parts: Parts, sessions: _Sessions) -> None:
        self.parts, self.note, self._sessions = parts, parts.note, sessions
        self._finite, self.checks = FiniteInputs(), Checks()

    def compiled(self) -> bytes:
        """What was compiled for the number of threads of now."""
        return self._sessions.here().compiled()

    def fits(self, bound: Bound) -> bool:
        """Whether the graph was captured for inputs of these sizes."""
        return fits(self.parts.sizes.values(), bound)

    def __call__(self, bound: Bound) -> Any:
        """The model's output.

        Raises:
            NotFiniteError: NaN or Inf, which the modules answer in floats.
        """
        session, names = self._sessions.here(), [name for name, value in bound.items() if type(value) is Tensor]
        given = dict(zip(self.parts.sizes, (bound[name] for name in names), strict=True))
        known = session.known(given)
        self._finite.check({name: bound[name] for name, place in zip(names, given, strict=True) if place not in known})
        results = session.run(given)
        leaves = [results[one.place] if isinstance(one, Result) else one for one in self.parts.leaves]
        return self.parts.outputs.of(leaves, bound)
