"""Grids with groups in an artifact: what lies about them is refused, and pieces are the whole."""

import copy
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pared
from pared.artifact.decoding import pieces as module
from pared.artifact.decoding.pieces import pieces
from pared.artifact.decoding.whole import decode
from pared.artifact.envelope import Records, open_records
from pared.artifact.index import Entry, Index
from pared.artifact.parse import parse_index
from pared.artifact.parts import placed
from pared.artifact.torch_file import write_torch
from pared.errors import CorruptError, ParedError, UnsafeError
from pared.files.disk import write_atomic
from pared.files.memory_limit import MemoryLimit
from pared.formats.coded import Coded, Grouped
from pared.formats.dtypes import bytes_of
from pared.formats.entropy import Coding
from pared.formats.streams import EncodedPart
from pared.formats.views import View
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from tests.artifact.artifacts import Edit, Json, at, top
from tests.formats.groups.grids import GRIDS, random_parts

SHAPE = (6, 300)
Q4_0, Q4_K, ZERO, ROWS = 0, 1, 2, 3
NAMES = ("Q4_0", "Q4_K", "int4 g128, zero", "int8 rows")


def stored(name: str, view: View, seed: int = 0) -> Stored:
    grid, shape = GRIDS[name], view.split
    parts = {k: torch.from_numpy(v) for k, v in random_parts(grid, view.n_rows, view.n_columns, seed).items()}
    parts["codes"] = view.restore(parts["codes"], shape).contiguous()
    return Stored(
        (name,), "parameter", Coded(Grouped(grid), shape, torch.float32, parts, view), Decision(name, "grid", None, "")
    )


CONTENTS = Contents(tuple(stored(name, View(SHAPE, (0,))) for name in NAMES))
FILE = storage.to_bytes(CONTENTS, "safetensors")
with open_records(FILE) as opened:
    INDEX, DATA = parse_index(opened), bytes(opened.data)


def parse(known: Json) -> Index:
    return parse_index(Records("file", 0, zlib.compress(json.dumps(known).encode()), memoryview(DATA)))


def changed(edit: Edit) -> Json:
    known = copy.deepcopy(INDEX.to_json())
    edit(known)
    return known


def gone(position: int, *path: str) -> Edit:
    def edit(index: Json) -> None:
        place = index["tensors"][position]
        for key in path[:-1]:
            place = place[key]
        place.pop(path[-1])

    return edit


def format_of(position: int, **fields: Any) -> Edit:
    return lambda index: index["tensors"][position]["format"].update(fields)


LIES: dict[str, tuple[Edit, str]] = {
    "an older version": (top(pared=3), "Q4_0: its format 'groups' is not one of grid, float, raw"),
    "no group": (gone(Q4_0, "format", "group"), "Q4_0: its format lacks 'group'"),
    "another field": (format_of(Q4_0, codes="int8"), "Q4_0: its format has an unknown field 'codes'"),
    "one bit": (format_of(Q4_0, bits=1), "Q4_0: bits is not an integer from 2 to 8"),
    "nine bits": (format_of(Q4_0, bits=9), "Q4_0: bits is not an integer from 2 to 8"),
    "groups of nothing": (format_of(Q4_0, group=0), f"Q4_0: group is not an integer from 1 to {2**48 - 1}"),
    "groups of a truth": (format_of(Q4_0, group=True), f"Q4_0: group is not an integer from 1 to {2**48 - 1}"),
    "a zero that has its default": (format_of(Q4_0, zero="fixed"), "Q4_0: zero 'fixed' is not one of code, least"),
    "a step of integers": (format_of(Q4_0, step="int8"), "Q4_0: step 'int8' is not one of bfloat16, float32"),
    "multiples of nothing": (
        format_of(Q4_0, multiple_bits=6),
        "Q4_0: its format needs nested and multiple_bits together, and signed only with them",
    ),
    "a sign of nothing": (
        format_of(Q4_0, signed=True),
        "Q4_0: its format needs nested and multiple_bits together, and signed only with them",
    ),
    "no sign": (format_of(Q4_K, signed=False), "Q4_K: signed is not true, which it is where it stands"),
    "one group that shares": (format_of(Q4_K, nested=1), f"Q4_K: nested is not an integer from 2 to {2**48 - 1}"),
    "wide multiples": (format_of(Q4_K, multiple_bits=9), "Q4_K: multiple_bits is not an integer from 2 to 8"),
    "integers in groups": (at(Q4_0, "dtype")("int32"), "Q4_0: its format is groups, which cannot hold int32"),
    "no least values": (gone(Q4_K, "parts", "least"), "Q4_K: the object of its parts lacks 'least'"),
    "zeros too many": (
        at(Q4_0, "parts", "zero")({}),
        "Q4_0: the object of its parts has an unknown field 'zero'",
    ),
    "a base of codes": (at(Q4_0, "parts", "codes")({"base": 0}), "Q4_0: its codes has an unknown field 'base'"),
    "a base of float32": (at(ROWS, "parts", "step")({"base": 0}), "int8 rows: its step has an unknown field 'base'"),
    "a base beyond 16 bits": (
        at(Q4_0, "parts", "step")({"base": 1 << 15}),
        "Q4_0: the base of its step is not an integer from -32768 to 32767",
    ),
    "coded float32": (
        at(ROWS, "parts", "step")({"coding": {"constant": 0}}),
        "int8 rows: its step has an unknown field 'coding'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_groups_are_refused(lie: str) -> None:
    edit, words = LIES[lie]
    with pytest.raises(CorruptError) as error:
        parse(changed(edit))
    assert error.value.args[0].startswith(f"file: {words}")


@pytest.mark.parametrize("group", [1, 31, 33, 300, 2**48 - 1, None])
def test_other_groups_than_the_parts_have_are_refused(group: int | None) -> None:
    with pytest.raises((CorruptError, UnsafeError)):
        parse(changed(format_of(ZERO, group=group)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(places(INDEX.to_json()["tensors"])[1:]),
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers(0, 2**50) | st.sampled_from(["code", "least", ""]),
)
@pytest.mark.slow
def test_any_value_anywhere_is_refused_or_decodes(path: tuple[Any, ...], value: Any) -> None:
    known = copy.deepcopy(INDEX.to_json())
    place: Any = known["tensors"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        found = parse(known)
        for entry in found.entries:
            assert decode(entry, memoryview(DATA)).shape == entry.shape
    except ParedError:
        pass


VIEWS = (
    View((60, 84), (0,)),
    View((60, 84), (1,)),
    View((60, 84), ()),
    View((60, 84), (0, 1)),
    View((4, 15, 84), (0, 2)),
    View((60, 3, 28), (0, 1)),
)


@pytest.mark.parametrize("size", [7, 100, 1 << 18])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_pieces_are_the_whole(view: View, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", size)
    data = storage.to_bytes(Contents(tuple(stored(name, view, i) for i, name in enumerate(GRIDS))), "safetensors")
    with open_records(data) as records:
        for entry in parse_index(records).entries:
            found = list(pieces(entry, records.data, MemoryLimit("a file", 0)))
            whole = decode(entry, records.data)
            assert all(one.ndim == 1 and one.dtype == whole.dtype for one in found)
            assert bytes(bytes_of(np.concatenate(found))) == bytes(bytes_of(whole))


def hostile(path: Path, shape: tuple[int, int], group: int | None) -> Path:
    """An artifact of a few bytes with very many equal numbers."""
    nothing = EncodedPart(b"", Coding(constant=1))
    parts = placed({"codes": nothing, "step": nothing}, 0)
    format = {"tag": "groups", "bits": 4, "group": group}
    entry = Entry(("w",), "parameter", "float32", shape, format, (shape, (0,)), None, "", parts)
    record = Index((entry,)).to_bytes()
    write_atomic(path, lambda file: write_torch(file, record, (b"",), 0))
    return path


def test_steps_of_groups_count_too(tmp_path: Path) -> None:
    path = hostile(tmp_path / "a.pt", (1 << 13, 1 << 13), 1)
    with pytest.raises(UnsafeError, match="cannot be decoded in memory of four times the file"):
        pared.expand(path, tmp_path / "a.safetensors")
    hostile(tmp_path / "b.pt", (1 << 14, (1 << 13) + 1), 1)
    with pytest.raises(UnsafeError, match="with it, more than 268,435,456 codes take no bytes"):
        pared.inspect(tmp_path / "b.pt")


def test_large_groups_take_no_memory_of_their_own(tmp_path: Path) -> None:
    path = hostile(tmp_path / "a.pt", (4, 8), 2**48 - 1)
    pared.expand(path, tmp_path / "a.safetensors")
    with open_records(path) as records:
        (entry,) = parse_index(records).entries
        whole = decode(entry, records.data)
    assert whole.tolist() == [[float(np.array([1], np.int16).view(np.float16)[0])] * 8] * 4


def test_older_versions_are_written_where_there_are_no_groups() -> None:
    assert INDEX.to_json()["pared"] == 4
    rest = Contents(())
    with open_records(storage.to_bytes(rest, "safetensors")) as records:
        assert parse_index(records).to_json()["pared"] == 2


@pytest.mark.parametrize(("name", "part"), list(itertools.product(NAMES, ["codes", "step"])))
def test_a_flipped_bit_is_found(name: str, part: str) -> None:
    data = bytearray(DATA)
    entry = INDEX.entries[NAMES.index(name)]
    data[entry.parts[part].offset] ^= 1
    with pytest.raises(CorruptError, match="the checksum of its numbers does not match"):
        decode(entry, memoryview(bytes(data)))
