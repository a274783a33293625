"""Where the parts of tensors stand, in all versions of the format: parsed, placed, and compared with the data.

The size that a part may decompress to is bounded here, before memory is allocated for it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pared.artifact.index import Entry, Part, start_of
from pared.errors import CorruptError
from pared.files.checks import Place
from pared.formats.dtypes import ITEM_SIZES
from pared.formats.entropy import Coding
from pared.formats.groups.stored import FLOATS
from pared.formats.streams import STEP_INDEXES, STEPS, EncodedPart

# Codes that are all equal take no bytes, so that the file does not bound their number; this does.
LARGEST_CONSTANT: Final = 1 << 28
_SYMBOLS_PER_BYTE: Final = 8  # a Huffman code has at least one bit

_BITS: Final = range(-(1 << 15), 1 << 15)  # of a float of 16 bits, as a whole number

# The parts that hold codes, by the number of classes into which rows are divided.
_CLASSED: Final[Mapping[int, tuple[str, ...]]] = {
    count: ("classes", *(f"codes {number}" for number in range(count))) for count in (8, 4, 2)
}


def parse_parts(entry: Entry, known: Mapping[str, Any], version: int, end: int, at: Place) -> dict[str, Part]:
    """Parse the parts of an entry, in the order of the data.

    Args:
        entry: the entry, still without parts.
        known: its fields in the index.
        version: the format's.
        end: the offset after the part before.
        at: the entry's place.
    """
    fields = at.mapping(known["parts"], "the object of its parts")
    names = _names(entry, fields, version)
    at.fields(fields, "the object of its parts", names)
    parts: dict[str, Part] = {}
    for name in names:
        if version == 1:
            part = _first_version(name, fields[name], end, at)
        else:
            crc32 = at.whole(known["crc32"], "its crc32", 1 << 32) if name == names[-1] else None
            part = _part(entry, name, fields[name], crc32, end, at)
        _check_size(entry, name, part, at)
        parts[name] = part
        end = part.end
    rows = [part.rows for part in parts.values() if part.rows is not None]
    due = entry.n_lines if entry.elements else 0
    if rows and (sum(rows) != due or min(rows) < 1):
        lines = "columns" if entry.scaled else "rows"
        at.fail(f"its classes have {rows} {lines} where shape {list(entry.shape)} has {due:,}")
    return parts


def _names(entry: Entry, fields: Mapping[str, Any], version: int) -> tuple[str, ...]:
    if entry.view is None:
        return ("values",)
    beside = sorted(entry.shapes.keys() - {"codes"}) or (STEPS if entry.scaled else ["step"])
    if version == 1 or "classes" not in fields:
        return ("codes", *beside)
    return (*next((names for names in _CLASSED.values() if names[-1] in fields), _CLASSED[2]), *beside)


def _first_version(name: str, value: object, end: int, at: Place) -> Part:
    """A part of version 1, which states its place."""
    known = at.fields(value, f"its {name}", ("offset", "length", "crc32"), ("coding",) if name == "codes" else ())
    offset, length = (at.whole(known[key], f"the {key} of its {name}") for key in ("offset", "length"))
    crc32 = at.whole(known["crc32"], f"the crc32 of its {name}", 1 << 32)
    if offset != (start := start_of(end, length, version=1)):
        at.fail(f"its {name} begins at byte {offset:,} of the data, not at byte {start:,}")
    return Part(offset, length, crc32, _coding(known, at))


def _part(entry: Entry, name: str, value: object, crc32: int | None, end: int, at: Place) -> Part:
    """A part of version 2, whose place follows from the parts before it."""
    optional: tuple[str, ...] = ("coding", "length")
    if name == "values" or (name in FLOATS and entry.format.get("step") == "float32"):
        optional = ()
    elif name in (*FLOATS, *STEPS):
        optional = ("base", *optional)
    known = at.fields(value, f"its {name}", ("rows",) if name.startswith("codes ") else (), optional)
    coding = _coding(known, at)
    rows = at.whole(known["rows"], f"the rows of its {name}") if "rows" in known else None
    bases = STEP_INDEXES if entry.groups is None else _BITS
    base = at.within(known["base"], f"the base of its {name}", bases) if "base" in known else None
    if name in STEPS and entry.groups is None and base is None and known:
        at.fail(f"its {name} is coded but has no base")
    varies = coding is not None and coding.constant is None
    if varies != ("length" in known):
        at.fail(f"its {name} {'lacks' if varies else 'has'} a length, which coded parts have, and only they")
    if varies:
        length = at.whole(known["length"], f"the length of its {name}")
    else:
        length = 0 if coding is not None else math.prod(_extent(entry, name, rows, base))
    return Part(start_of(end, length), length, crc32, coding, rows, base)


def _coding(known: Mapping[str, Any], at: Place) -> Coding | None:
    try:
        return Coding.from_json(known["coding"]) if "coding" in known else None
    except CorruptError as error:
        at.fail(error.what)


def _extent(entry: Entry, name: str, rows: int | None, base: int | None) -> tuple[int, int]:
    """The number of values in a part with that number of rows and this base, and the bytes of one of plain values."""
    if name == "values":
        return entry.elements, ITEM_SIZES[entry.format.get("dtype", entry.dtype)]
    if name in entry.shapes and name != "codes" and entry.groups is not None:
        return math.prod(entry.shapes[name]), ITEM_SIZES[entry.groups.step] if name in FLOATS else 1
    if name in STEPS:
        return entry.n_rows if name == "step" else entry.n_columns, 4 if base is None else 1
    if name == "classes":
        return entry.n_lines, 1
    count = entry.elements if rows is None else rows * (entry.elements // max(entry.n_lines, 1))
    return count, ITEM_SIZES[entry.format.get("codes", "int8")]


def _check_size(entry: Entry, name: str, part: Part, at: Place) -> None:
    """Compare a part's length with what its values need; bound the size that coded ones may decompress to."""
    count, size = _extent(entry, name, part.rows, part.base)
    if part.coding is not None and part.varies:
        if count > (most := part.length * _SYMBOLS_PER_BYTE * part.coding.per_symbol):
            at.refuse(f"declares {count:,} codes, and the {part.length:,} bytes of its {name} hold at most {most:,}")
    elif part.length != (needed := count * size if part.coding is None else 0):
        at.fail(f"its {name} has {part.length:,} bytes where shape {list(entry.shape)} needs {needed:,}")


def check_data(entries: Iterable[Entry], data: memoryview, at: Place) -> None:
    """Check that parts follow one another with only zeros between them and nothing after the last.

    Raises:
        CorruptError: they do not.
        UnsafeError: too many numbers take no bytes.
    """
    end = constant = 0
    for entry in entries:
        here = Place(f"{at.place}: {entry.name}")
        for name, part in entry.parts.items():
            if part.end > len(data):
                here.fail(f"its {name} ends at byte {part.end:,} of the data, which has {len(data):,}")
            if any(data[end : part.offset]):
                here.fail(f"the padding before its {name} is not zero")
            end = part.end
            if part.coding is not None and part.coding.constant is not None:
                constant += _extent(entry, name, part.rows, part.base)[0]
            if constant > LARGEST_CONSTANT:
                here.refuse(f"with it, more than {LARGEST_CONSTANT:,} codes take no bytes")
    if end != len(data):
        at.fail(f"its data has {len(data):,} bytes, of which its index accounts for {end:,}")


def placed(parts: Mapping[str, EncodedPart], end: int, factor: float = 1.0) -> dict[str, Part]:
    """Where the parts of a tensor stand in the data after a part that ends at `end`, with their checksum.

    Args:
        parts: their bytes, by name, in the order of the data.
        end: the offset after the part before.
        factor: for estimates from a sample: how many times as long as these the parts will be.
    """
    found, crc32 = {}, 0
    for i, (name, part) in enumerate(parts.items()):
        length = round(len(part.payload) * factor)
        start = start_of(end, length)
        crc32 = zlib.crc32(part.payload, crc32)
        checksum = crc32 if i == len(parts) - 1 else None
        found[name] = Part(start, length, checksum, part.coding, part.rows, part.base)
        end = start + length
    return found


def parts_of(entry: Entry, data: memoryview) -> dict[str, EncodedPart]:
    """Read the parts of a tensor of an artifact, and compare their checksums.

    Raises:
        CorruptError: they do not match.
    """
    found, crc32 = {}, 0
    for name, part in entry.parts.items():
        payload = data[part.offset : part.end]
        crc32 = zlib.crc32(payload, crc32)
        if part.crc32 is not None:
            if crc32 != part.crc32:
                raise CorruptError("the checksum of its numbers does not match", where=entry.name)
            crc32 = 0
        found[name] = EncodedPart(payload, part.coding, part.rows, part.base)
    return found
