"""Weights with codes of 16 bits in a graph of OpenVINO: two convolutions with codes of 8 bits each, whose sum is exact.

Such a weight would make floats of its layer, and of what its neighbours give and take. Layers whose weights need 16
bits have no calibrated range; where their input is clamped, that is its range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from pared.formats.activation import Activation
from pared.formats.dtypes import Array
from pared.runtime.openvino.outliers import coded

_HALF: Final = 128  # a code is that many times its upper half, and its lower half
_MOST: Final = 127 * _HALF + _HALF // 2 - 1  # the largest code with such halves
_CONVOLUTIONS: Final = {"Convolution": "convolution", "GroupConvolution": "group_convolution"}
_SIZES: Final = ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")


def split(weight: Any, codes: Array, steps: Array, on_grid: Callable[[Any, Activation], Any]) -> bool:
    """Put two convolutions in the place of one, if its weight and its input allow that.

    Args:
        weight: a constant that holds the weight as floats.
        codes: int16, in the weight's shape, whose first dimension counts outputs.
        steps: float32, of as many dimensions.
        on_grid: rounds a value to the grid of an activation.

    Returns:
        whether that was possible.
    """
    from openvino import opset13 as ops

    found = _convolution(weight.output(0))
    if found is None or np.abs(codes.astype(np.int32)).max(initial=0) > _MOST:
        return False
    product, moves = found
    sizes = {name: product.get_attributes()[name] for name in _SIZES}
    source = _unpadded(product.input_value(0), sizes)
    activation = _clamped(source.get_node())
    if activation is None:
        return False
    upper = (codes.astype(np.int32) + _HALF // 2) // _HALF
    end, scale, shift = _norm_behind(product, len(codes))
    steps = steps * scale.reshape(-1, *[1] * (codes.ndim - 1))
    rounded = on_grid(source, activation)
    sums = []
    for half, factor in (((codes - _HALF * upper), 1), (upper, _HALF)):
        held: Any = coded(half.astype(np.int8), np.float32(factor) * steps)
        for move in moves:
            held = ops.reshape(held, move.input_value(1), move.get_attributes()["special_zero"])
        sums.append(getattr(ops, _CONVOLUTIONS[product.get_type_name()])(rounded, held, *sizes.values()))
    targets = list(end.output(0).get_target_inputs())
    first = sums[0] if shift is None else ops.add(sums[0], shift.reshape(1, -1, *[1] * (codes.ndim - 2)))
    total = ops.add(first, sums[1])
    for target in targets:
        target.replace_source_output(total.output(0))
    return True


def _convolution(weight: Any) -> tuple[Any, list[Any]] | None:
    """The only reader of a weight, if it is a convolution, and what gives the weight another shape on the way to it."""
    moves: list[Any] = []
    while True:
        readers = [target for target in weight.get_target_inputs() if target.get_node().get_type_name() != "ShapeOf"]
        node = readers[0].get_node() if len(readers) == 1 else None
        if node is None:
            return None
        if node.get_type_name() in _CONVOLUTIONS and readers[0].get_index() == 1:
            return node, moves
        if node.get_type_name() != "Reshape" or readers[0].get_index() != 0:
            return None
        moves.append(node)
        weight = node.output(0)


def _unpadded(value: Any, sizes: dict[str, Any]) -> Any:
    """What zeros were put around, as a convolution does that itself; its sizes are changed to that."""
    node = value.get_node()
    if not pads_with_zeros(node) or sizes["auto_pad"] != "explicit":
        return value
    before, after = (_numbers(node.input_value(i).get_node()) for i in (1, 2))
    if before is None or after is None or any((*before[:2], *after[:2])) or min(*before, *after) < 0:
        return value
    sizes["pads_begin"] = [a + b for a, b in zip(sizes["pads_begin"], before[2:], strict=True)]
    sizes["pads_end"] = [a + b for a, b in zip(sizes["pads_end"], after[2:], strict=True)]
    return node.input_value(0)


def pads_with_zeros(node: Any) -> bool:
    """Whether a node puts zeros around a value."""
    if node.get_type_name() != "Pad" or node.get_attributes()["pad_mode"] != "constant" or node.get_input_size() < 4:
        return False
    value = _numbers(node.input_value(3).get_node())
    return value is not None and not value.any()


def _clamped(node: Any) -> Activation | None:
    """The range of a value that is clamped; None if it is not, or if zeros, which pad it, are not in the range."""
    if node.get_type_name() != "Clamp":
        return None
    low, high = node.get_attributes()["min"], node.get_attributes()["max"]
    if not (np.isfinite(low) and np.isfinite(high) and low <= 0 < high):
        return None
    return Activation("static", float(low), float(high))


def _numbers(node: Any) -> Array | None:
    """What a node gives, if it is constant."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.asarray(node.get_data()) if node.get_type_name() == "Constant" else None


def _norm_behind(product: Any, channels: int) -> tuple[Any, Array, Array | None]:
    """What a convolution ends with: a norm with constant statistics, if one follows, as a factor and an addend.

    Without this the norm would stand behind the sum of both convolutions, as an operator of its own.
    """
    readers = list(product.output(0).get_target_inputs())
    node = readers[0].get_node() if len(readers) == 1 else None
    if node is not None and node.get_type_name() == "BatchNormInference" and readers[0].get_index() == 0:
        held = [found for found in (_numbers(node.input_value(i).get_node()) for i in range(1, 5)) if found is not None]
        if len(held) == 4:
            gain, bias, mean, variance = (one.astype(np.float64) for one in held)
            scale = gain / np.sqrt(variance + node.get_attributes()["epsilon"])
            return node, scale.astype(np.float32), (bias - mean * scale).astype(np.float32)
    return product, np.ones(channels, np.float32), None
