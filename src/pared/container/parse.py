"""From the bytes of an index to its values, or an error that says what is wrong with it and where.

Every size is computed anew from shapes and types, with Python's unbounded integers; what a file claims is
only compared with it. Nothing that an index says is believed before all of it has been checked.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Final

from pared.container.checks import Place
from pared.container.envelope import Records
from pared.container.index import ALIGNMENT, ITEM_SIZES, VERSION, Entry, Index, Part
from pared.entropy import Coding
from pared.errors import CorruptError, VersionError

_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")

# The fields of each format beside its tag, with their values.
_FORMATS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "grid": {"codes": ("int8", "int16")},
    "float": {"dtype": ("float16", "bfloat16", "float32")},
    "raw": {},
}

# The parts that hold the numbers of each format, in the order of the file.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "grid": ("codes", "step"),
    "float": ("values",),
    "raw": ("values",),
}

# The range that each mode of an int8 counterpart has.
_MODES: Final[Mapping[str, tuple[str, ...]]] = {"static": ("low", "high"), "dynamic": (), "gather": ()}

# What an index may take, inflated: more than any model needs, less than hurts.
_LARGEST_TEXT: Final = 64 << 20
_LEAST_TEXT: Final = 1 << 20
_TEXT_PER_BYTE: Final = 16  # beyond the least, for each byte of the records

# Codes that are all equal take no bytes, so that nothing in the file bounds their number; this does.
LARGEST_CONSTANT: Final = 1 << 28
_SYMBOLS_PER_BYTE: Final = 8  # a Huffman code has at least one bit


def parse_index(records: Records) -> Index:
    """Read and check the index of an artifact; the checksums of parts are left to whoever reads the parts.

    Raises:
        CorruptError: the index contradicts itself or the data.
        UnsafeError: it, or a stream that it describes, would inflate beyond what sound bytes can hold.
        VersionError: a newer version wrote it.
    """
    size = len(records.index) + len(records.data)
    bound = min(_LARGEST_TEXT, _LEAST_TEXT + _TEXT_PER_BYTE * size)
    at = Place(records.where)
    return _index(_inflate(records.index, bound, at), records.data, at)


def _inflate(record: bytes, bound: int, at: Place) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(record, bound)
    except zlib.error as error:
        at.fail(f"its index does not inflate: {error}")
    if not stream.eof:
        if len(text) >= bound:
            at.refuse(f"its index inflates to more than {bound:,} bytes")
        at.fail("its index is truncated")
    if stream.unused_data:
        at.fail("its index has bytes behind its end")
    return text


def _index(text: bytes, data: memoryview, at: Place) -> Index:
    top = at.mapping(at.json(text, "its index"), "its index")
    _check_version(top.get("pared"), at)
    at.fields(top, "its index", ("pared", "tensors", "modules", "provenance"))
    entries = tuple(_entry(entry, at) for entry in at.sequence(top["tensors"], "the list of tensors"))
    modules = {name: _module(name, value, at) for name, value in at.mapping(top["modules"], "modules").items()}
    _check_names(entries, at)
    _check_layout(entries, data, at)
    return Index(entries, modules, at.mapping(top["provenance"], "provenance"))


def _check_version(version: object, at: Place) -> None:
    if type(version) is not int or version < 1:
        at.fail("its index does not say which version of the format it has")
    if version > VERSION:
        raise VersionError(
            f"has version {version} of the format, and this pared reads up to {VERSION}",
            where=at.place,
            remedy="Install a newer pared: pip install --upgrade pared",
        )


def _entry(value: object, at: Place) -> Entry:
    name = at.text(at.mapping(value, "an entry of its index").get("name"), "the name of a tensor")
    at = Place(f"{at.place}: {name}")
    required = ("name", "kind", "dtype", "shape", "format", "because", "parts")
    known = at.fields(value, "its entry", required, ("aliases", "bits", "view"))
    aliases = at.sequence(known.get("aliases", []), "the list of its aliases")
    dtype = at.one_of(known["dtype"], ITEM_SIZES, "its dtype")
    shape = at.shape(known["shape"], "shape")
    format = _format(known["format"], dtype, at)
    entry = Entry(
        names=(name, *(at.text(alias, "an alias") for alias in aliases)),
        kind=at.one_of(known["kind"], ("parameter", "buffer"), "its kind"),
        dtype=dtype,
        shape=shape,
        format=format,
        view=_view(known, shape, format["tag"], at),
        bits=at.number(known["bits"], "its bits") if "bits" in known else None,
        because=at.text(known["because"], "its reason"),
        parts=_parts(known["parts"], format["tag"], at),
    )
    _check_sizes(entry, at)
    return entry


def _format(value: object, dtype: str, at: Place) -> dict[str, str]:
    tag = at.one_of(at.mapping(value, "its format").get("tag"), _FORMATS, "its format")
    known = at.fields(value, "its format", ("tag", *_FORMATS[tag]))
    if tag != "raw" and dtype not in _FLOATS:
        at.fail(f"its format is {tag}, which cannot hold {dtype}")
    return {"tag": tag, **{key: at.one_of(known[key], legal, key) for key, legal in _FORMATS[tag].items()}}


def _view(
    entry: dict[str, Any], shape: tuple[int, ...], tag: str, at: Place
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if tag != "grid":
        return at.fail("it has a view, which only a grid has") if "view" in entry else None
    if "view" not in entry:
        known = {"split": list(shape), "rows": [0]}
    else:
        known = at.fields(entry["view"], "its view", ("split", "rows"))
    split, rows = at.shape(known["split"], "split"), at.shape(known["rows"], "rows")
    in_order = list(rows) == sorted(set(rows)) and all(row < len(split) for row in rows)
    if math.prod(split) != math.prod(shape) or not in_order:
        at.fail(f"its view (split {list(split)}, rows {list(rows)}) does not fit shape {list(shape)}")
    return split, rows


def _parts(value: object, tag: str, at: Place) -> dict[str, Part]:
    known = at.fields(value, "the object of its parts", _PARTS[tag])
    return {name: _part(name, known[name], at) for name in _PARTS[tag]}


def _part(name: str, value: object, at: Place) -> Part:
    known = at.fields(value, f"its {name}", ("offset", "length", "crc32"), ("coding",) if name == "codes" else ())
    try:
        coding = Coding.from_json(known["coding"]) if "coding" in known else None
    except CorruptError as error:
        at.fail(error.what)
    offset, length = (at.whole(known[key], f"the {key} of its {name}") for key in ("offset", "length"))
    return Part(offset, length, at.whole(known["crc32"], f"the crc32 of its {name}", 1 << 32), coding)


def _module(name: str, value: object, at: Place) -> dict[str, Any]:
    """How a counterpart treats its input; only a static one has a range, which holds zero."""
    what = f"module {at.text(name, 'the name of a module')!r}"
    mode = at.one_of(at.mapping(value, what).get("mode"), _MODES, f"the mode of {what}")
    known = at.fields(value, what, ("mode", *_MODES[mode]))
    low, high = (at.number(known.get(key, 0), f"the {key} of {what}") for key in ("low", "high"))
    if not low <= 0 <= high:
        at.fail(f"{what} has a range that does not hold zero")
    return known


def _check_sizes(entry: Entry, at: Place) -> None:
    """Compare each part's length with what shape and type need; bound what coded codes may inflate to."""
    if entry.view is None:
        _check_length(entry, "values", entry.elements * ITEM_SIZES[entry.format.get("dtype", entry.dtype)], at)
        return
    split, rows = entry.view
    _check_length(entry, "step", 4 * math.prod(split[row] for row in rows), at)
    codes = entry.parts["codes"]
    if codes.coding is None:
        _check_length(entry, "codes", entry.elements * ITEM_SIZES[entry.format["codes"]], at)
    elif codes.coding.constant is not None:
        _check_length(entry, "codes", 0, at)
    elif entry.elements > (most := codes.length * _SYMBOLS_PER_BYTE * codes.coding.per_symbol):
        at.refuse(f"declares {entry.elements:,} codes, and its {codes.length:,} bytes hold at most {most:,}")


def _check_length(entry: Entry, name: str, expected: int, at: Place) -> None:
    found = entry.parts[name].length
    if found != expected:
        at.fail(f"its {name} has {found:,} bytes where shape {list(entry.shape)} needs {expected:,}")


def _check_names(entries: tuple[Entry, ...], at: Place) -> None:
    seen: set[str] = set()
    for name in (name for entry in entries for name in entry.names):
        if name in seen:
            at.fail(f"two tensors have the name {name!r}")
        seen.add(name)


def _check_layout(entries: tuple[Entry, ...], data: memoryview, at: Place) -> None:
    """Parts follow each other on 64-byte boundaries, with zeros between them and nothing behind the last."""
    end = constant = 0
    for entry in entries:
        here = Place(f"{at.place}: {entry.name}")
        for name, part in entry.parts.items():
            start = end + -end % ALIGNMENT
            if part.offset != start:
                here.fail(f"its {name} is said to begin at byte {part.offset:,} of the data, where {start:,} is due")
            if start + part.length > len(data):
                here.fail(f"its {name} ends at byte {start + part.length:,} of the data, which has {len(data):,}")
            if any(data[end:start]):
                here.fail(f"the padding before its {name} is not zero")
            end = start + part.length
            constant += entry.elements if part.coding is not None and part.coding.constant is not None else 0
            if constant > LARGEST_CONSTANT:
                here.refuse(f"with it, more than {LARGEST_CONSTANT:,} codes take no bytes")
    if end != len(data):
        at.fail(f"its data has {len(data):,} bytes, of which its index accounts for {end:,}")
