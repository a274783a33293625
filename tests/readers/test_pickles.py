"""Pickles are read as the standard library reads them; nothing in them runs, and all that they may take is bounded."""

import os
import pickle
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch

from pared.errors import CorruptError, UnsafeError
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Name, Node, read_pickle
from tests.readers.torch_files import listed, saved, with_pickle

TRUST = (
    "\n  If you trust its source: load it with torch.load(path, weights_only=False), save the model's "
    "state_dict() with torch.save, and use that file."
)


def described(data: bytes, harmless: Container[str] = ()) -> Any:
    return read_pickle(data, harmless, "file", MemoryLimit("file", len(data))).root


class Runs:
    """A value whose unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_listed_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    file = saved({"a": torch.ones(2), "b": Runs(f"touch {tmp_path}/ran")}, pickle_protocol=protocol)
    listing = listed(file)
    assert [tensor.name for tensor in listing.tensors] == ["a"]
    assert listing.imports == (f"{os.system.__module__}.system",)
    assert list(tmp_path.iterdir()) == []


FOREIGN = {
    "eval": (b"c__builtin__\neval\n(S'1'\ntR.", ("__builtin__.eval",)),
    "an instance": (b"(ios\nsystem\n.", ("os.system",)),
    "an object": (b"(cos\nsystem\no.", ("os.system",)),
    "a name on the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", ("os.system",)),
    "a loader within torch": (b"ctorch.storage\n_load_from_bytes\n(tR.", ("torch.storage._load_from_bytes",)),
    "a name with a terminal's codes": (b"ca\x1b[31m\nb\n.", ("a\\x1b[31m.b",)),
    "what it makes itself": (b"cbuiltins\ngetattr\n(tR(tR.", ("builtins.getattr",)),
    "several": (b"(cos\nsystem\ncos\nremove\ncos\nsystem\nt.", ("os.remove", "os.system")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_would_be_imported_is_named_and_not_run(kind: str) -> None:
    pickled, names = FOREIGN[kind]
    assert listed(with_pickle(pickled)).imports == names


UNSAFE = {
    "the registry": (b"\x80\x02\x82\x01.", "its pickle uses the instruction EXT1, which no torch file needs"),
    "a buffer elsewhere": (b"\x80\x05\x97.", "its pickle uses the instruction NEXT_BUFFER, which no torch file needs"),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_instructions_that_cannot_be_understood_are_refused(kind: str) -> None:
    pickled, words = UNSAFE[kind]
    with pytest.raises(UnsafeError) as error:
        listed(with_pickle(pickled))
    assert str(error.value) == f"file: {words}{TRUST}"


MALFORMED = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "below the mark": b"\x80\x02}(R.",
    "an unknown memo": b"\x80\x02h\x07.",
    "an unknown instruction": b"\x80\x02\xff.",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "an array of an exabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x10.",
    "a memo of 4 G": b"\x80\x02}r\xff\xff\xff\xff)s.",
    "a key without value": b"\x80\x02}(K\x01u.",
    "items of a number": b"\x80\x02K\x01K\x02K\x03s.",
    "a long number as text": b"L" + b"9" * 9000 + b"L\n.",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_pickle_is_refused(kind: str) -> None:
    with pytest.raises(CorruptError, match="file: its pickle is malformed: "):
        listed(with_pickle(MALFORMED[kind]))


def test_cycles_end() -> None:
    cycle: dict[str, Any] = {"tensor": torch.ones(1)}
    cycle["self"] = [cycle]
    assert [t.name for t in listed(saved(cycle)).tensors] == ["tensor"]


@pytest.mark.parametrize("make", [lambda a: [a, a], lambda a: (a, a), lambda a: {"x": a, "y": a}])
def test_what_is_exponential_when_unfolded_ends(make: Callable[[object], object]) -> None:
    value: object = torch.ones(1)
    for _ in range(60):
        value = make(value)
    assert len(listed(saved(value)).tensors) == 2  # the innermost node names its tensor twice


def test_keys_that_cannot_be_hashed_in_time_do_no_harm() -> None:
    """Hashing a tuple of tuples unfolds it: 2^60 steps, if the standard library read this pickle."""
    program = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."
    assert listed(with_pickle(program)).tensors == ()


def test_nesting_is_bounded() -> None:
    value: object = torch.ones(1)
    for _ in range(150):
        value = [value]
    with pytest.raises(UnsafeError) as error:
        listed(saved(value))
    assert error.value.what == "its pickle nests containers deeper than any state dict"


def test_names_are_bounded() -> None:
    """One long key, used at every level below many branches, would make names far longer than the file."""
    key = "k" * 2000
    value: object = [torch.ones(1)] * 2000
    for _ in range(50):
        value = {key: value}
    with pytest.raises(UnsafeError) as error:
        listed(saved(value))
    assert error.value.what == "reading it would take more memory than four times its size and 64 MiB"


@pytest.mark.parametrize("value", [3, "text", [1, (2.5, None), {"a": b"x", (1, 2): True}], {1: {2: [set(), 2**70]}}])
@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_as_the_standard_library_reads_them(value: object, protocol: int) -> None:
    def folded(read: object) -> object:
        """Plain containers again, as far as `Node` tells them apart."""
        if not isinstance(read, Node):
            return read
        if isinstance(read.call, Name):
            return (read.call.path, [folded(x) for x in read.arguments])
        return [[folded(x) for x in read.values], [[folded(k), folded(v)] for k, v in read.pairs]]

    def expected(known: object) -> object:
        if isinstance(known, dict):
            return [[], [[expected(k), expected(v)] for k, v in known.items()]]
        return [[expected(x) for x in known], []] if isinstance(known, list | tuple | set) else known

    pickled = pickle.dumps(value, protocol)
    calls = {"__builtin__.set", "builtins.set", "_codecs.encode", "__builtin__.bytes"}
    found = folded(described(pickled, calls))
    if protocol >= 4 or isinstance(value, int | str):  # before, sets and bytes are made by calls
        assert found == expected(value)


def test_escapes_that_python_deprecates_are_no_warning() -> None:
    assert described(b"S'a\\qb'\n.") == "a\\qb"


def test_names_are_noted_and_not_imported() -> None:
    assert described(b"cno.such.module\nthing\n.") == Name("no.such.module.thing")
