"""Rewrites a graph: float weights become codes and steps, and inputs are rounded to their calibrated grids."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pared.formats.activation import Activation
from pared.formats.coded import Float, dtype_name
from pared.formats.dtypes import Array
from pared.model.contents import Contents
from pared.runtime.kernels.machine import FULL_LEVELS
from pared.runtime.kernels.outliers import extra_columns
from pared.runtime.onnx.drawing import Drawing, become, onnx_name, replaced
from pared.runtime.onnx.weights.codes import Weight, find_weights, numbers_of, numpy_of, owner_of
from pared.runtime.onnx.weights.fold import Fold, fold_of
from pared.runtime.onnx.weights.grouped import DOMAIN, AccuracyLevel, GroupedWeights
from pared.runtime.onnx.weights.layout import LOWEST, along, is_misread

log = logging.getLogger(__name__)

# The input that a product multiplies with the weight, by the weight's place among the inputs.
_PRODUCTS: Final[dict[str, dict[int, int]]] = {
    "MatMul": {1: 0, 0: 1},
    "Gemm": {1: 0},
    "Conv": {1: 0},
    "ConvTranspose": {1: 0},
}

_AT_LOAD: Final = {"GRU", "LSTM", "RNN"}  # both runtimes decode these weights once, when the file is loaded


@dataclass(frozen=True)
class Rewritten:
    """What became of a model's tensors and layers.

    Args:
        coded: the names of the tensors that the graph holds as codes.
        floats: the tensors on grids that it holds as floats, each with the reason.
        activations: how layers get their inputs: "static" or "float" (integer weights only) where they may run in int8,
            and "groups" where the runtime rounds them.
    """

    coded: tuple[str, ...]
    floats: Mapping[str, str]
    activations: Mapping[str, str]


def rewrite(model: Any, contents: Contents, accuracy_level: AccuracyLevel) -> Rewritten:
    """Put codes and steps in the place of the float weights of an `onnx_ir.Model`."""
    from onnx_ir.passes import PassManager
    from onnx_ir.passes import common as passes

    grouped = GroupedWeights(model.graph, contents, accuracy_level)
    grouped.run()
    rewriter = _Rewriter(model.graph, contents, find_weights(model.graph, contents))
    rewriter.run()
    outcome = rewriter.outcome(grouped)
    if grouped.coded:
        model.opset_imports[DOMAIN] = 1
    tidying = [passes.RemoveUnusedNodesPass(), passes.TopologicalSortPass(), passes.NameFixPass()]
    PassManager([*tidying, passes.ClearMetadataAndDocStringPass()])(model)  # it would name files of this machine
    return outcome


@dataclass(eq=False)
class _Rewriter(Drawing):
    """One graph (an `onnx_ir.Graph`) while it is rewritten, with those of its values that are weights."""

    contents: Contents
    weights: Mapping[int, Weight]
    coded: set[str] = field(default_factory=set)
    static: set[str] = field(default_factory=set)
    quantized: dict[object, Any] = field(default_factory=dict)
    scaled: dict[object, Any] = field(default_factory=dict)

    def run(self) -> None:
        ends = [
            weight for weight in self.weights.values() if weight.uses(self.weights) or weight.value.is_graph_output()
        ]
        baked = {id(end) for end in ends if _is_whole(end, ends)}
        for end in ends:
            uses = end.uses(self.weights)
            rows = [(node, i) for node, i in uses if _gathers_rows(node, i)]
            for node, _ in rows:
                self._gather(end, node)
            others = [use for use in uses if use not in rows]
            if others or end.value.is_graph_output():
                self._decode(end, others, bake=id(end) in baked)
            self.coded |= {one.name for one in end.sources}
        for weight in self.weights.values():
            if weight.value.is_initializer():
                become(weight.value, weight.codes)
            elif weight.value.dtype is not None:
                weight.value.dtype = _ir().DataType.from_numpy(weight.codes.dtype)
        self._narrow()

    def _gather(self, weight: Weight, node: Any) -> None:
        """Look up rows of codes and their steps, so that only the rows that are used are decoded."""
        axes, steps = along(weight.steps)
        indices = node.inputs[1]
        picked = self.node("Gather", [weight.value, indices], {"axis": 0}, near=node)
        own = axes == (0,)
        scale = self.constant(f"{weight.name}.steps", steps if own else steps.reshape(-1)[0])
        if own:
            scale = self.node("Gather", [scale, indices], {"axis": 0}, near=node)
        floats = self.node("Cast", [picked], {"to": _ir().DataType.FLOAT}, near=node)
        out = self.node("Mul", [floats, scale], near=node)
        if weight.scales is not None:
            scales = self.constant(f"{weight.name}.scales", weight.scales[0])
            out = self.node("Mul", [out, scales], near=node)
        replaced(node.outputs[0], self._typed(out, weight))

    def _decode(self, weight: Weight, uses: list[tuple[Any, int]], *, bake: bool) -> None:
        """Decode the weight right before its products, a pattern that runtimes with int8 kernels recognize."""
        codes, steps = weight.codes, weight.steps
        fold = fold_of(uses, codes) if bake and weight.scales is None else None
        if fold is not None:
            codes, steps = fold.applied(codes, steps, uses[0][0])
        value = self.constant(f"{weight.name}.codes", codes) if bake else weight.value
        axes, found = along(steps)
        near = None if bake else weight.value.producer()
        if len(axes) > 1 or any(node.op_type in _AT_LOAD for node, _ in uses):  # no operator has steps along two axes
            # Through int32: OpenVINO keeps a cast from int8 for int8 kernels, which recurrent layers do not have, and
            # then finds no weight.
            whole = self.node("Cast", [value], {"to": _ir().DataType.INT32}, after=near)
            floats = self.node("Cast", [whole], {"to": _ir().DataType.FLOAT}, after=whole.producer())
            out = self.node("Mul", [floats, self.constant(f"{weight.name}.steps", found)], after=floats.producer())
        else:
            scale = self.constant(f"{weight.name}.steps", found.reshape(-1) if axes else found.reshape(()))
            attributes = {"axis": axes[0]} if axes else {}
            zeros = [self._zeros(weight.name, found.size, codes.dtype)] if axes else []
            out = self.node("DequantizeLinear", [value, scale, *zeros], attributes, after=near)
        plain = out
        if weight.scales is not None:
            scales = self.constant(f"{weight.name}.scales", along(weight.scales)[1])
            out = self.node("Mul", [plain, scales], after=plain.producer())
        out, plain = self._typed(out, weight), plain if weight.scales is not None else self._typed(plain, weight)
        for node, place in uses:
            if weight.scales is not None and not self._scale_input(weight, node, place):
                node.replace_input_with(place, out)
                continue
            node.replace_input_with(place, plain)
            if len(axes) < 2 and codes.dtype == np.int8:
                self._quantize_input(weight, node, place)
        if weight.value.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(weight.value)] = out
        if fold is not None:
            self._drop(fold, uses[0][0])

    def _scale_input(self, weight: Weight, node: Any, place: int) -> bool:
        """Multiply the input of a linear product by the scales of the weight's columns; whether that is possible.

        Runtimes find their int8 kernels only where nothing stands between a weight's steps and its product.
        """
        assert weight.scales is not None
        attributes = {name: one.value for name, one in node.attributes.items()}
        if node.op_type not in ("MatMul", "Gemm") or place != 1 or weight.scales.ndim != 2:
            return False
        axes, found = along(weight.scales)
        contracted = 1 if attributes.get("transB", 0) else 0
        if axes not in ((), (contracted,)) or attributes.get("transA", 0) or _dtype(weight) != "float32":
            return False
        source = node.inputs[0]
        key = (id(source), found.tobytes())
        if key not in self.scaled:
            scales = np.broadcast_to(found.reshape(-1), weight.scales.shape[contracted : contracted + 1])
            scaled = self.node("Mul", [source, self.constant(f"{weight.name}.scales", scales)], near=node)
            if is_misread(None if source.shape is None else len(source.shape)):
                scaled = self.node("Max", [scaled, self.constant("lowest", LOWEST)], near=node)
            self.scaled[key] = scaled
        node.replace_input_with(0, self.scaled[key])
        return True

    def _quantize_input(self, weight: Weight, node: Any, place: int) -> None:
        """Round the input of a static layer to its calibrated grid."""
        owner = owner_of([name for one in weight.sources for name in one.names], node)
        activation = self.contents.activations.get(owner)
        other = _PRODUCTS.get(node.op_type, {}).get(place)
        if activation is None or activation.mode != "static" or other is None or len(activation.weights) > 1:
            return  # of several weights only some read the layer's own input
        if activation.outliers and not self._add_outliers(weight, node, other, owner, activation):
            return
        source = node.inputs[other]
        scale, zero_point = activation.span.grid(FULL_LEVELS)
        key = (id(source), scale, zero_point)
        if key not in self.quantized:
            floats = self.cast(source, "float32", near=node)
            self.quantized[key] = self._rounded(floats, activation, f"{owner}.input", weight, node)
        node.replace_input_with(other, self.quantized[key])
        self.static.add(owner)

    def _rounded(self, floats: Any, activation: Activation, name: str, weight: Weight, node: Any) -> Any:
        """Floats rounded to the grid of a layer's input, in the weight's decoded type."""
        scale, zero_point = activation.span.grid(FULL_LEVELS)
        grid = [
            self.constant(f"{name}.step", np.float32(scale)),
            self.constant(f"{name}.zero", np.uint8(zero_point)),
        ]
        codes = self.node("QuantizeLinear", [floats, *grid], near=node)
        return self.cast(self.node("DequantizeLinear", [codes, *grid], near=node), _dtype(weight), near=node)

    def _add_outliers(self, weight: Weight, node: Any, other: int, owner: str, activation: Activation) -> bool:
        """Add what extra columns carry, as a product of their own; returns whether that was possible.

        A column's value less what the columns before it carry, at least zero, is rounded to the grid of the input.
        """
        if other != 0 or len(weight.sources) > 1:
            return False
        more = extra_columns(activation.outliers, activation.span, FULL_LEVELS)
        above = np.concatenate([np.full(abs(count), count > 0) for _, count in activation.outliers])
        name = f"{owner}.outliers"
        constants = {
            "columns": more.columns.numpy(),
            "signs": np.where(above, 1, -1).astype(np.float32),
            "before": np.abs(more.shift.numpy()) * np.float32(more.scale),
        }
        columns, signs, before = (self.constant(f"{name}.{key}", one) for key, one in constants.items())
        floats = self.cast(node.inputs[other], "float32", near=node)
        picked = self.node("Gather", [floats, columns], {"axis": -1}, near=node)
        away = self.node("Mul", [picked, signs], near=node)  # from zero
        left = self.node("Relu", [self.node("Sub", [away, before], near=node)], near=node)
        left = self.node("Mul", [left, signs], near=node)
        codes, steps = numbers_of(weight.sources[0])
        held = [self.constant(f"{name}.codes", codes[:, more.columns.numpy()].T), self._steps(name, steps[:, 0], node)]
        held.append(self._zeros(name, len(codes), codes.dtype))
        floats = self.node("DequantizeLinear", held, {"axis": 1}, near=node)
        given = [self._rounded(left, activation, name, weight, node), self.cast(floats, _dtype(weight), near=node)]
        out = node.outputs[0]
        users = [(use.node, use.idx) for use in out.uses()]
        total = self.node("Add", [out, self.node("MatMul", given, near=node)], after=node)
        for user, place in users:
            user.replace_input_with(place, total)
        if out.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(out)] = total
        total.shape, total.type = out.shape, out.type
        return True

    def _zeros(self, name: str, count: int, dtype: Any) -> Any:
        """Zero points of an axis, which ONNX does not need.

        For exact sums on processors without VNNI, ONNX Runtime makes weights unsigned. It then adds a zero point where
        there is none, but only one, and fails where two weights share theirs.
        """
        return self.constant(f"{name}.zeros", np.zeros(count, dtype))

    def _steps(self, name: str, steps: Array, node: Any) -> Any:
        """The steps of outputs: the constant that the node's weight already has, if it is the same."""
        decode = node.inputs[1].producer()
        known = decode.inputs[1] if decode is not None and decode.op_type == "DequantizeLinear" else None
        if known is not None and np.array_equal(known.const_value.numpy(), steps):
            return known
        return self.constant(f"{name}.steps", steps)

    def _drop(self, fold: Fold, node: Any) -> None:
        bias = self.constant(f"{node.name}.bias", fold.bias)
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        replaced(fold.node.outputs[0], node.outputs[0])

    def _narrow(self) -> None:
        """Hold floats in the narrower type that the artifact has them in, and cast them."""
        by_name = {name: one for one in self.contents.tensors for name in one.names}
        for value in list(self.graph.initializers.values()):
            stored = by_name.get(value.name)
            if stored is None or not isinstance(stored.coded.format, Float):
                continue
            if stored.coded.format.dtype == dtype_name(stored.coded.dtype) or value.dtype is None:
                continue
            if value.dtype.name != onnx_name(dtype_name(stored.coded.dtype)) or value.is_graph_output():
                continue
            uses = [(use.node, use.idx) for use in value.uses()]
            wide = self.node("Cast", [value], {"to": value.dtype})
            for node, place in uses:
                node.replace_input_with(place, wide)
            become(value, numpy_of(stored.coded.parts["values"]))

    def _typed(self, value: Any, weight: Weight) -> Any:
        """Cast a value to the weight's decoded type."""
        return self.cast(value, _dtype(weight), after=value.producer())

    def outcome(self, grouped: GroupedWeights) -> Rewritten:
        """What became of every tensor and layer."""
        coded, floats = self.coded | grouped.coded, dict(grouped.floats)
        for one in self.contents.tensors:
            if "codes" in one.coded.parts and one.name not in coded | floats.keys():
                named = any(name in self.graph.initializers for name in one.names)
                floats[one.name] = (
                    "the graph computes with it in a way that codes do not allow"
                    if named
                    else "the graph does not use it"
                )
        activations = {
            name: "static" if name in self.static else "float"
            for name, one in self.contents.activations.items()
            if one.mode != "gather"
        }
        activations |= dict.fromkeys(grouped.owners, "groups" if grouped.accuracy_level else "float")
        return Rewritten(tuple(sorted(coded)), floats, activations)


def _ir() -> Any:
    """The package `onnx_ir`, which is optional, imported at its first use."""
    import onnx_ir

    return onnx_ir


def _dtype(weight: Weight) -> str:
    return dtype_name(weight.sources[0].coded.dtype)


def _is_whole(end: Weight, ends: list[Weight]) -> bool:
    """Whether the file may hold the moved codes instead of the original ones: if they take no more bytes."""
    sources = {id(one) for one in end.sources}
    near = [one for one in ends if sources & {id(source) for source in one.sources}]
    held = {id(source): source for one in near for source in one.sources}
    return sum(one.codes.size for one in near) <= sum(int(np.prod(one.coded.shape)) for one in held.values())


def _gathers_rows(node: Any, place: int) -> bool:
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    return node.op_type == "Gather" and place == 0 and axis == 0
