"""An index that is damaged, in any place: an error of ours, or an index that is sound for the data there are."""

import copy
import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.artifact.index import start_of
from pared.errors import CorruptError, ParedError
from tests.artifact.artifacts import DAMAGED, DATA, FIRST_DATA, INDEX, edited, first_json, parse_record

RECORDS = {
    "no zlib stream": (
        b"{}",
        "its index does not inflate: Error -3 while decompressing data: incorrect header check",
    ),
    "half a stream": (INDEX.to_bytes()[:-20], "its index is truncated"),
    "bytes behind it": (INDEX.to_bytes() + b"x", "its index has bytes after its end"),
    "no JSON": (
        zlib.compress(b"{]"),
        "its index is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "a list": (zlib.compress(b"[]"), "its index is not an object"),
    "a key twice": (
        zlib.compress(b'{"pared":1,"pared":1}'),
        "its index is not valid JSON: an object has the same key twice",
    ),
    "not a number": (zlib.compress(b'{"pared":NaN}'), "its index is not valid JSON: NaN is not a number"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_no_index_is_refused(kind: str) -> None:
    record, words = RECORDS[kind]
    with pytest.raises(CorruptError) as error:
        parse_record(record)
    assert str(error.value) == f"file: {words}\n  {DAMAGED}"


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'"' + b"9" * 9000, b"9" * 9000])
def test_json_that_breaks_parsers_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptError, match="its index is no"):
        parse_record(zlib.compress(text))


def test_padding_that_is_not_zero_is_refused() -> None:
    data = bytearray(FIRST_DATA)
    data[127] = 1
    with pytest.raises(CorruptError) as error:
        parse_record(edited(lambda _: None, first_json()), bytes(data))
    assert str(error.value) == f"file: plain: the padding before its codes is not zero\n  {DAMAGED}"
    data = bytearray(DATA)
    data[INDEX.entries[-1].parts["values"].offset - 1] = 1
    with pytest.raises(CorruptError) as error:
        parse_record(INDEX.to_bytes(), bytes(data))
    assert str(error.value) == f"file: large: the padding before its values is not zero\n  {DAMAGED}"


@pytest.mark.parametrize("cut", [1, 50, 4500, len(DATA)])
def test_data_that_are_cut_are_refused(cut: int) -> None:
    with pytest.raises(CorruptError, match=r"ends at byte [\d,]+ of the data, which has [\d,]+"):
        parse_record(INDEX.to_bytes(), DATA[: len(DATA) - cut])
    with pytest.raises(CorruptError, match=r"ends at byte [\d,]+ of the data, which has [\d,]+"):
        parse_record(edited(lambda _: None, first_json()), FIRST_DATA[: max(0, 326 - cut)])


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


PLACES = [(version, path) for version in (1, 2) for path in places((first_json, INDEX.to_json)[version - 1]())[1:]]


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(PLACES), json_values)
@pytest.mark.slow
def test_any_value_anywhere_in_an_index_is_refused_or_sound(where: tuple[int, tuple[Any, ...]], value: Any) -> None:
    version, path = where
    known, data = copy.deepcopy((INDEX.to_json(), DATA) if version == 2 else (first_json(), FIRST_DATA))
    place: Any = known
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        found = parse_record(zlib.compress(json.dumps(known).encode()), data)
    except ParedError:
        return
    end = 0
    for entry in found.entries:
        for part in entry.parts.values():
            assert part.offset == start_of(end, part.length, version)
            end = part.end
    assert end == len(data)
