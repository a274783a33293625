"""LSTMs on int8 weights, all steps of a sequence in one call of ONNX Runtime's `DynamicQuantizeLSTM`.

It puts the inputs of all steps, and the states of each step, on one grid of their range, so that the samples of a batch
would change each other's results. Therefore both ranges are held fixed. A state gets two more units that stay at 1 and
-1 whatever happens: the gates' biases hold them there, and no weight reads them. An input gets two more columns, with
weights of zero, at the ends of its calibrated range. Gates and cells are floats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from pared.errors import reason_of
from pared.formats.activation import Range
from pared.runtime.kernels.fbgemm.recurrent import Weights
from pared.runtime.kernels.machine import available as products_available
from pared.runtime.kernels.machine import exact_products
from pared.runtime.kernels.onnxruntime.graph import INPUTS, OUTPUTS, graph_of
from pared.runtime.kernels.onnxruntime.session import Sessions


@dataclass(frozen=True, eq=False)
class Ran:
    """What a sequence gave.

    Args:
        out: float32 (steps, batch, directions * hidden): the outputs of all steps.
        last: the last hidden state and the last cell state, as the first ones were given.
        energies: float32 (batch,): the sum of the squares of each sample's input.
        peaks: float32 (batch,): the largest magnitude of each sample's outputs.
    """

    out: Tensor
    last: list[Tensor]
    energies: Tensor
    peaks: Tensor


class Lstm:
    """All layers of an LSTM; several threads may run it at once.

    Args:
        weights: the one or two directions of each layer, one layer after the other.
        layers: the number of layers.
        span: the range of the input; what is beyond it is cut.
    """

    def __init__(self, weights: Sequence[Weights], layers: int, span: Range) -> None:
        ways = len(weights) // layers
        self._sessions = Sessions(graph_of([weights[i : i + ways] for i in range(0, len(weights), ways)], span))

    def run(self, x: Tensor, state: Sequence[Tensor]) -> Ran:
        """Run a whole sequence through all layers.

        Args:
            x: float32 (steps, batch, inputs). If one sample is not finite, no sample's result is right.
            state: the first hidden state, within -1..1, and the first cell state: float32 (layers * directions, batch,
                hidden).
        """
        given = dict(zip(INPUTS, (x, *state), strict=True))
        out, hidden, cell, energies, peaks = self._sessions.run(given, OUTPUTS)
        return Ran(out, [hidden, cell], energies, peaks)


@functools.cache
def available() -> str:
    """Why this kernel cannot run here, in words; empty if it can.

    >>> available() == "" or "ONNX Runtime" in available() or "int8" in available() or "oneDNN" in available()
    True
    """
    if reason := products_available():
        return reason
    if not exact_products():
        return "ONNX Runtime's int8 products are not exact on this processor"
    if missing := [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]:
        return f"ONNX Runtime is not tried, as the package {missing[0]} is not installed"
    codes = torch.ones(4, 1, dtype=torch.int8, device="cpu")
    steps = torch.ones(4, dtype=torch.float32, device="cpu")
    zero = torch.zeros(1, 1, 1, dtype=torch.float32, device="cpu")
    try:
        Lstm([Weights((codes, codes), (steps, steps))], 1, Range(-1.0, 1.0)).run(zero, (zero, zero))
    except Exception as error:  # noqa: BLE001  # whatever another version makes of the graph costs this kernel only
        return f"ONNX Runtime cannot run it: {reason_of(error)}"
    return ""
