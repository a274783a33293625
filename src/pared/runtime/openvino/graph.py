"""A model's call that OpenVINO runs, within the model's own object."""

from __future__ import annotations

import re
import threading
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import ModelError, reason_of
from pared.runtime.graphs.call_kinds import Bound
from pared.runtime.graphs.capturing.capture import Captured
from pared.runtime.graphs.graph import FiniteInputs, fits
from pared.runtime.onnx.engines import OpenVinoSession
from pared.runtime.openvino.conversion import Result, converted

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


class OpenVinoGraph:
    """A model's call as a graph of OpenVINO with the model's codes; several threads may run it at once.

    It is compiled again for another number of threads.

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
        self._sessions: dict[int, OpenVinoSession] = {}  # by the number of threads
        self._lock = threading.Lock()
        self._finite = FiniteInputs()
        try:
            _check_version()
            self._graph, self._leaves = converted(model, captured)
            self._session()
        except Exception as error:  # whatever the runtime makes of a graph costs this form, not the user's call
            raise ModelError(
                f"OpenVINO cannot run it: {reason_of(error)}", where="graph", remedy="Nothing needs to be done."
            ) from error

    def _session(self) -> OpenVinoSession:
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = OpenVinoSession(self._graph, threads)
            return self._sessions[threads]

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
        leaves = [results[one.place] if isinstance(one, Result) else one for one in self._leaves]
        return self._outputs.of(leaves, bound)
