"""A model's calls answered by OpenVINO, where that was measured to be fastest."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pared.runtime.graphs.capturing.capture import Captured
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.serving.graph_server import Executable, GraphServer


class OpenVinoServer(GraphServer):
    """Answers calls with graphs that run in OpenVINO, each converted at the first call of its kind.

    Its kernels round codes elsewhere than ours, so that both are about as far from each other as from floats.
    """

    tolerance: ClassVar[float] = 3e-2

    def _executable(self, model: nn.Module, captured: Captured) -> Executable:
        return OpenVinoGraph(model, captured)
