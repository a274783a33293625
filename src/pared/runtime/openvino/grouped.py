"""Weights with a step for each group of columns as OpenVINO's products decode them: integers, zero points and steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from pared.formats.coded import Grouped, dtype_name
from pared.formats.dtypes import Array
from pared.formats.views import first_dimension
from pared.model.contents import Stored
from pared.targets.graphs.integers import Integers
from pared.targets.graphs.openvino import element_type
from pared.targets.graphs.packing import packed


def constant(weight: Stored) -> Any:
    """The operators that decode a weight, or the reason why there are none.

    They decode it in float32; steps of float16, which are held as such, are converted first. All of this is joined with
    a product, or with what looks up rows, so that only integers are in memory.
    """
    fmt = weight.coded.format
    assert isinstance(fmt, Grouped)
    view = weight.coded.view or first_dimension(weight.coded.shape)
    numbers = Integers.of(fmt.grid, weight.matrix_parts())
    if numbers is None:
        return "zero is not on its grid, as OpenVINO needs it"
    if view.split != weight.coded.shape or len(view.rows) != 1:
        return "OpenVINO takes steps along one dimension"
    rows, columns = numbers.codes.shape
    width = numbers.group or columns
    if columns % width and columns > width:
        return f"its {columns} columns are not whole groups of {width}"
    value = _decoded(numbers, (rows, columns // width, width) if columns > width else (rows, columns))
    return _moved(value, weight.coded.shape, view.rows[0], dtype_name(weight.coded.dtype))


def _decoded(numbers: Integers, shape: tuple[int, ...]) -> Any:
    """Values in float32, in this shape, whose last dimension is that of a group."""
    from openvino import Type
    from openvino import opset13 as ops

    zeros = numbers.zeros
    if zeros is None and element_type(numbers.bits, "fixed").startswith("u"):
        zeros = np.zeros((1, 1), np.int8)
    unsigned = zeros is not None
    value = ops.convert(_integers(numbers, numbers.codes, shape, unsigned=unsigned), Type.f32)
    ones = (*shape[:-1], 1)
    if zeros is not None:
        held = _integers(numbers, zeros, ones if zeros.size > 1 else (1,) * len(shape), unsigned=True)
        value = ops.subtract(value, ops.convert(held, Type.f32))
    return ops.multiply(value, _steps(numbers, ones))


def _integers(numbers: Integers, codes: Array, shape: tuple[int, ...], *, unsigned: bool) -> Any:
    from openvino import Shape, Tensor, Type, op
    from openvino import opset13 as ops

    given = numbers.unsigned(codes) if unsigned else codes
    if numbers.bits == 8:
        return ops.constant(np.ascontiguousarray(given).reshape(shape))
    plain = given.view(np.uint8) & np.uint8((1 << numbers.bits) - 1)
    kind = getattr(Type, element_type(numbers.bits, "code" if unsigned else "fixed"))
    tensor = Tensor(kind, Shape(shape))  # which owns its memory
    tensor.data.reshape(-1).view(np.uint8)[:] = packed(plain.reshape(-1), numbers.bits)
    return op.Constant(tensor, shared_memory=True)


def _steps(numbers: Integers, shape: tuple[int, ...]) -> Any:
    from openvino import Type
    from openvino import opset13 as ops

    steps = numbers.steps.reshape(shape)
    if numbers.steps_are_half:
        return ops.convert(ops.constant(steps.astype(np.float16)), Type.f32)
    return ops.constant(np.ascontiguousarray(steps))


def _moved(value: Any, shape: tuple[int, ...], row: int, dtype: str) -> Any:
    """A matrix of rows in the tensor's shape and type."""
    from openvino import Type
    from openvino import opset13 as ops

    first = (shape[row], *(size for i, size in enumerate(shape) if i != row))
    if tuple(value.get_output_shape(0)) != first:
        value = ops.reshape(value, np.array(first, np.int64), False)
    if row:
        order = [i + 1 if i < row else i for i in range(len(shape))]
        order[row] = 0
        value = ops.transpose(value, np.array(order, np.int64))
    return value if dtype == "float32" else ops.convert(value, {"float16": Type.f16, "bfloat16": Type.bf16}[dtype])
