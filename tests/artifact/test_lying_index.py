"""An index that lies is refused, and every kind of lie has its own words."""

import pytest

from pared.artifact.index import start_of
from pared.errors import CorruptError, VersionError
from tests.artifact.artifacts import (
    CLASSED,
    CODED,
    COUNT,
    DAMAGED,
    DATA,
    FIRST_DATA,
    HALF,
    INDEX,
    NONE,
    PLAIN,
    SCALED,
    WIDE,
    Edit,
    Json,
    at,
    edited,
    first_json,
    parse_record,
    top,
    without,
)

# In both versions.
LIES: dict[str, tuple[Edit, str]] = {
    "no list of tensors": (without("tensors"), "file: its index lacks 'tensors'"),
    "an unknown key": (top(more=1), "file: its index has an unknown field 'more'"),
    "no version": (without("pared"), "file: its index does not state a version of the format"),
    "version zero": (top(pared=0), "file: its index does not state a version of the format"),
    "version true": (top(pared=True), "file: its index does not state a version of the format"),
    "tensors by name": (top(tensors={}), "file: the list of tensors is not a list"),
    "an entry that is none": (top(tensors=[3]), "file: an entry of its index is not an object"),
    "a name that is none": (at(PLAIN, "name")(7), "file: the name of a tensor is not printable text"),
    "half a character": (at(PLAIN, "name")("\ud800"), "file: the name of a tensor is not printable text"),
    "one name twice": (at(PLAIN, "name")("coded"), "file: two tensors have the name 'coded'"),
    "an alias that is a name": (at(HALF, "aliases")(["plain"]), "file: two tensors have the name 'plain'"),
    "an unknown kind": (at(PLAIN, "kind")("x"), "file: plain: its kind 'x' is not one of parameter, buffer"),
    "an unhashable kind": (at(PLAIN, "kind")([]), "file: plain: its kind is not printable text"),
    "an unknown dtype": (
        at(COUNT, "dtype")("int128"),
        "file: count: its dtype 'int128' is not one of bool, uint8, int8, int16, int32, int64, float16, bfloat16, "
        "float32, float64, complex64, complex128",
    ),
    "an unknown format": (
        at(PLAIN, "format")({"tag": "mesh"}),
        "file: plain: its format 'mesh' is not one of grid, float, raw",
    ),
    "an unknown code type": (
        at(PLAIN, "format")({"tag": "grid", "codes": "int4"}),
        "file: plain: codes 'int4' is not one of int8, int16",
    ),
    "a grid of integers": (
        at(PLAIN, "dtype")("int32"),
        "file: plain: its format is grid, which cannot hold int32",
    ),
    "a field too many": (at(PLAIN, "zero")(0), "file: plain: its entry has an unknown field 'zero'"),
    "a part too many": (
        at(HALF, "parts", "step")({}),
        "file: half: the object of its parts has an unknown field 'step'",
    ),
    "a part too few": (
        lambda index: index["tensors"][PLAIN]["parts"].pop("step"),
        "file: plain: the object of its parts lacks 'step'",
    ),
    "a negative size": (
        at(PLAIN, "shape")([-3, -4]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a size that is not an integer": (
        at(PLAIN, "shape")([3.0, 4]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a size that is a truth": (
        at(PLAIN, "shape")([True, 12]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a huge shape": (at(PLAIN, "shape")([2**40, 2**40]), "file: plain: its shape is larger than any tensor"),
    "a huge empty shape": (
        at(PLAIN, "shape")([0, 2**40, 2**40]),
        "file: plain: its shape is larger than any tensor",
    ),
    "too many dimensions": (at(PLAIN, "shape")([1] * 65), "file: plain: its shape is larger than any tensor"),
    "a view of another size": (
        at(PLAIN, "view")({"split": [3, 5], "rows": [0]}),
        "file: plain: its view (split [3, 5], rows [0]) does not fit shape [3, 4]",
    ),
    "a row that is not a dimension": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [2]}),
        "file: plain: its view (split [3, 4], rows [2]) does not fit shape [3, 4]",
    ),
    "a row twice": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [1, 1]}),
        "file: plain: its view (split [3, 4], rows [1, 1]) does not fit shape [3, 4]",
    ),
    "a view of plain values": (
        at(HALF, "view")({"split": [3], "rows": [0]}),
        "file: half: it has a view, which only a grid has",
    ),
    "bits that are none": (at(PLAIN, "bits")("8"), "file: plain: its bits is not a finite number"),
    "infinite bits": (at(PLAIN, "bits")(1e999), "file: its index is not valid JSON: Infinity is not a number"),
    "an unknown coding": (
        at(CODED, "parts", "codes", "coding")({"per_symbol": 5}),
        "file: coded: {'per_symbol': 5} is not a coding",
    ),
    "a coding with more": (
        at(CODED, "parts", "codes", "coding")({"per_symbol": 1, "x": 1}),
        "file: coded: {'per_symbol': 1, 'x': 1} is not a coding",
    ),
    "an unknown mode": (
        top(modules={"a": {"mode": "fast"}}),
        "file: the mode of module 'a' 'fast' is not one of static, dynamic, gather",
    ),
    "a range that is none": (
        top(modules={"a": {"mode": "static", "low": 1, "high": 2}}),
        "file: module 'a' has a range without zero, or beyond float32",
    ),
    "a range where none belongs": (
        top(modules={"a": {"mode": "dynamic", "low": 0}}),
        "file: module 'a' has an unknown field 'low'",
    ),
    "a provenance that is none": (top(provenance=[]), "file: provenance is not an object"),
}

# Where parts stand, in version 1.
FIRST_LIES: dict[str, tuple[Edit, str]] = {
    "another shape": (
        at(HALF, "shape")([4]),
        "file: half: its values has 6 bytes where shape [4] needs 8",
    ),
    "other rows": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [0]}),
        "file: plain: its step has 16 bytes where shape [3, 4] needs 12",
    ),
    "a step that is coded": (
        at(PLAIN, "parts", "step", "coding")({"constant": 0}),
        "file: plain: its step has an unknown field 'coding'",
    ),
    "a constant with bytes": (
        at(PLAIN, "parts", "codes", "coding")({"constant": 0}),
        "file: plain: its codes has 12 bytes where shape [3, 4] needs 0",
    ),
    "a checksum beyond 32 bits": (
        at(PLAIN, "parts", "codes", "crc32")(2**32),
        f"file: plain: the crc32 of its codes is not an integer from 0 to {2**32 - 1}",
    ),
    "an offset between boundaries": (
        at(PLAIN, "parts", "codes", "offset")(129),
        "file: plain: its codes begins at byte 129 of the data, not at byte 128",
    ),
    "an overlap": (
        at(PLAIN, "parts", "step", "offset")(128),
        "file: plain: its step begins at byte 128 of the data, not at byte 192",
    ),
    "a missing tensor at the end": (
        lambda index: [index["tensors"].pop() for _ in range(2)],
        f"file: its data has {len(FIRST_DATA):,} bytes, of which its index accounts for 326",
    ),
    "a part that has no checksum": (
        lambda index: index["tensors"][PLAIN]["parts"]["step"].pop("crc32"),
        "file: plain: its step lacks 'crc32'",
    ),
    "a checksum of all": (at(PLAIN, "crc32")(1), "file: plain: its entry has an unknown field 'crc32'"),
    "classes": (
        at(PLAIN, "parts", "classes")({}),
        "file: plain: the object of its parts has an unknown field 'classes'",
    ),
}


def nothing_in_classes(entry: Json) -> Json:
    """Two rows without a number, each in a class of its own."""
    parts = {"classes": {}, "codes 0": {"rows": 1}, "codes 1": {"rows": 1}, "step": {}}
    return entry | {"shape": [2, 0], "view": {"split": [2, 0], "rows": [0]}, "parts": parts}


# What parts say, in version 2.
SECOND_LIES: dict[str, tuple[Edit, str]] = {
    "an offset": (at(HALF, "parts", "values", "offset")(0), "file: half: its values has an unknown field 'offset'"),
    "a length that follows from the shape": (
        at(HALF, "parts", "values", "length")(6),
        "file: half: its values has an unknown field 'length'",
    ),
    "a length of plain codes": (
        at(PLAIN, "parts", "codes", "length")(12),
        "file: plain: its codes has a length, which coded parts have, and only they",
    ),
    "a length of equal codes": (
        at(WIDE, "parts", "codes", "length")(0),
        "file: wide: its codes has a length, which coded parts have, and only they",
    ),
    "no length of coded codes": (
        lambda index: index["tensors"][CODED]["parts"]["codes"].pop("length"),
        "file: coded: its codes lacks a length, which coded parts have, and only they",
    ),
    "a length that is none": (
        at(CODED, "parts", "codes", "length")(-1),
        f"file: coded: the length of its codes is not an integer from 0 to {2**63 - 1}",
    ),
    "no checksum": (
        lambda index: index["tensors"][PLAIN].pop("crc32"),
        "file: plain: its entry lacks 'crc32'",
    ),
    "a checksum beyond 32 bits": (
        at(PLAIN, "crc32")(2**32),
        f"file: plain: its crc32 is not an integer from 0 to {2**32 - 1}",
    ),
    "a checksum of one part": (
        at(PLAIN, "parts", "codes", "crc32")(1),
        "file: plain: its codes has an unknown field 'crc32'",
    ),
    "another shape": (
        at(NONE, "shape")([100, 500]),
        f"file: none: its values ends at byte {start_of(INDEX.entries[COUNT].end, 50_000) + 50_000:,} of the "
        f"data, which has {len(DATA):,}",
    ),
    "a missing tensor at the end": (
        lambda index: index["tensors"].pop(),
        f"file: its data has {len(DATA):,} bytes, of which its index accounts for {INDEX.entries[SCALED].end}",
    ),
    "coded steps without a base": (
        lambda index: index["tensors"][CLASSED]["parts"]["step"].pop("base"),
        "file: classed: its step is coded but has no base",
    ),
    "a base that is none": (
        at(SCALED, "parts", "step", "base")(1.0),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base that is a truth": (
        at(SCALED, "parts", "step", "base")(True),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base too high": (
        at(SCALED, "parts", "step", "base")(1024),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base too low": (
        at(SCALED, "parts", "step", "base")(-1009),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base of codes": (
        at(SCALED, "parts", "codes", "base")(0),
        "file: scaled: its codes has an unknown field 'base'",
    ),
    "an unknown coding of steps": (
        at(SCALED, "parts", "step", "coding")({"per_symbol": 7}),
        "file: scaled: {'per_symbol': 7} is not a coding",
    ),
    "rows of all codes": (
        at(PLAIN, "parts", "codes", "rows")(3),
        "file: plain: its codes has an unknown field 'rows'",
    ),
    "classes of plain values": (
        at(HALF, "parts", "classes")({}),
        "file: half: the object of its parts has an unknown field 'classes'",
    ),
    "classes beside all codes": (
        at(PLAIN, "parts", "classes")({}),
        "file: plain: the object of its parts lacks 'codes 0'",
    ),
    "a class without rows": (
        lambda index: index["tensors"][CLASSED]["parts"]["codes 0"].pop("rows"),
        "file: classed: its codes 0 lacks 'rows'",
    ),
    "a class missing": (
        lambda index: index["tensors"][CLASSED]["parts"].pop("codes 0"),
        "file: classed: the object of its parts lacks 'codes 0'",
    ),
    "three classes": (
        at(CLASSED, "parts", "codes 2")({"rows": 1}),
        "file: classed: the object of its parts has an unknown field 'codes 2'",
    ),
    "a fourth of three classes": (
        at(CLASSED, "parts", "codes 3")({"rows": 1}),
        "file: classed: the object of its parts lacks 'codes 2'",
    ),
    "too few rows": (
        at(CLASSED, "parts", "codes 0", "rows")(89),
        "file: classed: its classes have [89, 30] rows where shape [60, 2, 3] has 120",
    ),
    "classes of nothing": (
        lambda index: index["tensors"].__setitem__(CLASSED, nothing_in_classes(index["tensors"][CLASSED])),
        "file: classed: its classes have [1, 1] rows where shape [2, 0] has 0",
    ),
    "an empty class": (
        lambda index: [
            index["tensors"][CLASSED]["parts"][name].update(rows=rows)
            for name, rows in (("codes 0", 120), ("codes 1", 0))
        ],
        "file: classed: its classes have [120, 0] rows where shape [60, 2, 3] has 120",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(lie: str) -> None:
    edit, words = LIES[lie]
    for known, data in ((INDEX.to_json(), DATA), (first_json(), FIRST_DATA)):
        with pytest.raises(CorruptError) as error:
            parse_record(edited(edit, known), data)
        assert str(error.value) == f"{words}\n  {DAMAGED}"


@pytest.mark.parametrize("lie", FIRST_LIES)
def test_parts_of_version_1_that_lie_are_refused(lie: str) -> None:
    edit, words = FIRST_LIES[lie]
    with pytest.raises(CorruptError) as error:
        parse_record(edited(edit, first_json()), FIRST_DATA)
    assert str(error.value) == f"{words}\n  {DAMAGED}"


@pytest.mark.parametrize("lie", SECOND_LIES)
def test_parts_of_version_2_that_lie_are_refused(lie: str) -> None:
    edit, words = SECOND_LIES[lie]
    with pytest.raises(CorruptError) as error:
        parse_record(edited(edit))
    assert str(error.value) == f"{words}\n  {DAMAGED}"


def test_a_newer_version_is_refused_before_anything_else() -> None:
    with pytest.raises(VersionError) as error:
        parse_record(edited(lambda index: index.update(pared=6, novelty={})))
    assert str(error.value) == (
        "file: has version 6 of the format, and this pared reads up to 5\n"
        "  Install a newer pared: pip install --upgrade pared"
    )
