"""A model's call that OpenVINO runs, within the model's own object."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from pared.errors import ModelError, reason_of
from pared.runtime.graphs.call_kinds import Bound
from pared.runtime.graphs.capturing.capture import Captured
from pared.runtime.graphs.graph import fits
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.openvino.conversion import converted
from pared.runtime.record import contents_of


def missing() -> str:
    """Why there are no graphs in OpenVINO here, in words; empty if there may be."""
    return "" if find_spec("openvino") else "it is not installed: pip install 'pared[fast]'"


class OpenVinoGraph:
    """A model's call as a graph of OpenVINO with the model's codes; several threads may run it at once.

    Args:
        model: the quantized model, a whole one.
        captured: a call of a float model of the same architecture; it is not changed.

    Attributes:
        note: that of the capture.

    Raises:
        ModelError: OpenVINO is not installed, or cannot run the graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.note = captured.note
        self._sizes = tuple(captured.inputs.values())
        self._structure = captured.outputs
        self._threads = torch.get_num_threads()
        self._local = threading.local()
        try:
            import openvino

            graph, self._leaves = converted(captured, contents_of(model))
            options = {
                "INFERENCE_NUM_THREADS": self._threads,
                # In float32: its default is bfloat16 on processors that have it.
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
            }
            self._compiled = openvino.Core().compile_model(graph, "CPU", options)
        except Exception as error:  # whatever the runtime makes of a graph costs this form, not the user's call
            raise ModelError(
                f"OpenVINO cannot run it: {reason_of(error)}", where="graph", remedy="Nothing needs to be done."
            ) from error
        order = list(captured.inputs)
        self._order = [order.index(one.get_node().get_friendly_name()) for one in self._compiled.inputs]

    def fits(self, bound: Bound) -> bool:
        """Whether the graph was captured for inputs of these sizes, and made for this number of threads."""
        return self._threads == torch.get_num_threads() and fits(self._sizes, bound)

    def __call__(self, bound: Bound) -> Any:
        """The model's output.

        Raises:
            NotFiniteError: NaN or Inf, which the modules answer in floats.
        """
        tensors = [value for value in bound.values() if type(value) is Tensor]
        if not all(torch.linalg.vector_norm(one).isfinite() for one in tensors if one.is_floating_point()):
            raise NotFiniteError
        if not hasattr(self._local, "request"):  # a request serves one thread at a time
            self._local.request = self._compiled.create_infer_request()
        given = [tensors[place].detach().contiguous().numpy() for place in self._order]
        found = self._local.request.infer(given, share_inputs=True)
        results = [torch.from_numpy(found[output]) for output in self._compiled.outputs]
        leaves = [results[one[0]] if isinstance(one, tuple) else one for one in self._leaves]
        return tree_unflatten(leaves, self._structure)
