"""Parse the bytes of an index, or raise an error that says what is wrong with it and where.

Every size is computed from shapes and types, with Python's unbounded integers, and only compared with what the file
says. No part of an index is used before all of it has been checked.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pared.artifact.beside.states import check_states, parse_made
from pared.artifact.envelope import Records
from pared.artifact.index import GROUPS, NEWEST, STATE, STATES, Entry, Index, Part
from pared.artifact.parts import check_data, parse_parts
from pared.errors import VersionError
from pared.files.checks import Place
from pared.formats.dtypes import FLOATING, ITEM_SIZES
from pared.formats.grids import CODE_LIMITS
from pared.formats.groups.grid import GroupGrid

# The required fields of an entry, by version.
_COMMON: Final = frozenset(("name", "kind", "dtype", "shape", "format", "because", "parts"))
_LATER: Final = _COMMON | {"crc32"}
_REQUIRED: Final[Mapping[int, frozenset[str]]] = {1: _COMMON, 2: _LATER, 3: _LATER, 4: _LATER, 5: _LATER}
_VIEW: Final = frozenset(("split", "rows"))

# The fields of each format in addition to its tag, with their legal values.
_FORMATS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "grid": {"codes": tuple(CODE_LIMITS)},
    "float": {"dtype": ("float16", "bfloat16", "float32")},
    "raw": {},
}

# What a format with groups may leave out; the legal values of texts.
_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "zero": ("code", "least"),
    "step": ("bfloat16", "float32"),
    "nested": (),
    "multiple_bits": (),
    "signed": (),
}
_LARGEST_GROUP: Final = 1 << 48  # columns

# The range that each mode of an int8 counterpart has.
_MODES: Final[Mapping[str, tuple[str, ...]]] = {"static": ("low", "high"), "dynamic": (), "gather": ()}

_LARGEST_FLOAT: Final = 2.0**128 - 2.0**104  # of float32

# The bounds of a decompressed index, in bytes: more than any model needs.
_LARGEST_TEXT: Final = 64 << 20
_LEAST_TEXT: Final = 1 << 20
_TEXT_PER_BYTE: Final = 16  # in addition to the least, for each byte of the records


def parse_index(records: Records) -> Index:
    """Read and check the index of an artifact; the checksums of parts are compared when the parts are read.

    Raises:
        CorruptError: the index contradicts itself or the data.
        UnsafeError: it, or a stream that it describes, would decompress to more than valid files contain.
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
        at.fail("its index has bytes after its end")
    return text


def _index(text: bytes, data: memoryview, at: Place) -> Index:
    top = at.mapping(at.json(text, "its index"), "its index")
    version = _version(top.get("pared"), at)
    more = ("states", "made") if version >= STATES else ()
    at.fields(top, "its index", ("pared", "tensors", "modules", "provenance"), more)
    entries: list[Entry] = []
    for entry in at.sequence(top["tensors"], "the list of tensors"):
        entries.append(_entry(entry, version, entries[-1].end if entries else 0, at))
    modules = {name: _module(name, value, at) for name, value in at.mapping(top["modules"], "modules").items()}
    states = at.mapping(top.get("states", {}), "states")
    check_states(states, entries, at)
    made = parse_made(top.get("made", []), at)
    _check_names(
        [*(name for entry in entries for name in entry.names), *(name for one in made for name in one["names"])], at
    )
    check_data(entries, data, at)
    return Index(tuple(entries), modules, at.mapping(top["provenance"], "provenance"), states, made)


def parse_entry(value: object, end: int, at: Place) -> Entry:
    """Parse one entry of an index of the newest version.

    Args:
        value: the entry, as JSON.
        end: the offset after the last part of the entry before it.
        at: the index's place.

    Raises:
        CorruptError, UnsafeError: as for a whole index.
    """
    return _entry(value, NEWEST, end, at)


def _version(version: object, at: Place) -> int:
    if type(version) is not int or version < 1:
        at.fail("its index does not state a version of the format")
    if version > NEWEST:
        raise VersionError(
            f"has version {version} of the format, and this pared reads up to {NEWEST}",
            where=at.place,
            remedy="Install a newer pared: pip install --upgrade pared",
        )
    return version


def _entry(value: object, version: int, end: int, at: Place) -> Entry:
    """Parse an entry, whose first part follows the `end` of the entry before it."""
    name = at.text(at.mapping(value, "an entry of its index").get("name"), "the name of a tensor")
    at = Place(f"{at.place}: {name}")
    known = at.fields(value, "its entry", _REQUIRED[version], ("aliases", "bits", "view"))
    aliases = at.sequence(known.get("aliases", []), "the list of its aliases")
    dtype = at.one_of(known["dtype"], ITEM_SIZES, "its dtype")
    shape = at.shape(known["shape"], "shape")
    format = _format(known["format"], dtype, version, at)
    parts: dict[str, Part] = {}
    entry = Entry(
        names=(name, *(at.text(alias, "an alias") for alias in aliases)),
        kind=at.one_of(known["kind"], ("parameter", "buffer", *((STATE,) if version >= STATES else ())), "its kind"),
        dtype=dtype,
        shape=shape,
        format=format,
        view=_view(known, shape, format["tag"], at),
        bits=at.number(known["bits"], "its bits") if "bits" in known else None,
        because=at.text(known["because"], "its reason"),
        parts=parts,
    )
    parts |= parse_parts(entry, known, version, end, at)  # which needs the rest of the entry
    return entry


def _format(value: object, dtype: str, version: int, at: Place) -> dict[str, Any]:
    tags = (*_FORMATS, *((GroupGrid.tag,) if version >= GROUPS else ()))
    scales = version >= NEWEST
    tag = at.one_of(at.mapping(value, "its format").get("tag"), tags, "its format")
    if tag != "raw" and dtype not in FLOATING:
        at.fail(f"its format is {tag}, which cannot hold {dtype}")
    if tag == GroupGrid.tag:
        return _groups(value, at)
    known = at.fields(value, "its format", ("tag", *_FORMATS[tag]), ("scaled",) if tag == "grid" and scales else ())
    if known.get("scaled", True) is not True:
        at.fail("its scaled is not true, which it is where it stands")
    scaled = {"scaled": True} if "scaled" in known else {}
    return {"tag": tag, **{key: at.one_of(known[key], legal, key) for key, legal in _FORMATS[tag].items()}, **scaled}


def _groups(value: object, at: Place) -> dict[str, Any]:
    """The fields of a grid with groups; what it may leave out has one value that stands for it."""
    known = at.fields(value, "its format", ("tag", "bits", "group"), _GROUPS)
    at.within(known["bits"], "bits", range(2, 9))
    if known["group"] is not None:
        at.within(known["group"], "group", range(1, _LARGEST_GROUP))
    for key in ("zero", "step"):
        if key in known:
            at.one_of(known[key], _GROUPS[key], key)
    nested = [key for key in ("nested", "multiple_bits") if key in known]
    if len(nested) == 1 or ("signed" in known and not nested):
        at.fail("its format needs nested and multiple_bits together, and signed only with them")
    if nested:
        at.within(known["nested"], "nested", range(2, _LARGEST_GROUP))
        at.within(known["multiple_bits"], "multiple_bits", range(2, 9))
    if known.get("signed", True) is not True:
        at.fail("signed is not true, which it is where it stands")
    return known


def _view(
    entry: dict[str, Any], shape: tuple[int, ...], tag: str, at: Place
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if tag not in ("grid", GroupGrid.tag):
        return at.fail("it has a view, which only a grid has") if "view" in entry else None
    if "view" not in entry:
        if not shape:
            at.fail("its view (split [], rows [0]) does not fit shape []")
        return shape, (0,)
    known = at.fields(entry["view"], "its view", _VIEW)
    split, rows = at.shape(known["split"], "split"), at.shape(known["rows"], "rows")
    in_order = list(rows) == sorted(set(rows)) and all(row < len(split) for row in rows)
    if math.prod(split) != math.prod(shape) or not in_order:
        at.fail(f"its view (split {list(split)}, rows {list(rows)}) does not fit shape {list(shape)}")
    return split, rows


def _module(name: str, value: object, at: Place) -> dict[str, Any]:
    """Check how a counterpart treats its input; only a static one has a range, which holds zero."""
    what = f"module {at.text(name, 'the name of a module')!r}"
    mode = at.one_of(at.mapping(value, what).get("mode"), _MODES, f"the mode of {what}")
    more = ("weights", "outliers") if mode == "static" else ("weights",)
    known = at.fields(value, what, ("mode", *_MODES[mode]), more)
    weights = [at.text(one, f"a weight of {what}") for one in at.sequence(known.get("weights", ["weight"]), what)]
    if not weights or len(set(weights)) < len(weights):
        at.fail(f"{what} names a weight twice, or none")
    low, high = (at.number(known.get(key, 0), f"the {key} of {what}") for key in ("low", "high"))
    if not -_LARGEST_FLOAT <= low <= 0 <= high <= _LARGEST_FLOAT:
        at.fail(f"{what} has a range without zero, or beyond float32")
    _check_outliers(known.get("outliers", []), what, at)
    return known


def _check_outliers(value: object, what: str, at: Place) -> None:
    """Check that outliers are (column, number of extra ranges); the weight limits how many, and is checked later."""
    seen = set()
    for pair in at.sequence(value, f"the outliers of {what}"):
        numbers = at.sequence(pair, f"an outlier of {what}")
        if len(numbers) != 2 or any(type(one) is not int for one in numbers) or numbers[0] < 0 or numbers[1] == 0:
            at.fail(f"an outlier of {what} is not a column and a number of ranges")
        side = (numbers[0], numbers[1] > 0)
        if side in seen:
            at.fail(f"{what} has the outlier {numbers[0]} twice")
        seen.add(side)


def _check_names(names: Iterable[str], at: Place) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            at.fail(f"two tensors have the name {name!r}")
        seen.add(name)
