"""An index that asks for more memory than its bytes can fill is refused before anything is unpacked."""

import re
import zlib

import pytest

from pared.artifact.index import Index
from pared.errors import UnsafeError
from pared.formats.entropy import Coding
from tests.artifact.artifacts import CLASSED, CODED, INDEX, UNSAFE, WIDE, Json, Writer, edited, parse_record


def test_codes_beyond_their_bytes_are_a_bomb() -> None:
    def edit(index: Json) -> None:
        index["tensors"][CODED].update(shape=[4, 2**20])

    length = INDEX.entries[CODED].parts["codes"].length
    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    assert str(error.value) == (
        f"file: coded: declares 4,194,304 codes, and the {length} bytes of its codes hold at most {length * 32:,}"
        f"\n  {UNSAFE}"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("codes 0", "declares 3,145,638 codes, and the {} bytes of its codes 0 hold at most {:,}"),
        ("classes", "declares 1,048,576 codes, and the {} bytes of its classes hold at most {:,}"),
        ("step", "declares 1,048,576 codes, and the {} bytes of its step hold at most {:,}"),
    ],
)
def test_classes_and_steps_beyond_their_bytes_are_bombs(name: str, words: str) -> None:
    """A tensor of 2^20 rows, in which all parts but one are constant."""

    def edit(index: Json) -> None:
        entry = index["tensors"][CLASSED]
        entry.update(shape=[2**19, 2, 3], view={"split": [2**19, 2, 3], "rows": [0, 1]})
        kept = entry["parts"][name]
        for part in entry["parts"].values():
            if part is not kept:
                part.pop("length", None)
                part["coding"] = {"constant": 0}
        entry["parts"]["codes 0"]["rows"] = 2**20 - 30

    part = INDEX.entries[CLASSED].parts[name]
    assert part.coding is not None
    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    expected = words.format(part.length, part.length * 8 * part.coding.per_symbol)
    assert str(error.value) == f"file: classed: {expected}\n  {UNSAFE}"


def test_classes_and_steps_without_bytes_are_counted() -> None:
    """With r rows of two columns: r classes, 2 r codes and r steps."""

    def equal(rows: int) -> Index:
        nothing = {"coding": Coding(constant=0)}
        halves = {f"codes_{i}": (b"", {**nothing, "rows": rows // 2}) for i in range(2)}
        step = (b"", {**nothing, "base": 0})
        fmt = {"tag": "grid", "codes": "int8"}
        view = ((rows, 2), (0,))
        return Index((Writer(2).entry("a", (rows, 2), view, fmt, classes=(b"", nothing), **halves, step=step),))

    assert parse_record(equal(2**26).to_bytes(), b"") == equal(2**26)
    with pytest.raises(UnsafeError) as error:
        parse_record(equal(2**26 + 2).to_bytes(), b"")
    assert str(error.value) == f"file: a: with it, more than 268,435,456 codes take no bytes\n  {UNSAFE}"


def test_too_many_codes_without_bytes_are_a_bomb() -> None:
    def edit(index: Json) -> None:
        index["tensors"][WIDE].update(shape=[6, 2**26], view={"split": [6, 2**26], "rows": [0]})

    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    assert str(error.value) == f"file: wide: with it, more than 268,435,456 codes take no bytes\n  {UNSAFE}"


def test_an_index_that_inflates_without_bound_is_a_bomb() -> None:
    with pytest.raises(UnsafeError) as error:
        parse_record(zlib.compress(b" " * (8 << 20)), b"")
    assert re.fullmatch(
        r"file: its index inflates to more than 1,\d\d\d,\d\d\d bytes\n  " + re.escape(UNSAFE), str(error.value)
    )
