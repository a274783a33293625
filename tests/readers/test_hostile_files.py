"""Files made to do harm: ten thousand damaged ones for every reader, and some made by hand.

`docs/security.md` says what is promised; `make fuzz N=...` reads more files, each within a second.
"""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from pared.errors import CorruptError, UnsafeError
from pared.files.disk import open_file
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Node, read_pickle
from pared.readers.kinds import list_tensors
from pared.readers.listing import Listing
from tests.fuzz.bases import BASES, saved
from tests.fuzz.driver import started

pytestmark = pytest.mark.slow

FILES = 10_000
SECONDS = 5.0  # a promise of one second, on machines that do something else meanwhile
CONSTANT = 64 << 20


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    with started(tmp_path_factory.mktemp("fuzz"), FILES, SECONDS) as futures:
        yield futures


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.child
def test_damaged_files_are_refused_or_listed_soundly(running: dict[str, Future[str]], kind: str) -> None:
    assert running[kind].result() == ""


def listed(file: bytes) -> Listing:
    with open_file(file, "file") as opened:
        return list_tensors(opened)


def archive(pickled: bytes, **more: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in {"data.pkl": pickled, **more}.items():
            file.writestr(f"a/{name}", content)
    return stream.getvalue()


def bounded(file: bytes) -> Listing:
    """The listing; whatever comes of it, no more memory than is promised."""
    tracemalloc.start()
    try:
        listing = listed(file)
        for held in listing.tensors:
            listing.array(held)
        return listing
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken <= 4 * len(file) + CONSTANT


# A million small things each; all of them would take hundreds of bytes of memory for one of the file.
BOMBS: dict[str, Callable[[], bytes]] = {
    "empty tuples": lambda: archive(b"\x80\x02(" + b")" * 1_000_000 + b"t."),
    "empty lists": lambda: archive(b"\x80\x02(" + b"]" * 1_000_000 + b"t."),
    "lists on lists": lambda: archive(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."),
    "one text, many calls": lambda: archive(b"\x80\x02cos\nsystem\nq\0(" + b"h\0)R" * 300_000 + b"t."),
    "one tensor, many places": lambda: archive(
        b"\x80\x02(ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NK\x01tQK\0))NtR"
        b"q\0" + b"h\0" * 500_000 + b"t.",
        **{"data/0": bytes(4)},
    ),
    "tensors of one storage": lambda: archive(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\0ctorch\nFloatStorage\nq\1X\7\0\0\0storageq\2X\1\0\0\x000q\3}("
        + b"".join(b"X\5\0\0\0%05dh\0((h\2h\1h\3h\3K\1tQK\0K\1\x85K\1\x85\x89}tR" % i for i in range(60_000))
        + b"u.",
        **{"data/0": bytes(4)},
    ),
    "marks": lambda: archive(b"\x80\x02" + b"(" * 2_000_000 + b"."),
    "small lists": lambda: archive(b"\x80\x02(" + b"]K\1a" * 600_000 + b"t."),
    "long lists": lambda: archive(b"\x80\x02(" + b"](" + b"N" * 4_000_000 + b"e" + b"t."),
    "pairs": lambda: archive(b"\x80\x02}(" + b"NN" * 1_000_000 + b"u."),
    "pairs, one at a time": lambda: archive(b"\x80\x02(" + b"}NNs" * 500_000 + b"t."),
    "states": lambda: archive(b"\x80\x02cos\nsystem\nq\0(" + b"h\0)RNb" * 400_000 + b"t."),
    "instances": lambda: archive(b"\x80\x02(" + b"(ia\nb\n" * 400_000 + b"t."),
    "names": lambda: archive(b"\x80\x02(" + b"ca\nb\n" * 400_000 + b"t."),
    "references": lambda: archive(b"\x80\x02(" + b")Q" * 1_000_000 + b"t."),
    "numbers": lambda: archive(b"\x80\x02(" + b"M\xff\xff" * 1_500_000 + b"t."),
    "places far apart in the memo": lambda: archive(
        b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", 7 + i * 7001) for i in range(600_000)) + b"."
    ),
    "one long text as many names": lambda: archive(
        b"\x80\x04X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\0(" + b"h\0h\0\x93" * 2_000 + b"t."
    ),
    "long texts beyond ASCII as names of members": lambda: _entries(500, "a/" + "\U0001f600" * 8_000),
    "entries of a directory": lambda: _entries(60_000),
    "lists in a header": lambda: _safetensors(b'{"__metadata__":{"a":[' + b",".join([b"[]"] * 1_500_000) + b"]}}"),
    "tensors of ONNX": lambda: _onnx(b"\x2a\x04\x08\0\x10\x01" * 300_000),
    "tensors of GGUF": lambda: (
        b"GGUF"
        + struct.pack("<IQQ", 3, 100_000, 0)
        + b"".join(struct.pack("<Q6sIQIQ", 6, b"%06d" % i, 1, 0, 24, 0) for i in range(100_000))
    ),
    "arrays": lambda: _npz(60_000),
}


def _entries(count: int, name: str = "a/data.pkl") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, pickle.dumps({}, 2))
        (info,) = file.infolist()
        file.filelist.extend([info] * count)
    return stream.getvalue()


def _npz(count: int) -> bytes:
    array = io.BytesIO()
    np.save(array, np.zeros((), np.int8))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for i in range(count):
            file.writestr(f"{i}.npy", array.getvalue())
    return stream.getvalue()


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _varint(value: int) -> bytes:
    return bytes([*(value >> 7 * i & 0x7F | 0x80 for i in range(9)), value >> 63 & 1])


def _onnx(graph: bytes) -> bytes:
    return b"\x08\x0a\x3a" + _varint(len(graph)) + graph


@pytest.mark.parametrize("kind", BOMBS)
def test_small_things_in_great_number_take_no_more_memory_than_promised(kind: str) -> None:
    file = BOMBS[kind]()
    with suppress(UnsafeError, CorruptError):
        bounded(file)


@pytest.mark.parametrize(
    "kind",
    [
        *("empty tuples", "one tensor, many places", "lists in a header", "tensors of ONNX", "tensors of one storage"),
        *("marks", "places far apart in the memo", "one long text as many names", "references", "instances"),
    ],
)
def test_what_would_fill_the_memory_is_unsafe(kind: str) -> None:
    with pytest.raises(UnsafeError) as error:
        listed(BOMBS[kind]())
    assert error.value.what == "reading it would take more memory than four times its size and 64 MiB"


def test_a_large_module_in_very_many_places_is_unsafe() -> None:
    """A module that holds another twice, thirty deep, and each has a state that takes long to look through."""
    module = b"cm\nM\n)\x81}(" + b"".join(b"M%sN" % struct.pack("<H", i) for i in range(3000))
    program = b"\x80\x02" + module + b"X\x08\0\0\0_modules}ubq\1"
    for _ in range(30):
        program += module + b"X\x08\0\0\0_modules}(X\1\0\0\0ah\1X\1\0\0\0bh\1uubq\1"
    with pytest.raises(UnsafeError):
        bounded(archive(program + b"."))


def test_laughter_by_doubling_ends() -> None:
    """Sixty-four nested pairs of the same thing: 2^64 of them if anything unfolded them."""
    program = b"\x80\x02]q\0" + b"h\0h\0\x86q\0" * 64 + b"."
    assert bounded(archive(program)).tensors == ()


def test_modules_that_hold_each_other_twice_end_soon() -> None:
    """Each place of a module is listed; of thousands of them, in a file of five kilobytes, nobody waits for the end."""
    module: torch.nn.Module = torch.nn.Linear(2, 2)
    for _ in range(12):
        outer = torch.nn.Module()
        outer.a, outer.b, module = module, module, outer
    with pytest.raises(UnsafeError):
        bounded(saved(module))
    many = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2)] * 12)
    assert len(bounded(saved(many)).tensors) == 12 * 12


HUGE = {
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f\x01.",
    "an array of bytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f\x01.",
    "a text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "a place in the memo": b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\x7f.",
    "a frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("kind", HUGE)
def test_huge_lengths_in_a_pickle_are_refused(kind: str) -> None:
    with pytest.raises(CorruptError):
        bounded(archive(HUGE[kind]))


ODD_ARGUMENTS = {
    "none": b")",
    "a number for a storage": b"(K\x01K\0))t",
    "a storage of itself": b"(]q\1h\1aK\0))t",
    "strides of texts": b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NK\x01tQK\0(K\1t(X\1\0\0\0atNt",
    "an offset of none": b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NK\x01tQN))Nt",
}


@pytest.mark.parametrize("kind", ODD_ARGUMENTS)
def test_calls_of_torch_with_odd_arguments_are_refused(kind: str) -> None:
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + ODD_ARGUMENTS[kind] + b"R."
    with pytest.raises(CorruptError):
        bounded(archive(program, **{"data/0": bytes(4)}))


DEEP: dict[str, Callable[[], bytes]] = {
    "lists": lambda: archive(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."),
    "calls": lambda: archive(b"\x80\x02cos\nsystem\nq\0)" + b"q\1h\0h\1\x85R" * 5000 + b"."),
    "graphs": lambda: _onnx(_nested_graphs(100)),
    "values of GGUF": lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9)
    + struct.pack("<IQ", 9, 1) * 5000,
    "JSON": lambda: _safetensors(b'{"a":' * 50_000),
}  # fmt: skip


def _nested_graphs(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        attribute = b"\x32" + _varint(len(graph)) + graph
        node = b"\x2a" + _varint(len(attribute)) + attribute
        graph = b"\x0a" + _varint(len(node)) + node
    return graph


@pytest.mark.parametrize("kind", DEEP)
def test_deep_nesting_is_refused(kind: str) -> None:
    with pytest.raises((UnsafeError, CorruptError)):
        bounded(DEEP[kind]())


PROTOCOL = {
    "a large shape of few numbers": b"\x08\x0a\x3a\x0c\x2a\x0a\x08\x80\x80\x80\x80\x40\x10\x03\x28\x01",
    "a number without end": b"\x08\x0a\x28" + b"\xff" * 11,
    "a group": b"\x08\x0a\x3a\x06\x0b\x13\x0b\x0c\x14\x0c",
    "a field beyond the end": b"\x08\x0a\x3a\xff\xff\xff\xff\x7f",
    "an overlong key": b"\x08\x0a\x3a\x0b" + b"\x80" * 10 + b"\x01",
}


@pytest.mark.parametrize("kind", PROTOCOL)
def test_protocol_buffers_that_lie_are_refused(kind: str) -> None:
    with pytest.raises(CorruptError):
        bounded(PROTOCOL[kind])


def test_doubled_keys_in_a_safetensors_header_are_refused() -> None:
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    with pytest.raises(CorruptError, match="an object has the same key twice"):
        bounded(_safetensors(f'{{"a":{entry},"a":{entry}}}'.encode()) + b"\0")


def test_names_in_errors_cannot_move_the_cursor() -> None:
    header = json.dumps({"a\x1b[2J\n\u202eb": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}).encode()
    with pytest.raises(CorruptError) as error:
        bounded(_safetensors(header) + b"\0")
    assert all(line.isprintable() for line in str(error.value).splitlines())
    assert str(error.value).startswith(r"file: a\x1b[2J\n\u202eb: its offsets ")


@pytest.mark.parametrize("name", ["a/data.pkl", "w.npy"])
def test_members_that_inflate_a_thousandfold_take_no_memory(name: str) -> None:
    """100 MB of zeros in 100 kB: a pickle like this is refused, an array is listed without its numbers."""
    header = b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000,), }".ljust(
        70
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, header + bytes(100_000_000))
    if name == "w.npy":
        listing = bounded(stream.getvalue())
        assert listing.tensors[0].nbytes == 100_000_000
        assert listing.array(listing.tensors[0]) is None
    else:
        with pytest.raises(CorruptError, match="is compressed or encrypted, which torch never does"):
            bounded(stream.getvalue())


def test_a_member_that_inflates_to_more_than_it_says_is_refused() -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(1 << 20, np.uint8))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w.npy", array.getvalue())
    small = np.zeros(16, np.uint8)
    said = io.BytesIO()
    np.save(said, small)
    old = struct.pack("<I", len(array.getvalue()))
    lying = stream.getvalue().replace(old, struct.pack("<I", len(said.getvalue())))
    assert lying != stream.getvalue()
    with pytest.raises(CorruptError):
        bounded(lying)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "torch.hub.load", "pickle.loads"])
def test_what_a_pickle_would_call_is_named_and_not_called(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    command = f"touch {tmp_path}/ran".encode()
    program = b"\x80\x02c%s\n%s\n(X%s%stR." % (
        module.encode(),
        attribute.encode(),
        struct.pack("<I", len(command)),
        command,
    )
    assert bounded(archive(program)).imports == (name,)
    assert list(tmp_path.iterdir()) == []


def _many(kind: str, count: int) -> bytes:
    names = [f"model.layers.{i}.weight" for i in range(count)]
    if kind == "torch":
        stream = io.BytesIO()
        torch.save({name: torch.zeros(2, 2) for name in names}, stream)
        return stream.getvalue()
    entry = '"{}":{{"dtype":"F32","shape":[2,2],"data_offsets":[{},{}]}}'
    entries = (entry.format(name, 16 * i, 16 * i + 16) for i, name in enumerate(names))
    return _safetensors(f"{{{','.join(entries)}}}".encode()) + bytes(16 * count)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("count", [20_000, 50_000])
def test_files_of_very_many_small_tensors_are_listed_within_the_promise(kind: str, count: int) -> None:
    tensors = bounded(_many(kind, count)).tensors
    assert len(tensors) == count
    assert [tensors[0].name, tensors[-1].name] == ["model.layers.0.weight", f"model.layers.{count - 1}.weight"]


@pytest.mark.parametrize(
    "program",
    [
        # Written out, 2^60 things.
        b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"X\1\0\0\0a\x93.",
        b"K\1X\1\0\0\0a\x93.",
        b"X\1\0\0\0aN\x93.",
    ],
)
def test_names_that_are_no_text_are_refused(program: bytes) -> None:
    with pytest.raises(CorruptError, match="it takes something else for a name"):
        listed(archive(b"\x80\x04" + program))


@pytest.mark.parametrize(
    ("program", "values"),
    [
        (b"(K\1q\0K\2q\1h\0h\1t.", [1, 2, 1, 2]),
        (b"(K\1q\5K\2q\0h\0h\5t.", [1, 2, 2, 1]),  # places that do not follow one another
        (b"(K\1q\5K\2\x94h\1h\5t.", [1, 2, 2, 1]),  # the next place is as many as there are
        (b"(K\1q\1K\2q\0K\3q\1h\1t.", [1, 2, 3, 3]),  # a place that is taken twice
        (b"(K\1\x94K\2q\0h\0t.", [1, 2, 2]),
    ],
)
def test_places_of_the_memo_are_found_in_any_order(program: bytes, values: list[int]) -> None:
    found = read_pickle(b"\x80\x04" + program, (), "file", MemoryLimit("file", 100)).root
    assert isinstance(found, Node)
    assert list(found.values) == values == list(pickle.loads(b"\x80\x04" + program))
