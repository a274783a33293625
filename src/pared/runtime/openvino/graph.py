"""A model's call that OpenVINO runs, within the model's own object."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pared.errors import ModelError, reason_of
from pared.model.contents import Contents, same
from pared.runtime.graphs.call_kinds import Bound
from pared.runtime.graphs.capturing.capture import Captured
from pared.runtime.graphs.graph import FiniteInputs, fits
from pared.runtime.onnx.engines import OpenVinoSession
from pared.runtime.openvino.conversion import Result, contents_for, converted

_OLDEST: Final = (2025, 0)


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
class _Compiled:
    """A captured call with the numbers of a model, compiled once for each number of threads."""

    contents: Contents
    graph: Any
    leaves: tuple[object, ...]
    sessions: dict[int, OpenVinoSession] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def session(self, threads: int) -> OpenVinoSession:
        with self.lock:
            if threads not in self.sessions:
                self.sessions[threads] = OpenVinoSession(self.graph, threads)
            return self.sessions[threads]


# `fit` makes the same model to time it, to measure it and to return it: what was made of a call and these numbers
# serves again as long as the capture lives.
_COMPILED: Final[WeakKeyDictionary[Captured, list[_Compiled]]] = WeakKeyDictionary()


def _compiled(model: nn.Module, captured: Captured) -> _Compiled:
    contents = contents_for(model, captured)
    known = _COMPILED.setdefault(captured, [])
    for one in known:
        if same(one.contents, contents):
            return one
    made = _Compiled(contents, *converted(model, captured, contents))
    made.session(torch.get_num_threads())  # what cannot be compiled is not kept
    known.append(made)
    return made


class OpenVinoGraph:
    """A model's call as a graph of OpenVINO with the model's codes; several threads may run it at once.

    It is compiled again for another number of threads, and shared with other models of the same numbers.

    Args:
        model: the quantized model, or a submodel of it.
        captured: a call of a float model of the same architecture; it is not changed.

    Attributes:
        note: that of the capture.

    Raises:
        ModelError: OpenVINO cannot run the graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.note = captured.note
        self._sizes = captured.inputs
        self._outputs = captured.outputs
        self._finite = FiniteInputs()
        try:
            _check_version()
            self._compiled = _compiled(model, captured)
        except Exception as error:  # whatever the runtime makes of a graph costs this form, not the user's call
            raise ModelError(
                f"OpenVINO cannot run it: {reason_of(error)}", where="graph", remedy="Nothing needs to be done."
            ) from error

    def _session(self) -> OpenVinoSession:
        return self._compiled.session(torch.get_num_threads())

    def fits(self, bound: Bound) -> bool:
        """Whether the graph was captured for inputs of these sizes."""
        return fits(self._sizes.values(), bound)

    def __call__(self, bound: Bound) -> Any:
        """The model's output.

        Raises:
            NotFiniteError: NaN or Inf, which the modules answer in floats.
        """
        self._finite.check(bound)
        tensors = [value for value in bound.values() if type(value) is Tensor]
        results = self._session().run(dict(zip(self._sizes, tensors, strict=True)))
        leaves = [results[one.place] if isinstance(one, Result) else one for one in self._compiled.leaves]
        return self._outputs.of(leaves, bound)
