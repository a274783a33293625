"""A grid with a step for each group of columns of a row: what one is, its numbers, and the values they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from pared.formats import dtypes

Numbers = NDArray[Any]
Floats = NDArray[np.float32]

StepType = Literal["float16", "bfloat16", "float32"]
_LARGEST: Final[Mapping[StepType, float]] = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}
_LARGEST_OF_BOTH: Final = 65280.0  # of float16's numbers that bfloat16 has as well
_LEAST: Final = np.float32(2**-24)  # number above 0 of float16
# Where zero is on the grid: at code 0; at a code of each group; or nowhere in particular, as each group has its least
# value.
Zero = Literal["fixed", "code", "least"]


@final
@dataclass(frozen=True)
class GroupGrid:
    """Integer codes on uniform grids, one for each group of consecutive columns of a row.

    With codes from `low` to `high`, a value is

    * `step * code` (`zero="fixed"`),
    * `step * (code - zero)` (`"code"`), or
    * `step * (code - low) + least` (`"least"`),

    in float32. Steps and least values may be nested: then some groups share one of each, and those of a group are small
    whole multiples of these.

    Args:
        bits: the bits of a code, 2 to 8.
        group: the columns of a group; the last one of a row may have fewer. None: all columns.
        zero: where zero is on the grid.
        step: the type in which steps, and least values, are stored.
        nested: the number of groups that share a step; 0: each has its own.
        multiple_bits: the bits of a multiple, where steps are nested.
        signed: whether multiples may be negative.

    >>> grid = GroupGrid(4, 2)
    >>> parts = {"codes": np.array([[1, -2, 3]], np.int8), "step": np.array([[0.5, 0.25]], np.float32)}
    >>> grid.decode(parts).tolist()
    [[0.5, -1.0, 0.75]]
    """

    tag: ClassVar[str] = "groups"
    bits: int
    group: int | None
    zero: Zero = "fixed"
    step: StepType = "float16"
    nested: int = 0
    multiple_bits: int = 0
    signed: bool = False

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def multiples(self) -> tuple[int, int]:
        """The least and the largest multiple of a nested step."""
        most = 1 << self.multiple_bits
        return (-(most >> 1), (most >> 1) - 1) if self.signed else (0, most - 1)

    @property
    def label(self) -> str:
        """A short name for tables: "int4 g32", "int8 row"."""
        return f"int{self.bits} {f'g{self.group}' if self.group else 'row'}"

    def groups(self, columns: int) -> int:
        """The number of groups of a row."""
        return -(-columns // self.group) if self.group else 1

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """The shape of each part of a matrix.

        "codes" are int8; "step" and "least" float32 that their stored type holds exactly; "zero", "multiple" and
        "least multiple" int8 (uint8 where multiples are unsigned).
        """
        groups = self.groups(columns)
        shared = -(-groups // self.nested) if self.nested else groups
        found = {"codes": (rows, columns), "step": (rows, shared)}
        if self.nested:
            found["multiple"] = (rows, groups)
        if self.zero == "code":
            found["zero"] = (rows, groups)
        if self.zero == "least":
            found["least"] = (rows, shared)
            if self.nested:
                found["least multiple"] = (rows, groups)
        return found

    def steps(self, parts: Mapping[str, Numbers]) -> Floats:
        """The step of each group, float32 (rows, groups); it may be negative where multiples are signed."""
        step: Floats = parts["step"].astype(np.float32, copy=False)
        return self._spread(step, parts["multiple"]) if self.nested else step

    def offsets(self, parts: Mapping[str, Numbers]) -> Floats | None:
        """What is added to `step * code` of each group, float32 (rows, groups); None: nothing is."""
        if self.zero == "code":
            return np.asarray(-self.steps(parts) * parts["zero"], np.float32)
        if self.zero == "least":
            return np.asarray(self.leasts(parts) - self.steps(parts) * np.float32(self.low), np.float32)
        return None

    def leasts(self, parts: Mapping[str, Numbers]) -> Floats:
        """The least value of each group, float32 (rows, groups), where the grid has them."""
        least: Floats = parts["least"].astype(np.float32, copy=False)
        return self._spread(least, parts["least multiple"]) if self.nested else least

    def _spread(self, shared: Floats, multiple: Numbers) -> Floats:
        groups = multiple.shape[1]
        spread: Floats = np.repeat(shared, min(self.nested, groups), axis=1)[:, :groups] * multiple.astype(np.float32)
        return spread

    def decode(self, parts: Mapping[str, Numbers]) -> Floats:
        """The values, float32 (rows, columns), each product and sum rounded to float32 as runtimes do."""
        codes = parts["codes"]
        step, other = self.steps(parts), self.origins(parts)
        columns = codes.shape[1]
        return self.values(
            codes, self.by_column(step, columns), None if other is None else self.by_column(other, columns)
        )

    def origins(self, parts: Mapping[str, Numbers]) -> Numbers | None:
        """The code for zero, or the least value, of each group, (rows, groups); None where zero is fixed."""
        if self.zero == "least":
            return self.leasts(parts)
        return parts["zero"] if self.zero == "code" else None

    def values(self, codes: Numbers, step: Floats, origin: Numbers | None = None) -> Floats:
        """What codes stand for, with the step of each and what `origins` gives."""
        found: Floats
        if origin is not None and self.zero == "code":
            found = (codes.astype(np.int16) - origin).astype(np.float32)
            found *= step
        elif origin is not None:
            found = (codes.astype(np.int16) - self.low).astype(np.float32)
            found *= step
            found += origin
        else:
            found = codes.astype(np.float32)
            found *= step
        return found

    def by_column(self, values: Numbers, columns: int) -> Numbers:
        """One value for each column, (rows, columns), from one for each group."""
        return np.repeat(values, min(self.group or columns, columns), axis=1)[:, :columns]

    def nbits(self, rows: int, columns: int) -> int:
        """The bits of all numbers, each in its own width, without padding."""
        widths = {
            "codes": self.bits,
            "step": 8 * dtypes.ITEM_SIZES[self.step],
            "least": 8 * dtypes.ITEM_SIZES[self.step],
            "zero": self.bits,
            "multiple": self.multiple_bits,
            "least multiple": self.multiple_bits,
        }
        return sum(widths[name] * height * width for name, (height, width) in self.shapes(rows, columns).items())

    def to_json(self) -> dict[str, Any]:
        """The format as it stands in an artifact's index; what has its default is left out."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {"tag": self.tag} | {name: value for name, value in fields.items() if value != defaults[name]}


def representable(values: Floats, kind: StepType) -> Floats:
    """Values rounded to the nearest that a type holds, as float32; infinite beyond its range.

    >>> representable(np.array([1 / 3], np.float32), "float16").tolist()
    [0.333251953125]
    """
    return dtypes.converted(values, dtypes.ELEMENTS[kind]).astype(np.float32)


def storable(values: Floats, kind: StepType, also: StepType | None = None) -> Floats:
    """Values rounded to numbers that a type holds, as float32: the nearest, and the last at the end of its range.

    Args:
        values: float32; infinite ones are at the end of the range.
        kind: the type in which they are stored.
        also: a type that has to hold them as well.

    >>> storable(np.array([1 / 3, 1e9, 3e-7], np.float32), "bfloat16", "float16").tolist()
    [0.333984375, 65280.0, 2.980232238769531e-07]
    """
    most = np.float32(_LARGEST[kind] if also in (None, kind) else min(_LARGEST[kind], _LARGEST[also], _LARGEST_OF_BOTH))
    found = representable(np.clip(values, -most, most).astype(np.float32, copy=False), kind)
    return found if also in (None, kind) else representable(found, also)


def storable_steps(values: Floats, kind: StepType, also: StepType | None = None) -> Floats:
    """Steps rounded as by `storable`; but none becomes 0, which would lose all numbers of its group.

    >>> storable_steps(np.array([1e-9, -1e-9, 0], np.float32), "float16").tolist() == [2**-24, -(2**-24), 0]
    True
    """
    found = storable(values, kind, also)
    if "float16" not in (kind, also):
        return found
    lost = (found == 0) & (values != 0)
    found[lost] = np.copysign(_LEAST, values[lost])
    return found
