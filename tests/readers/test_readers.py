"""Readers of files of other programs: they see what torch sees, execute nothing, and refuse what lies."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.errors import CorruptError, FileError, ParedError, UnsafeError
from pared.files.disk import open_file
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Name, Node, read_pickle
from pared.formats.dtypes import as_floats
from pared.readers.kinds import list_tensors
from pared.readers.listing import ListedTensor, Listing
from pared.readers.memory import list_model, list_state_dict
from tests.mutations import mutations

TRUST = (
    "\n  If you trust its source: load it with torch.load(path, weights_only=False), save the model's "
    "state_dict() with torch.save, and use that file."
)


def described(data: bytes, harmless: Container[str] = ()) -> Any:
    return read_pickle(data, harmless, "file", MemoryLimit("file", len(data))).root


def listed(file: bytes) -> Listing:
    with open_file(file, "file") as opened:
        return list_tensors(opened)


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def held(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], int]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size()


def seen(listing: Listing) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(t.name, t.dtype, t.shape, t.nbytes) for t in listing.tensors]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("count", torch.tensor(3))


TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_is_listed_as_torch_sees_it(protocol: int) -> None:
    state = Net().state_dict()
    assert seen(listed(saved(state, pickle_protocol=protocol))) == [held(k, v) for k, v in state.items()]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_known(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    assert seen(listed(saved({"a": tensor}))) == [held("a", tensor)]


@pytest.mark.parametrize("dtype", [t for t in TYPES if t is not torch.complex128])
def test_every_type_of_safetensors_is_known(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    (found,) = listed(safetensors.torch.save({"a": tensor})).tensors
    assert seen(Listing((found,))) == [held("a", tensor)]


def bits_of(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("write", [saved, safetensors.torch.save])
def test_numbers_are_read_as_torch_has_them(dtype: torch.dtype, write: Callable[[dict[str, Tensor]], bytes]) -> None:
    if write is not saved and dtype is torch.complex128:
        pytest.skip("safetensors has no complex128")
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    listing = listed(write({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert array.shape == (2, 3)
    assert array.tobytes() == bits_of(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[1:, ::2],
        lambda t: t[:, :1].expand(4, 3),
        lambda t: t[0],
        lambda t: t[2, 3],
        lambda t: t[:0],
        lambda t: t.permute(1, 0).contiguous().T,
    ],
)
def test_numbers_of_views_are_read_as_torch_has_them(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.arange(24.0).reshape(4, 6))
    listing = listed(saved({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert array.tolist() == tensor.tolist()


def test_what_holds_no_numbers_has_no_array() -> None:
    listing = listed(saved({"meta": torch.ones(3, device="meta")}))
    assert listing.array(listing.tensors[0]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_widened_exactly(dtype: torch.dtype) -> None:
    tensor = torch.randn(100, dtype=torch.float64).to(dtype)
    listing = listed(saved({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert as_floats(array).tolist() == tensor.double().tolist()


def test_a_checkpoint_is_listed_with_paths() -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.head.parameters())
    net.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "history": [1.5, {"last": torch.ones(2)}],
        "args": {"lr": np.float32(0.1), "device": torch.device("cpu"), "shape": torch.Size([1]), "type": torch.float16},
        "version": torch.__version__,
        "counter": collections.Counter("ab"),
        7: torch.ones(1),
    }
    names = [t.name for t in listed(saved(checkpoint)).tensors]
    state = [f"state_dict/{name}" for name in net.state_dict()]
    adam = [f"optimizer/state/{i}/{key}" for i in range(2) for key in ("step", "exp_avg", "exp_avg_sq")]
    assert names == [*state, *adam, "history/1/last", "7"]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")  # old files hold them
def test_parameters_buffers_and_unusual_tensors_are_listed() -> None:
    marked = nn.Parameter(torch.ones(2))
    marked.note = "kept"  # type: ignore[attr-defined]  # any tensor takes attributes
    scales, zeros = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    found = listed(
        saved(
            {
                "parameter": nn.Parameter(torch.ones(2)),
                "marked": marked,
                "buffer": nn.Buffer(torch.ones(2)),
                "sparse": torch.eye(3).to_sparse(),
                "quantized": torch.quantize_per_channel(torch.ones(3, 2), scales, zeros, 0, torch.qint8),
                "meta": torch.ones(3, device="meta"),
                "scalar": torch.tensor(1.0),
                "empty": torch.empty(0, 3),
                "expanded": torch.ones(1).expand(5),
            }
        )
    )
    assert [(t.name, t.dtype, t.shape, t.storage is None) for t in found.tensors] == [
        ("parameter", "float32", (2,), False),
        ("marked", "float32", (2,), False),
        ("buffer", "float32", (2,), False),
        ("sparse/0", "sparse tensor", (2, 3), False),
        ("sparse/1", "sparse tensor", (3,), False),
        ("quantized", "qint8", (3, 2), False),
        ("quantized/1", "float64", (3,), False),
        ("quantized/2", "int64", (3,), False),
        ("meta", "float32", (3,), True),
        ("scalar", "float32", (), False),
        ("empty", "float32", (0, 3), False),
        ("expanded", "float32", (5,), False),
    ]


def test_shared_storages_are_seen() -> None:
    whole = torch.ones(4, 4)
    found = listed(saved({"whole": whole, "same": whole, "row": whole[1], "other": torch.ones(2)}))
    assert [t.storage for t in found.tensors] == ["0", "0", "0", "1"]
    assert {key: storage.nbytes for key, storage in found.storages.items()} == {"0": 64, "1": 8}


def test_a_model_in_memory_gives_its_numbers() -> None:
    net = Net()
    net.head.weight = nn.Parameter(torch.arange(8.0).reshape(4, 2).T)
    listing = list_model(net)
    state = net.state_dict()
    assert sorted(seen(listing)) == sorted(held(k, v) for k, v in state.items())
    for tensor in listing.tensors:
        array = listing.array(tensor)
        assert array is not None
        assert array.tolist() == state[tensor.name].tolist()


def test_tensors_in_memory_whose_numbers_are_computed_are_read() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    complex_ = torch.complex(base, -base)
    state = {
        "base": base,
        "slice": base[1:, ::2],
        "conjugated": complex_.conj(),
        "negated": complex_.conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "version": 3,
    }
    listing = list_state_dict(state)
    found = {tensor.name: listing.array(tensor) for tensor in listing.tensors}
    assert list(found) == list(state)[:-1]
    for name, array in found.items():
        tensor = state[name]
        assert isinstance(tensor, Tensor)
        assert array is not None
        assert array.tolist() == tensor.to_dense().tolist()
    assert listing.tensors[0].storage == listing.tensors[1].storage
    assert listing.tensors[1].offset == 16


# --- what would run


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


def with_pickle(pickled: bytes, **more: bytes) -> bytes:
    """A torch zip around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


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


# --- files that lie, and other files


def replaced(file: bytes, **changes: bytes | None) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        content = {n.removeprefix("archive/"): archive.read(n) for n in archive.namelist()}
    merged = {**content, **changes}
    return with_pickle(merged.pop("data.pkl") or b"", **{k: v for k, v in merged.items() if v is not None})


STATE = saved({"w": torch.ones(3, 4), "b": torch.ones(3)})
PICKLE = zipfile.ZipFile(io.BytesIO(STATE)).read("archive/data.pkl")

LIES: dict[str, tuple[bytes, str]] = {
    "a missing storage": (replaced(STATE, **{"data/0": None}), "file: w: its storage '0' is missing"),
    "a cut storage": (
        replaced(STATE, **{"data/0": bytes(40)}),
        "file: w: its storage '0' has 40 bytes where the pickle says 48",
    ),
    "a tensor beyond its storage": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"K\x03K\x04\x86", b"K\x04K\x04\x86")}),
        "file: w: it reaches beyond its storage, which has 48 bytes",
    ),
    "strides beyond its storage": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"K\x04K\x01\x86", b"K\x09K\x01\x86")}),
        "file: w: it reaches beyond its storage, which has 48 bytes",
    ),
    "a huge shape": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"K\x03K\x04\x86", b"\x8a\x08\0\0\0\0\0\0\0\x01K\x04\x86")}),
        "file: w: its shape is larger than any tensor",
    ),
    "a negative size": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"K\x03K\x04\x86", b"\x8a\x01\xffK\x04\x86")}),
        f"file: w: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "sizes without strides": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"K\x04K\x01\x86", b"K\x04\x85")}),
        "file: w: it has 2 sizes and 1 strides",
    ),
    "no storage": (
        replaced(STATE, **{"data.pkl": PICKLE.replace(b"storage", b"STORAGE")}),
        "file: w: it refers to something that is not a storage",
    ),
    "a call without arguments": (
        with_pickle(b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n)Rs."),
        "file: w: its description in the pickle is incomplete",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_state_dict_that_lies_is_refused(kind: str) -> None:
    file, words = LIES[kind]
    with pytest.raises(CorruptError) as error:
        listed(file)
    assert str(error.value).splitlines()[0] == words


def zip_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


OTHERS = {
    "a plain pickle": (pickle.dumps({}), "a plain pickle"),
    "a zip": (zip_of(a=b""), "a zip archive of an unknown kind"),
    "an old tar": (
        b"pickle" + bytes(251) + b"ustar" + bytes(100),
        "a tar archive, as torch wrote before version 0.1.10",
    ),
    "text": (b"hello", "of an unknown kind"),
    "another order": (
        replaced(STATE, byteorder=b"big"),
        "a torch file of a big-endian machine",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_file_is_named(kind: str) -> None:
    file, words = OTHERS[kind]
    with pytest.raises(FileError) as error:
        listed(file)
    assert type(error.value) is FileError
    assert error.value.what == f"is {words}, which pared cannot read"


def safe(header: object, data: bytes = bytes(12)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | changes}


HEADERS = {
    "no entry": (safe({"a": 1}), "file: a: its entry is not an object"),
    "an unknown type": (safe(entry(dtype="F31")), "file: a: its dtype 'F31' is not one of "),
    "another shape": (safe(entry(shape=[4])), "file: a: its offsets [0, 12] do not fit shape [4] of F32"),
    "a huge shape": (safe(entry(shape=[2**40] * 3)), "file: a: its shape is larger than any tensor"),
    "offsets in reverse": (
        safe(entry(data_offsets=[12, 0])),
        "file: a: its offsets [12, 0] do not fit shape [3] of F32",
    ),
    "one offset": (safe(entry(data_offsets=[12])), "file: a: its offsets [12] do not fit shape [3] of F32"),
    "a field too many": (safe(entry(more=1)), "file: a: its entry has an unknown field 'more'"),
    "a hole": (safe(entry(data_offsets=[4, 16]), bytes(16)), "file: tensor 'a' begins at byte "),
    "an overlap": (safe(entry() | {"b": entry()["a"]}), "file: tensor 'b' begins at byte "),
    "bytes behind": (safe(entry(), bytes(13)), "file: its tensors end at byte "),
    "metadata that are no text": (
        safe(entry() | {"__metadata__": {"a": 1}}),
        "file: its metadata 'a' is not printable text",
    ),
    "no JSON": (struct.pack("<Q", 2) + b"{]", "file: its header is not valid JSON: "),
    "deep JSON": (struct.pack("<Q", 600_000) + b'{"a":' * 120_000, "file: its header is not valid JSON: "),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(kind: str) -> None:
    file, words = HEADERS[kind]
    with pytest.raises(CorruptError) as error:
        listed(file)
    assert str(error.value).startswith(words)


SAFE = safetensors.torch.save({"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.int8)}, {"format": "pt"})
NESTED = saved({"model": Net().state_dict(), "steps": [torch.ones(2)[1:], {"x": torch.ones(2, 2).t()}]})


@settings(deadline=None, max_examples=500)
@given(st.data(), st.sampled_from([SAFE, STATE, NESTED]))
@pytest.mark.slow
def test_mutated_files_are_refused_or_listed_soundly(draw: st.DataObject, file: bytes) -> None:
    mutated = draw.draw(mutations(file, most=4))
    check_sound(mutated)


@settings(deadline=None, max_examples=500)
@given(st.data())
@pytest.mark.slow
def test_mutated_pickles_are_refused_or_listed_soundly(draw: st.DataObject) -> None:
    """The zip's checksum would hide most mutations of the pickle; here it is right."""
    mutated = draw.draw(mutations(PICKLE, most=4))
    check_sound(replaced(STATE, **{"data.pkl": mutated}))


def check_sound(file: bytes) -> None:
    """An error of ours, or tensors that lie within storages that lie within the file."""
    try:
        listing = listed(file)
    except ParedError:
        return
    taken = sum(storage.nbytes for storage in listing.storages.values())
    assert taken + sum(note.nbytes for note in listing.notes.values()) <= len(file)
    for tensor in listing.tensors:
        assert isinstance(tensor, ListedTensor)
        assert tensor.storage is None or tensor.storage in listing.storages
