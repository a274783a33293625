"""The index of an artifact as values: what it holds, and where. `docs/format.md` is the specification."""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pared.formats.dtypes import ITEM_SIZES
from pared.formats.entropy import Coding
from pared.formats.groups.grid import GroupGrid

# The version that is written where it can say everything; the one that also says what a state dict does not hold as
# tensors; the one that also has grids with groups; and the one that also has scales of columns. Version 1 is read, too.
VERSION: Final = 2
STATES: Final = 3
GROUPS: Final = 4
NEWEST: Final = 5
STATE: Final = "state"  # the kind of an entry that is a part of a module's extra state
ALIGNMENT: Final = 64  # of large parts in the data, in bytes; in version 1, of every part
_LARGE: Final = 4096  # bytes


@dataclass(frozen=True)
class Part:
    """Where one part of a tensor stands in the data.

    Args:
        offset: the offset of its first byte in the data.
        length: its size in bytes.
        crc32: the checksum of its bytes, after those of the tensor's earlier parts without a checksum. In version 1
            each part has one, in version 2 the last part of a tensor.
        coding: how codes are coded; None for plain little-endian values.
        rows: for the codes of one class of rows, the number of its rows.
        base: for steps stored as differences of step indexes, the index that they are added to.
    """

    offset: int
    length: int
    crc32: int | None = None
    coding: Coding | None = None
    rows: int | None = None
    base: int | None = None

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + self.length

    @property
    def varies(self) -> bool:
        """Whether its length depends on its values, not only on their number."""
        return self.coding is not None and self.coding.constant is None

    def to_json(self) -> dict[str, Any]:
        """The part as it stands in the index: what follows from the rest of the index is left out."""
        found = {
            "coding": None if self.coding is None else self.coding.to_json(),
            "length": self.length if self.varies else None,
            "rows": self.rows,
            "base": self.base,
        }
        return {key: value for key, value in found.items() if value is not None}


def start_of(end: int, length: int, version: int = VERSION) -> int:
    """The offset of a part of `length` bytes after one that ends at `end`.

    >>> start_of(70, 4095), start_of(70, 4096), start_of(70, 4, version=1)
    (70, 128, 128)
    """
    return end + (-end % ALIGNMENT if version == 1 or length >= _LARGE else 0)


@dataclass(frozen=True)
class Entry:
    """One tensor of an artifact.

    Args:
        names: all its names; the first is the one shown in tables.
        kind: "parameter" or "buffer"; or "state": part of a module's extra state.
        dtype: the element type of the source tensor, a key of `ITEM_SIZES`.
        shape: the source tensor's.
        format: {"tag": "grid", "codes": ...}, with "scaled": True where columns have scales, {"tag": "float", "dtype":
            ...}, {"tag": "raw"}, or {"tag": "groups", ...} with the fields of a `GroupGrid`.
        view: for a grid, with groups or without, (split, rows) as in `View`; otherwise None.
        bits: the rate that was requested, in bits per weight; None if none was.
        because: the reason for the format, for people.
        parts: in the order of the data: "values"; or for a grid "codes" and "step", with "classes", "codes 0",
            "codes 1", ... in place of "codes" if its rows are divided into classes, or its columns if they have scales.
            With scales and with groups there are more; they stand in the order of their names.
    """

    names: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    format: Mapping[str, Any]
    view: tuple[tuple[int, ...], tuple[int, ...]] | None
    bits: float | None
    because: str
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @functools.cached_property
    def elements(self) -> int:
        """The number of elements of the source tensor."""
        return math.prod(self.shape)

    @functools.cached_property
    def n_rows(self) -> int:
        """The number of steps of a grid."""
        split, rows = self.view or (self.shape, ())
        return math.prod(split[row] for row in rows)

    @functools.cached_property
    def n_columns(self) -> int:
        """The number of scales of a grid that has them."""
        split, rows = self.view or (self.shape, ())
        return math.prod(size for i, size in enumerate(split) if i not in rows)

    @property
    def scaled(self) -> bool:
        """Whether its columns have scales."""
        return bool(self.format.get("scaled", False))

    @property
    def n_lines(self) -> int:
        """How many lines are divided into classes: its rows, or its columns if they have scales."""
        return self.n_columns if self.scaled else self.n_rows

    @functools.cached_property
    def groups(self) -> GroupGrid | None:
        """The grid, if it has groups."""
        if self.format["tag"] != GroupGrid.tag:
            return None
        return GroupGrid(**{name: value for name, value in self.format.items() if name != "tag"})

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The shape of each part, as a matrix, of a grid with groups."""
        return {} if self.groups is None else self.groups.shapes(self.n_rows, self.n_columns)

    @property
    def source_nbytes(self) -> int:
        """The size of the source tensor in bytes."""
        return self.elements * ITEM_SIZES[self.dtype]

    @property
    def end(self) -> int:
        """The offset in the data after its last part."""
        return list(self.parts.values())[-1].end

    @property
    def nbytes(self) -> int:
        """The size of all parts in bytes, without padding."""
        return sum(part.length for part in self.parts.values())

    @property
    def label(self) -> str:
        """The format's short name for tables: "grid int8", "float32"."""
        if self.format["tag"] == "grid":
            return f"grid {self.format['codes']}{', scaled' if self.scaled else ''}"
        if self.groups is not None:
            return self.groups.label
        return str(self.format.get("dtype", self.dtype))

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in an index of version 2."""
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "format": dict(self.format),
            "because": self.because,
            "crc32": list(self.parts.values())[-1].crc32,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
        }
        if len(self.names) > 1:
            found["aliases"] = list(self.names[1:])
        if self.bits is not None:
            found["bits"] = self.bits
        if self.view is not None and self.view != (self.shape, (0,)):
            found["view"] = {"split": list(self.view[0]), "rows": list(self.view[1])}
        return found


@dataclass(frozen=True)
class Index:
    """Everything that an artifact says about its data.

    Args:
        entries: one per tensor, in the order of the data.
        modules: how int8 counterparts treat their input, by module name: `Activation.to_json`.
        provenance: where the model comes from and how it was made; JSON, for people.
        states: the extra state of modules as trees of JSON, by their names in a state dict. Tensors in them are entries
            of the kind "state", named "NAME/0", "NAME/1", ...
        made: the buffers that are left to the constructor of their class, as JSON.

    >>> Index(()).to_json()
    {'pared': 2, 'tensors': [], 'modules': {}, 'provenance': {}}
    """

    entries: tuple[Entry, ...]
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The index as plain data."""
        more: dict[str, Any] = {"states": dict(self.states), "made": [dict(one) for one in self.made]}
        more = {key: value for key, value in more.items() if value}
        grouped = any(entry.groups is not None for entry in self.entries)
        scaled = any(entry.scaled for entry in self.entries)
        return more | {
            "pared": NEWEST if scaled else GROUPS if grouped else STATES if more else VERSION,
            "tensors": [entry.to_json() for entry in self.entries],
            "modules": {name: dict(activation) for name, activation in self.modules.items()},
            "provenance": dict(self.provenance),
        }

    def to_bytes(self) -> bytes:
        """The index record: compact JSON with sorted keys, compressed.

        Raises:
            ValueError: the provenance holds NaN or infinity, which JSON cannot express.
        """
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return zlib.compress(text.encode("utf-8"), 9)
