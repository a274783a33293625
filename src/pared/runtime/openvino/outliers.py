"""Columns of a product's input that leave its range, in a graph of OpenVINO.

A column that reaches N times as far as the range becomes N columns with the same weights, each on a grid that is N
times as coarse and shifted by an N-th of its step against the one before. What they round to adds up to what one fine
grid would give (Hermite's identity: floor(x) + floor(x + 1/N) + ... = floor(N x)), so the error is that of the range's
grid. All are one product with one grid, and OpenVINO can join that with what comes before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pared.formats.activation import Activation, Outliers
from pared.formats.dtypes import Array
from pared.runtime.kernels.machine import FULL_LEVELS
from pared.runtime.kernels.outliers import columns_of

OnGrid = Callable[[Any, Activation], Any]  # an output of a node, rounded to the grid of an activation

# What gives each number from the same number of its only input.
_EACH_ALONE: Final = ("Relu", "Gelu", "Tanh", "Sigmoid", "Swish", "HSwish", "Elu", "Clamp", "SoftPlus", "Mish")


def coded(codes: Array, steps: Array) -> Any:
    """A weight of codes and steps that can be broadcast to them; OpenVINO keeps the codes."""
    import openvino
    from openvino import opset13 as ops

    floats = ops.convert(ops.constant(np.ascontiguousarray(codes)), openvino.Type.f32)
    return ops.multiply(floats, ops.constant(np.ascontiguousarray(steps, np.float32)))


def give_extra_columns(products: Iterable[tuple[Any, Activation]], on_grid: OnGrid) -> None:
    """Round the inputs of products to grids with extra columns; products of other forms stay in floats."""
    known: dict[object, Any] = {}
    places = [(product, activation) for product, activation in products if _is_plain(product)]
    alone = {one.get_name() for one, _ in places if _readers(one.input_value(0)) == 1}
    for product, activation in places:
        source, columns = product.input_value(0), columns_of(_both_sides(activation.outliers))
        key = source.get_node().get_name(), source.get_index(), activation.outliers, activation.span
        if key not in known:
            inputs = product.input_value(1).get_shape()[1]
            spread = _Spread.of(activation, inputs)
            if product.get_name() in alone and _widen(source, columns):
                known[key] = on_grid(spread.applied(source), activation)
            else:
                known[key] = _appended(source, columns, spread, activation, on_grid)
        product.input(0).replace_source_output(known[key])
        codes, steps = _numbers(product.input_value(1).get_node())
        product.input(1).replace_source_output(coded(_widened(codes, columns), steps).output(0))


def _both_sides(outliers: Outliers) -> Outliers:
    """By column how many ranges more there are; a coarser grid reaches further on both sides."""
    found: dict[int, int] = {}
    for column, count in outliers:
        found[column] = max(found.get(column, 0), abs(count))
    return tuple(found.items())


@dataclass(frozen=True, eq=False)
class _Spread:
    """What each column of an input, and then each extra one, is multiplied by before it is rounded, and what is added.

    Args:
        factors, shifts: float32 (columns,).
    """

    factors: Array
    shifts: Array

    @classmethod
    def of(cls, activation: Activation, columns: int) -> _Spread:
        scale, _ = activation.span.grid(FULL_LEVELS)
        outliers = _both_sides(activation.outliers)
        every = np.array([*range(columns), *columns_of(outliers)])
        parts, copy = np.ones(len(every)), np.zeros(len(every))
        for column, count in outliers:
            places = np.flatnonzero(every == column)
            parts[places], copy[places] = count + 1, np.arange(count + 1)
        shifts = scale * (2 * copy - (parts - 1)) / (2 * parts)
        return cls((1 / parts).astype(np.float32), shifts.astype(np.float32))

    def part(self, columns: slice) -> _Spread:
        return _Spread(self.factors[columns], self.shifts[columns])

    def applied(self, source: Any) -> Any:
        from openvino import opset13 as ops

        return ops.add(ops.multiply(source, self.factors), self.shifts).output(0)


def _appended(source: Any, columns: list[int], spread: _Spread, activation: Activation, on_grid: OnGrid) -> Any:
    """The rounded input, with rounded copies of some columns behind it."""
    from openvino import opset13 as ops

    before = len(spread.factors) - len(columns)
    picked = ops.gather(source, np.array(columns), np.int64(-1)).output(0)
    inside = on_grid(spread.part(slice(before)).applied(source), activation)
    extra = on_grid(spread.part(slice(before, None)).applied(picked), activation)
    return ops.concat([inside, extra], -1).output(0)


def _widen(source: Any, columns: list[int]) -> bool:
    """Let the product that a value comes from compute some of its columns again; returns whether there is one."""
    from openvino import opset13 as ops

    node, bias = source.get_node(), None
    while node.get_type_name() in _EACH_ALONE and _readers(node.output(0)) == 1:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Add" and _is_row(node.input_value(1)) and _readers(node.output(0)) == 1:
        node, bias = node.input_value(0).get_node(), node.input(1)
    if not _is_plain(node) or _readers(node.output(0)) != 1:
        return False
    codes, steps = _numbers(node.input_value(1).get_node())
    held: Array | None = None if bias is None else bias.get_source_output().get_node().get_data()
    if steps.shape != (len(codes), 1) or (held is not None and held.shape[-1] != len(codes)):
        return False
    node.input(1).replace_source_output(coded(_widened(codes.T, columns).T, _widened(steps.T, columns).T).output(0))
    if bias is not None and held is not None:
        bias.replace_source_output(ops.constant(_widened(held, columns)).output(0))
    return True


def _is_row(value: Any) -> bool:
    """Whether a value is constant and differs along the last dimension only."""
    node = value.get_node()
    shape = node.get_data().shape if node.get_type_name() == "Constant" else ()
    return bool(shape) and max(shape[:-1], default=1) == 1


def _is_plain(product: Any) -> bool:
    """Whether a node is a product with a weight on a grid whose rows are its outputs."""
    if product.get_type_name() != "MatMul":
        return False
    attributes = product.get_attributes()
    if attributes["transpose_a"] or not attributes["transpose_b"]:
        return False
    weight = product.input_value(1).get_node()
    if weight.get_type_name() != "Multiply" or weight.input_value(0).get_node().get_type_name() != "Convert":
        return False
    held = weight.input_value(0).get_node().input_value(0).get_node()
    steps = weight.input_value(1).get_node()
    both = held.get_type_name(), steps.get_type_name()
    return both == ("Constant", "Constant") and held.get_data().dtype == np.int8 and held.get_data().ndim == 2


def _numbers(weight: Any) -> tuple[Array, Array]:
    """The codes and the steps of a weight that `coded` made."""
    held = weight.input_value(0).get_node().input_value(0).get_node()
    return held.get_data(), weight.input_value(1).get_node().get_data()


def _widened(numbers: Array, columns: list[int]) -> Array:
    return np.concatenate([numbers, numbers[..., columns]], -1)


def _readers(output: Any) -> int:
    return len(output.get_target_inputs())
