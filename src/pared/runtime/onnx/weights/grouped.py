"""Weights with a step for each group of columns, as operators of ONNX Runtime: products, and rows of tables.

Codes are not moved through the graph as those of rows are: groups lie along the columns, so an operator has to see all
columns of some rows, in order. Which rows these are is found by moving the numbers of rows and of columns instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from pared.formats.coded import Grouped, dtype_name
from pared.formats.dtypes import Array
from pared.formats.views import first_dimension
from pared.model.contents import Contents, Stored
from pared.runtime.onnx.drawing import Drawing, replaced
from pared.runtime.onnx.weights.codes import by_rows, owner_of, sources
from pared.runtime.onnx.weights.layout import move, moved
from pared.targets.graphs.integers import Integers
from pared.targets.graphs.packing import packed

DOMAIN: Final = "com.microsoft"  # ONNX Runtime's own operators

# How a product treats its input: in floats, or rounded to int8 in groups as large as the weight's.
AccuracyLevel = Literal[0, 4]

_BLOCKS: Final = (16, 32, 64, 128)  # it also takes 256, but codes of 2 bits not with inputs in int8
_OTHERWISE: Final = "the graph computes with it in a way that groups of codes do not allow"


@dataclass(frozen=True, eq=False)
class _Place:
    """A value that consists of the numbers of one weight: for each its row and its column there."""

    value: Any
    stored: Stored
    rows: Array
    columns: Array


@dataclass(eq=False)
class GroupedWeights(Drawing):
    """Puts operators with grouped codes in the place of those that read floats.

    Args:
        contents: the tensors.
        accuracy_level: how products treat their inputs.

    Attributes:
        coded: the names of tensors of which the graph holds codes.
        floats: those of which it (also) holds floats, with the reason.
        owners: the modules whose products have become such operators.
    """

    contents: Contents
    accuracy_level: AccuracyLevel = 4
    coded: set[str] = field(default_factory=set)
    floats: dict[str, str] = field(default_factory=dict)
    owners: set[str] = field(default_factory=set)
    _held: dict[object, Mapping[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        """Replace what can be replaced."""
        places = _places(self.graph, self.contents)
        numbers: dict[int, Integers | str] = {}
        for place in places.values():
            found = numbers.setdefault(id(place.stored), _integers(place.stored))
            uses = [(use.node, use.idx) for use in place.value.uses()]
            left = [use for use in uses if not any(id(output) in places for output in use[0].outputs)]
            if not isinstance(found, str):
                left = [use for use in left if not self._replace(place, found, *use)]
            if left or place.value.is_graph_output():
                self.floats[place.stored.name] = found if isinstance(found, str) else _OTHERWISE

    def _replace(self, place: _Place, numbers: Integers, node: Any, at: int) -> bool:
        """Replace an operator that reads the value; returns whether that was possible."""
        if place.value.shape is None or place.rows.ndim != 2:
            return False
        width = numbers.codes.shape[1]
        if node.op_type == "MatMul" and at == 1 and _in_order(place.rows.T, place.columns.T, width):
            self._product(place, numbers.rows(place.rows[0]), node)
        elif node.op_type == "Gather" and at == 0 and _axis(node) == 0 and _in_order(place.rows, place.columns, width):
            if place.rows.shape[1] * numbers.bits % 8:
                return False  # rows would end within a byte
            self._look_up(place, numbers.rows(place.rows[:, 0]), node)
        else:
            return False
        self.coded.add(place.stored.name)
        return True

    def _product(self, place: _Place, numbers: Integers, node: Any) -> None:
        held = self._constants(place, numbers)
        rows, columns = numbers.codes.shape
        attributes = {
            "K": columns,
            "N": rows,
            "bits": numbers.bits,
            "block_size": numbers.group,
            "accuracy_level": self.accuracy_level,
        }
        inputs = [node.inputs[0], held["codes"], self._steps(held, place, node), *self._zeros(held)]
        replaced(node.outputs[0], self.node("MatMulNBits", inputs, attributes, near=node, domain=DOMAIN))
        self.owners.add(owner_of(place.stored.names, node))

    def _look_up(self, place: _Place, numbers: Integers, node: Any) -> None:
        held = self._constants(place, numbers)
        rows, columns = numbers.codes.shape
        # In two dimensions without padding, which the runtime makes of them when it loads the file: so a table that is
        # also a product's weight stands there once.
        codes = self.node("Reshape", [held["codes"], self.constant("shape", np.array([rows, -1]))], near=node)
        if columns % (numbers.group or columns):
            ends = [np.array([one]) for one in (0, columns * numbers.bits // 8, 1)]
            codes = self.node("Slice", [codes, *(self.constant("end", one) for one in ends)], near=node)
        attributes = {"bits": numbers.bits, "block_size": numbers.group, "gather_axis": 0, "quantize_axis": 1}
        inputs = [codes, node.inputs[1], self._steps(held, place, node), *self._zeros(held)]
        replaced(node.outputs[0], self.node("GatherBlockQuantized", inputs, attributes, near=node, domain=DOMAIN))

    def _steps(self, held: Mapping[str, Any], place: _Place, node: Any) -> Any:
        """Steps in the type of the values, which the runtime makes of them when it loads the file."""
        return self.cast(held["steps"], dtype_name(place.stored.coded.dtype), near=node)

    def _zeros(self, held: Mapping[str, Any]) -> list[Any]:
        return [held["zeros"]] if "zeros" in held else []

    def _constants(self, place: _Place, numbers: Integers) -> Mapping[str, Any]:
        """Codes (rows, groups, bytes), steps (rows, groups) and zero points (rows, bytes)."""
        name = place.stored.name
        digest = hashlib.blake2b(numbers.codes.tobytes()).digest()  # of codes that are not held a second time
        key = name, numbers.codes.shape, digest
        if key not in self._held:
            group, (rows, columns) = numbers.group or 1, numbers.codes.shape
            filled = np.pad(numbers.unsigned(numbers.codes), [(0, 0), (0, -columns % group)])
            steps = numbers.steps.astype(np.float16) if numbers.steps_are_half else numbers.steps
            made = {"codes": packed(filled.reshape(rows, -1, group), numbers.bits), "steps": steps}
            if numbers.zeros is not None:
                made["zeros"] = packed(numbers.unsigned(numbers.zeros), numbers.bits)
            self._held[key] = {part: self.constant(f"{name}.{part}", one) for part, one in made.items()}
        return self._held[key]


def _places(graph: Any, contents: Contents) -> dict[int, _Place]:
    """The values that only consist of the numbers of one weight with groups, by the value's `id`."""
    grouped = [one for one in contents.tensors if isinstance(one.coded.format, Grouped) and not by_rows(one)]
    known: dict[int, _Place] = {}
    for value, stored in sources(graph, grouped):
        view = stored.coded.view or first_dimension(stored.coded.shape)
        if len(view.split) == 2 and len(view.rows) == 1:
            numbered = [np.broadcast_to(one, view.split) for one in np.ogrid[: view.split[0], : view.split[1]]]
            known[id(value)] = _Place(value, stored, numbered[view.rows[0]], numbered[1 - view.rows[0]])
    for node in graph:
        place = known.get(id(node.inputs[0])) if moved(node) == 1 else None
        if place is not None:
            try:
                rows, columns = (move(node, [one]) for one in (place.rows, place.columns))
            except NotImplementedError:
                continue
            for output, row, column in zip(node.outputs, rows, columns, strict=True):
                known[id(output)] = _Place(output, place.stored, row, column)
    return known


def _integers(stored: Stored) -> Integers | str:
    """A weight's numbers as the runtime takes them, or why it does not."""
    fmt = stored.coded.format
    assert isinstance(fmt, Grouped)
    numbers = Integers.of(fmt.grid, stored.matrix_parts())
    if numbers is None:
        return "zero is not on its grid, as the runtime needs it"
    found = numbers.in_blocks(_BLOCKS)
    if found is None:
        return f"its groups have {numbers.group} columns, and the runtime takes multiples of {_BLOCKS[0]}"
    dtype = dtype_name(stored.coded.dtype)
    if dtype != "float32" and not (dtype == "float16" and found.steps_are_half):
        return f"the runtime does not take its steps with inputs in {dtype}"
    return found


def _in_order(rows: Array, columns: Array, width: int) -> bool:
    """Whether a matrix of numbers of rows and columns has whole rows, of this width."""
    alike = bool((rows == rows[:, :1]).all())
    return alike and columns.shape[1] == width and bool((columns == np.arange(width)).all())


def _axis(node: Any) -> int:
    return node.attributes["axis"].value if "axis" in node.attributes else 0
