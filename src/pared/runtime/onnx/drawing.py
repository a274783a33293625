"""Nodes and constants that are added to a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pared.formats.dtypes import Array


@dataclass(eq=False)
class Drawing:
    """An `onnx_ir.Graph` to which nodes and constants are added."""

    graph: Any

    def node(
        self, op: str, inputs: list[Any], attributes: Any = None, near: Any = None, after: Any = None, domain: str = ""
    ) -> Any:
        """The output of a new node, which is put before `near`, or after `after`, or first in the graph."""
        made = _ir().node(op, inputs, attributes or {}, domain=domain)
        if near is not None:
            near.prepend(made)
        elif after is not None:
            after.append(made)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], made)
        else:
            self.graph.append(made)
        if attributes and "to" in attributes:
            made.outputs[0].dtype = attributes["to"]
        return made.outputs[0]

    def cast(self, value: Any, dtype: str, near: Any = None, after: Any = None) -> Any:
        """A value in the type of this name; the value itself if it has it."""
        wanted = _ir().DataType[onnx_name(dtype)]
        if value.dtype == wanted or (value.dtype is None and dtype == "float32"):
            return value
        return self.node("Cast", [value], {"to": wanted}, near=near, after=after)

    def constant(self, name: str, numbers: Any) -> Any:
        """A new initializer, whose name gets a number where it is taken."""
        ir = _ir()
        free, i = name, 1
        while free in self.graph.initializers:
            free, i = f"{name}_{i}", i + 1
        tensor = ir.tensor(np.ascontiguousarray(numbers).reshape(np.shape(numbers)), name=free)
        value = ir.Value(name=free, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def onnx_name(dtype: str) -> str:
    """The name that ONNX has for a type of torch: "FLOAT" for "float32"."""
    return {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())


def replaced(old: Any, new: Any) -> None:
    """Let every reader of one value read another."""
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def become(value: Any, numbers: Array) -> None:
    """Give an initializer other numbers."""
    tensor = _ir().tensor(np.ascontiguousarray(numbers).reshape(np.shape(numbers)), name=value.name)
    value.const_value, value.dtype = tensor, tensor.dtype


def _ir() -> Any:
    """The package `onnx_ir`, which is optional, imported at its first use."""
    import onnx_ir

    return onnx_ir
