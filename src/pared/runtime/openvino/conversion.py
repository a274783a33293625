"""Weights as codes and steps, and inputs of static layers on their grids, in a graph of OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from pared.formats.activation import Activation
from pared.formats.coded import Float, Grid, Grouped, Raw, dtype_name
from pared.formats.dtypes import Array
from pared.formats.views import first_dimension
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import registered_as
from pared.runtime.graphs.capturing.capture import Captured, module_of
from pared.runtime.kernels.machine import FULL_LEVELS, exact_products
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.onnx.weights.codes import numbers_of, numpy_of, scales_of
from pared.runtime.onnx.weights.layout import LOWEST, along, is_misread
from pared.runtime.openvino import grouped, halves, outliers
from pared.runtime.openvino.halves import pads_with_zeros
from pared.runtime.openvino.outliers import coded
from pared.runtime.openvino.translation.operators import translated
from pared.runtime.record import RECORD, contents_of

# The operators that multiply an input with a weight; the input comes first.
_PRODUCTS: Final = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData")
_MOVES: Final = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Convert")  # on a weight's way to its product


@dataclass(frozen=True)
class Result:
    """The leaf of an output that is the result of a graph at a place."""

    place: int


def contents_for(model: nn.Module, captured: Captured) -> Contents:
    """The numbers that a captured call needs of a quantized model, or of a submodel of it."""
    return contents_of(model) if RECORD in vars(model) else _contents_within(model, captured)


def converted(model: nn.Module, captured: Captured, contents: Contents) -> tuple[Any, tuple[object, ...]]:
    """The `openvino.Model` of a captured call, with the numbers of a quantized model.

    Args:
        model: the quantized model, or a submodel of it.
        captured: a call of the float model, or of that submodel; it is not changed.
        contents: what `contents_for` gives of these.

    Returns:
        the model, whose inputs have the names of the capture's; and the leaves of the call's output: a constant, or a
        `Result` of the model.

    Raises:
        ModelError: OpenVINO does not know an operator of the graph.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaves: Any = graph.graph_copy(captured.graph, copies)
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    graph.output(nodes)
    made = filled(graph, model, contents, captured.tensors, captured.constants).model
    return made, tuple(Result(nodes.index(leaf)) if isinstance(leaf, fx.Node) else leaf for leaf in leaves)


@dataclass(frozen=True, eq=False)
class Filled:
    """A graph of OpenVINO with the numbers of a model.

    Args:
        model: an `openvino.Model`.
        coded: the names of the tensors that it holds as codes.
        floats: the tensors with codes that it holds as floats, each with the reason.
        static: the modules whose inputs are rounded to their calibrated grids.
    """

    model: Any
    coded: frozenset[str]
    floats: Mapping[str, str]
    static: frozenset[str]


def filled(
    graph: fx.Graph,
    model: nn.Module,
    contents: Contents,
    tensors: Mapping[str, str],
    constants: Mapping[str, Tensor],
    *,
    narrow: bool = False,
) -> Filled:
    """A graph of aten operators in OpenVINO.

    Args:
        graph: it is changed.
        model: the model that was captured, for the names of its modules.
        contents: the numbers of its tensors.
        tensors: as in `Captured`.
        constants: as in `Captured`.
        narrow: hold floats in the narrower type in which they are stored, which makes a file smaller.
    """
    made = translated(graph)
    names: dict[int, str] = {}  # of each module the first
    modules = {name: names.setdefault(id(one), name) for name, one in model.named_modules(remove_duplicate=False)}
    owners = {node.name: modules.get(module_of(node), "") for node in graph.nodes}
    converter = _Converter(made, contents, owners)
    converter.fill(tensors, constants)
    if narrow:
        converter.narrow()
    coded, floats, static = converter.coded, converter.floats, converter.static
    return Filled(made, frozenset(coded), floats, frozenset(static))


def _contents_within(submodel: nn.Module, captured: Captured) -> Contents:
    """What a submodel holds in codes, and the rest as floats: only the whole model knows of which codes those are."""
    tensors, activations = [], {}
    for name in dict.fromkeys(captured.tensors.values()):
        home, _, attribute = name.rpartition(".")
        module = submodel.get_submodule(home)
        if isinstance(module, Counterpart) and attribute in module.pared_views:
            stored = module.pared_coded(attribute)
            if module.pared_activation is not None:
                activations[home] = module.pared_activation
        else:
            tensor = registered_as(module, attribute)
            stored = Raw(str(tensor.dtype).removeprefix("torch.")).encode(tensor)
        tensors.append(Stored((name,), "parameter", stored, Decision(name, "exact", None, "")))
    return Contents(tuple(tensors), activations)


class _Converter:
    """Fills one `openvino.Model`.

    Args:
        model: the model.
        contents: the tensors, and how layers treat their inputs.
        owners: by the name of an operator in the captured graph the module in whose forward it stands.
    """

    def __init__(self, model: Any, contents: Contents, owners: Mapping[str, str]) -> None:
        import openvino

        self._ov = openvino
        self._opset = openvino.opset13
        self._model = model
        self._contents = contents
        self._owners = owners
        self._rounded: dict[object, Any] = {}
        self._scaled: dict[object, Any] = {}
        self._outlying: list[tuple[Any, Activation]] = []  # products, whose inputs have outliers
        self._wide: list[tuple[Any, Array, Array]] = []  # constants, with their codes of 16 bits and their steps
        self._narrow: list[tuple[Any, Tensor]] = []  # constants, with their values in a narrower type
        self.coded: set[str] = set()
        self.floats: dict[str, str] = {}
        self.static: set[str] = set()

    def fill(self, tensors: Mapping[str, str], constants: Mapping[str, Tensor]) -> None:
        """Put the numbers into the places of the parameters that are none of the call."""
        parameters = {one.get_friendly_name(): one for one in self._model.get_parameters()}
        stored = {name: one for one in self._contents.tensors for name in one.names}
        for name, tensor in constants.items():
            if name in parameters:
                self._replace(parameters[name], self._constant(tensor))
        for name, tensor_name in tensors.items():
            if name in parameters:
                self._fill_weight(parameters[name], stored[tensor_name])
        # These look at several weights.
        outliers.give_extra_columns(self._outlying, self._on_grid)
        for constant, codes, steps in self._wide if exact_products() else ():
            halves.split(constant, codes, steps, self._on_grid)
        self._model.validate_nodes_and_infer_types()

    def _fill_weight(self, parameter: Any, weight: Stored) -> None:
        if isinstance(weight.coded.format, Grouped):
            found = grouped.constant(weight)
            if isinstance(found, str):
                self.floats[weight.name] = found
                found = self._constant(weight.coded.decode())
            else:
                self.coded.add(weight.name)
            found.set_friendly_name(weight.name)
            self._replace(parameter, found)
            return
        if not isinstance(weight.coded.format, Grid):
            constant = self._constant(weight.coded.decode())
            self._replace(parameter, constant)
            if isinstance(weight.coded.format, Float) and weight.coded.format.dtype != dtype_name(weight.coded.dtype):
                self._narrow.append((constant, weight.coded.parts["values"]))
            return
        codes, steps = numbers_of(weight)
        axes, found = along(steps)
        scaled = weight.coded.format.scaled
        if codes.dtype == np.int8:
            self._look_up(parameter, codes, found, scales_of(weight))
        if codes.dtype != np.int8 or (scaled and not self._scale_inputs(parameter, weight)):
            constant = self._constant(weight.coded.decode())
            self._replace(parameter, constant)
            self.floats[weight.name] = "its codes have 16 bits" if codes.dtype != np.int8 else "its columns have scales"
            if not scaled:
                self._wide.append((constant, codes, found))
            return
        value = coded(codes, found)
        value.set_friendly_name(weight.name)
        self._replace(parameter, value)
        self.coded.add(weight.name)
        if len(axes) <= 1 and exact_products():
            for product in _products(value.output(0)):
                self._round_input(product, weight)

    def _scale_inputs(self, parameter: Any, weight: Stored) -> bool:
        """Multiply the inputs of a weight's products by the scales of its columns; whether it has only such uses."""
        targets = list(parameter.output(0).get_target_inputs())
        products = [target.get_node() for target in targets if target.get_index() == 1]
        linear = all(one.get_type_name() == "MatMul" and one.get_attributes()["transpose_b"] for one in products)
        view = weight.coded.view or first_dimension(weight.coded.shape)
        if not linear or len(products) < len(targets) or view != first_dimension(weight.coded.shape):
            return False
        if len(weight.coded.shape) != 2 or any(one.get_attributes()["transpose_a"] for one in products):
            return False
        scale = weight.coded.parts["scale"].detach()
        for product in products:
            source = product.input(0).get_source_output()
            key = (source.get_node().get_name(), source.get_index(), scale.numpy().tobytes())
            if key not in self._scaled:
                factors = self._constant(scale.to(weight.coded.dtype))
                made = self._opset.multiply(source, factors)
                rank = source.get_partial_shape().rank
                if is_misread(None if rank.is_dynamic else rank.get_length()):
                    made = self._opset.maximum(made, self._constant(torch.tensor(LOWEST, dtype=weight.coded.dtype)))
                self._scaled[key] = made.output(0)
            product.input(0).replace_source_output(self._scaled[key])
        return True

    def _look_up(self, table: Any, codes: Array, steps: Array, scales: Array | None) -> None:
        """Let what reads rows of a table read rows of codes, and the step of each; columns may have scales.

        A table of floats would be decoded whole; and where it is a product's weight, too, so would that be.
        """
        ops = self._opset
        for target in list(table.output(0).get_target_inputs()):
            node = target.get_node()
            if node.get_type_name() != "Gather" or target.get_index() != 0 or steps.shape != (len(codes), 1):
                continue
            rows, axis = node.input_value(1), node.input_value(2)
            # As constants: `gather` takes long to make one of an array.
            held = ops.constant(np.ascontiguousarray(codes)), ops.constant(np.ascontiguousarray(steps, np.float32))
            found, step = (ops.gather(one, rows, axis) for one in held)
            value = ops.multiply(ops.convert(found, self._ov.Type.f32), step)
            if scales is not None:
                value = ops.multiply(value, ops.constant(np.ascontiguousarray(along(scales)[1], np.float32)))
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(value.output(0))

    def _round_input(self, product: Any, weight: Stored) -> None:
        """Round the input of a static layer to its calibrated grid."""
        activation = self._activation(product, weight)
        if activation is None or activation.mode != "static" or len(activation.weights) > 1:
            return  # of several weights only some read the layer's own input
        self.static.add(self._owner(product))
        source = product.input(0).get_source_output()
        if activation.outliers:
            self._outlying.append((product, activation))
            return
        product.input(0).replace_source_output(self._on_grid(source, activation))

    def _activation(self, product: Any, weight: Stored) -> Activation | None:
        """How the layer whose product this is treats its input; None if its weight is read by something else."""
        owner = self._owner(product)
        homes = {name.rpartition(".")[0] for name in weight.names}
        return self._contents.activations.get(owner) if owner in homes else None

    def _owner(self, product: Any) -> str:
        return self._owners.get(product.get_friendly_name().split("/")[0], "")

    def _on_grid(self, source: Any, activation: Activation) -> Any:
        scale, zero_point = activation.span.grid(FULL_LEVELS)
        key = (source.get_node().get_name(), source.get_index(), scale, zero_point)
        if key not in self._rounded:
            node = source.get_node()
            if pads_with_zeros(node):  # which are on the grid: a product can round its output, but not pad it
                inner = self._on_grid(node.input_value(0), activation)
                rounded = self._opset.pad(
                    inner, node.input_value(1), node.input_value(2), "constant", node.input_value(3)
                )
            else:
                low, high = np.float32(-zero_point * scale), np.float32((FULL_LEVELS - zero_point) * scale)
                rounded = self._opset.fake_quantize(source, low, high, low, high, FULL_LEVELS + 1)
            self._rounded[key] = rounded.output(0)
        return self._rounded[key]

    def narrow(self) -> None:
        """Hold floats in the narrower type in which they are stored; nothing can read their numbers then."""
        for constant, values in self._narrow:
            wide = self._opset.convert(self._constant(values), constant.get_element_type())
            for target in list(constant.output(0).get_target_inputs()):
                target.replace_source_output(wide.output(0))

    def _constant(self, tensor: Tensor) -> Any:
        return self._opset.constant(numpy_of(tensor))

    def _replace(self, parameter: Any, value: Any) -> None:
        for target in list(parameter.output(0).get_target_inputs()):
            target.replace_source_output(value.output(0))
        self._model.remove_parameter(parameter)


def _products(output: Any) -> Iterator[Any]:
    """The products of a weight, seen through what only moves its numbers."""
    for target in output.get_target_inputs():
        node = target.get_node()
        if node.get_type_name() in _PRODUCTS and target.get_index() == 1:
            yield node
        elif node.get_type_name() in _MOVES and target.get_index() == 0:
            yield from _products(node.output(0))
