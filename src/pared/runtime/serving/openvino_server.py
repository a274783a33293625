"""A model's calls answered by OpenVINO, where that was measured to be fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing import kept
from pared.runtime.openvino import compiled
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.serving.graph_server import Executable, GraphServer
from pared.runtime.serving.server import Capture


class OpenVinoServer(GraphServer):
    """Answers calls with graphs that run in OpenVINO, each converted at the first call of its kind.

    Its kernels round codes elsewhere than ours, so that both are about as far from each other as from floats.
    """

    tolerance: ClassVar[float] = 3e-2

    def _executable(self, model: nn.Module, arguments: Sequence[Argument], captured: Capture) -> Executable:
        def made() -> OpenVinoGraph:
            return OpenVinoGraph(model, captured(self._skeleton(model), arguments))

        if self._captured is not kept.captured:  # `fit` tries many models, most of them only once
            return made()
        return compiled.kept(model, self._skeleton(model), arguments, made)
