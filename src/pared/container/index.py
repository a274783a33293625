"""The index of an artifact as values: what it holds, and where. `docs/format.md` is the specification."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pared.entropy import Coding

VERSION: Final = 1
ALIGNMENT: Final = 64  # of every part within the data, in bytes

# The element types that an artifact may hold, and the bytes of one element.
ITEM_SIZES: Final[Mapping[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2,
    "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Where one part of a tensor stands in the data.

    Args:
        offset: of its first byte, a multiple of 64.
        length: in bytes.
        crc32: of these bytes, as in zlib.
        coding: how codes are coded; None for plain little-endian values.
    """

    offset: int
    length: int
    crc32: int
    coding: Coding | None = None

    def to_json(self) -> dict[str, Any]:
        """The part as it stands in the index."""
        plain = {"offset": self.offset, "length": self.length, "crc32": self.crc32}
        return plain if self.coding is None else {**plain, "coding": self.coding.to_json()}


@dataclass(frozen=True)
class Entry:
    """One tensor of an artifact.

    Args:
        names: every name it goes by; the first is its name in tables.
        kind: "parameter" or "buffer".
        dtype: the element type of the source, a key of `ITEM_SIZES`.
        shape: of the source.
        format: {"tag": "grid", "codes": ...}, {"tag": "float", "dtype": ...} or {"tag": "raw"}.
        view: for a grid (split, rows): the shape in which codes meet steps, and which dimensions have steps.
        bits: the rate that was asked for, if one was.
        because: the reason for the format.
        parts: "codes" and "step" for a grid, else "values".
    """

    names: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    format: Mapping[str, str]
    view: tuple[tuple[int, ...], tuple[int, ...]] | None
    bits: float | None
    because: str
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def elements(self) -> int:
        """How many numbers the source has."""
        return math.prod(self.shape)

    @property
    def source_nbytes(self) -> int:
        """The bytes of the source's numbers."""
        return self.elements * ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.length for part in self.parts.values())

    @property
    def label(self) -> str:
        """The format's short name for tables: "grid int8", "float32"."""
        if self.format["tag"] == "grid":
            return f"grid {self.format['codes']}"
        return self.format.get("dtype", self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the index."""
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "format": dict(self.format),
            "because": self.because,
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
        entries: one per tensor, in the order of their parts.
        modules: how int8 counterparts treat their input, by module name.
        provenance: plain data for people.

    >>> Index(()).to_json()
    {'pared': 1, 'tensors': [], 'modules': {}, 'provenance': {}}
    """

    entries: tuple[Entry, ...]
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The index as plain data."""
        return {
            "pared": VERSION,
            "tensors": [entry.to_json() for entry in self.entries],
            "modules": {name: dict(activation) for name, activation in self.modules.items()},
            "provenance": dict(self.provenance),
        }

    def to_bytes(self) -> bytes:
        """The index record: compact JSON with sorted keys, compressed.

        Raises:
            ValueError: the provenance holds NaN or infinity, for which JSON has no word.
        """
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return zlib.compress(text.encode("utf-8"), 9)
