"""Files that lie or are damaged, and other files: refused, or listed soundly."""

import io
import json
import pickle
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import CorruptError, FileError, ParedError
from pared.files import safetensors_file
from pared.readers.listing import ListedTensor
from tests.mutations import mutations
from tests.readers.torch_files import PICKLE, STATE, Net, listed, replaced, saved, with_pickle

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


ENTRY = b'"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}'
EMPTY = b'"b":{"dtype":"F32","shape":[0],"data_offsets":[12,12]}'
# In each, % stands for the entry.
UNUSUAL = (
    *(
        b"{%}",
        b"{%," + EMPTY + b"}",
        b"{% }  \n",
        b'{ "__metadata__" : {"k":"v"} ,\t%}',
        b"{}",
        b"{%",
        b"{%,}",
        b"{%}}",
    ),
    *(
        b"{%}x",
        b"{%}\x0b",
        b"{,%}",
        b"{%,%}",
        b'{"__metadata__":{},"__metadata__":{},%}',
        b'{"__metadata__":{"k":"{}"},%}',
    ),
    *(b'{"__metadata__":{"k":"}"},%}', b'{"__metadata__":{"k":"v","k":"w"},%}', b'{"__metadata__":{"k":NaN},%}'),
    *(b'{"a":[1]}', b'{"a":{"dtype":{"x":1}}}', b'{"a":{"dtype":"F32"},"b":3}', b'{"a":{}'),
)
NAMES = (b'"\\u0061"', b'"\xff"', b'"\xc3\xa4"', b'"a\nb"', b"a", b'""', b'"{}"')
PLAIN = [*(one.replace(b"%", ENTRY) for one in UNUSUAL), *(b"{%s}" % ENTRY.replace(b'"a"', name) for name in NAMES)]


@pytest.mark.parametrize("header", PLAIN)
def test_headers_are_read_alike_one_by_one_and_at_once(header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> object:
        try:
            return listed(struct.pack("<Q", len(header)) + header + bytes(12)).tensors
        except CorruptError as error:
            return str(error)

    one_by_one = read()
    monkeypatch.setattr(safetensors_file, "_one_by_one", lambda *_: None)
    assert read() == one_by_one
