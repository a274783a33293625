"""The ONNX file of an LSTM, with the columns and units that hold its grids fixed; `lstm` says what for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from pared.formats.activation import Range
from pared.runtime.kernels.fbgemm.recurrent import ENDS, KEEPING, SATURATED, Weights, with_columns, with_units

INPUTS: Final = ("x", "h", "c")
OUTPUTS: Final = ("y", "h_last", "c_last", "energies", "peaks")

# The runtime's gates are input, output, forget and cell; PyTorch's are input, forget, cell and output.
_ORDER: Final = (0, 3, 1, 2)
_OPSET: Final = 17  # of 2022
_IR: Final = 8


class _Graph:
    """Operators and constants, as they are added."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._numpy = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self._numpy.from_array(value.contiguous().numpy(), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(torch.tensor(values, dtype=torch.int64, device="cpu"))

    def add(self, kind: str, inputs: Sequence[str], names: Sequence[str] = (), **options: Any) -> list[str]:
        """An operator, by the names of its outputs; default: one, of any name."""
        made = list(names) or [f"node_{len(self.nodes)}"]
        self.nodes.append(self._helper.make_node(kind, list(inputs), made, **options))
        return made

    def widened(self, source: str, ends: Sequence[float]) -> str:
        """One more number after those of the last of three dimensions for each of the ends."""
        for end in ends:
            value = self.constant(torch.tensor(end, dtype=torch.float32, device="cpu"))
            (source,) = self.add("Pad", [source, self.integers(0, 0, 0, 0, 0, 1), value])
        return source

    def part(self, source: str, start: int, end: int, axis: int, names: Sequence[str] = ()) -> str:
        return self.add("Slice", [source, *map(self.integers, (start, end, axis))], names)[0]


def graph_of(layers: Sequence[Sequence[Weights]], span: Range) -> bytes:
    """All layers of an LSTM, each of one or two directions, as an ONNX file from `INPUTS` to `OUTPUTS`."""
    from onnx import TensorProto, helper

    ways, hidden = len(layers[0]), layers[0][0].codes[1].shape[1]
    units, count = hidden + len(ENDS), len(layers) * ways
    graph = _Graph()
    ends = [graph.constant(torch.tensor(end, dtype=torch.float32, device="cpu")) for end in (span.low, span.high)]
    source = graph.widened(graph.add("Clip", ["x", *ends])[0], (span.low, span.high))
    states = [graph.widened(name, [end * by for end in ENDS]) for name, by in (("h", 1.0), ("c", SATURATED))]
    last: list[list[str]] = [[], []]
    for layer, weights in enumerate(layers):
        numbers = []
        for which in (0, 1):
            packed = [_packed(one, which, ways if layer and not which else 1) for one in weights]
            codes, steps = (torch.stack(parts) for parts in zip(*packed, strict=True))
            zeros = torch.zeros(steps.shape, dtype=torch.int8, device="cpu")
            numbers.append([graph.constant(one) for one in (codes, steps, zeros)])
        (w, *of_w), (r, *of_r) = numbers
        bias = graph.constant(torch.stack([_bias(one) for one in weights]))
        first = [graph.part(one, layer * ways, (layer + 1) * ways, 0) for one in states]
        y, *ends_of = graph.add(
            "DynamicQuantizeLSTM",
            [source, w, r, bias, "", *first, "", *of_w, *of_r],
            [f"{name}_of_{layer}" for name in OUTPUTS[:3]],
            domain="com.microsoft",
            hidden_size=units,
            direction="bidirectional" if ways > 1 else "forward",
        )
        for parts, one in zip(last, ends_of, strict=True):
            parts.append(one)
        is_last = layer + 1 == len(layers)
        width = hidden if is_last else units  # what reads this layer needs its units at the ends as well
        y = graph.part(y, 0, width, 3)
        (moved,) = graph.add("Transpose", [y], perm=[0, 2, 1, 3])  # to (steps, batch, directions, units)
        shape = graph.integers(0, 0, ways * width)
        (source,) = graph.add("Reshape", [moved, shape], OUTPUTS[:1] if is_last else ())
    for name, parts in zip(OUTPUTS[1:3], last, strict=True):
        graph.part(graph.add("Concat", parts, axis=0)[0], 0, hidden, 2, [name])
    graph.add("ReduceSumSquare", ["x"], OUTPUTS[3:4], axes=[0, 2], keepdims=0)
    graph.add("ReduceMax", graph.add("Abs", [source]), OUTPUTS[4:], axes=[0, 2], keepdims=0)
    state: list[str | int | None] = [count, "batch", hidden]
    samples: list[str | int | None] = ["batch"]
    given: list[list[str | int | None]] = [["steps", "batch", layers[0][0].codes[0].shape[1]], state, state]
    gives: list[list[str | int | None]] = [["steps", "batch", ways * hidden], state, state, samples, samples]

    def described(names: Sequence[str], shapes: Sequence[list[str | int | None]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(names, shapes, strict=True)
        ]

    versions = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(graph.nodes, "lstm", described(INPUTS, given), described(OUTPUTS, gives), graph.constants)
    file: bytes = helper.make_model(made, opset_imports=versions, ir_version=_IR).SerializeToString()
    return file


def _packed(weights: Weights, which: int, ways: int) -> tuple[Tensor, Tensor]:
    """Codes (inputs, gates * units) and steps (gates * units) of one of the weights, in the runtime's order."""
    codes = with_columns(_ordered(with_units(weights.codes[which], 4)), ways)
    return codes.t(), _ordered(with_units(weights.steps[which].float(), 4))


def _bias(weights: Weights) -> Tensor:
    zero = torch.zeros(len(weights.steps[0]), dtype=torch.float32, device="cpu")
    both = [_ordered(with_units(zero if one is None else one.detach().float(), 4)) for one in weights.biases]
    hidden = weights.codes[1].shape[1]
    kept = torch.tensor([KEEPING[4][gate] for gate in _ORDER], dtype=torch.float32, device="cpu")
    both[0].view(4, -1)[:, hidden:] = kept[:, None]
    return torch.cat(both)


def _ordered(rows: Tensor) -> Tensor:
    """Rows of all gates in the runtime's order."""
    found: Tensor = rows.unflatten(0, (4, -1))[list(_ORDER)].flatten(0, 1)
    return found
