"""The tensors of an artifact without torch: bit for bit those that torch gets."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pared.artifact.decoding import whole
from pared.artifact.envelope import open_records
from pared.artifact.listing import list_artifact
from pared.artifact.parse import parse_index
from pared.errors import CorruptError
from pared.formats import dtypes
from pared.formats.coded import Coded, Float, Grid, Raw, log_step
from pared.formats.views import View
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from tests.golden import make


def bits_of(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def checked(contents: Contents, data: bytes) -> None:
    with open_records(data) as records:
        entries = parse_index(records).entries
        for stored, entry in zip(contents.tensors, entries, strict=True):
            array = whole.decode(entry, records.data)
            assert array.shape == stored.coded.shape
            assert array.tobytes() == bits_of(stored.coded.decode())
        listing = list_artifact(records)
        entry_of = {name: entry for entry in entries for name in entry.names}
        assert [tensor.name for tensor in listing.tensors] == list(entry_of)
        for tensor in listing.tensors:
            read = listing.array(tensor)
            assert read is not None
            entry = entry_of[tensor.name]
            assert (read.shape, tensor.nbytes, tensor.label) == (entry.shape, entry.nbytes, entry.label)
            assert read.tobytes() == whole.decode(entry, records.data).tobytes()


def contents_of(coded: Coded) -> Contents:
    return Contents((Stored(("w",), "parameter", coded, Decision("w", "grid", None, "")),))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("make_contents", [make.contents, make.contents_of_version_4])
def test_golden_contents_are_decoded_as_torch_decodes_them(make_contents: Callable[[], Contents], kind: str) -> None:
    contents = make_contents()
    checked(contents, storage.to_bytes(contents, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", ["int8", "int16"])
@pytest.mark.parametrize(
    "view",
    [View((6, 8, 3), (0,)), View((6, 8, 3), (1,)), View((6, 8, 3), ()), View((2, 3, 8, 3), (0, 2))],
    ids=["rows", "columns", "single", "groups"],
)
def test_grids_of_every_view(dtype: torch.dtype, codes: Any, view: View) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 8, 3).mul(torch.logspace(-3, 3, 6)[:, None, None]).to(dtype)
    step = log_step(torch.rand(view.row_sizes) + 0.01)
    for steps in (step, torch.rand(view.row_sizes)):
        contents = contents_of(Grid(codes).encode(weight, steps, view))
        checked(contents, storage.to_bytes(contents))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_floats_in_every_type_of_every_source(source: torch.dtype, stored: Any) -> None:
    values = torch.tensor([0.1, -0.0, 1e-7, 7e4, float("inf"), 1.00390625, 1.01171875]).to(source)
    contents = contents_of(Float(stored).encode(values))
    checked(contents, storage.to_bytes(contents))


@pytest.mark.parametrize("dtype", ["bool", "int64", "float64", "complex64", "bfloat16"])
def test_raw(dtype: str) -> None:
    contents = contents_of(Raw(dtype).encode(torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))))
    checked(contents, storage.to_bytes(contents))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_bfloat16_is_rounded_as_torch_rounds(values: list[float]) -> None:
    rounded = dtypes.converted(np.array(values, np.float32), dtypes.ELEMENTS["bfloat16"])
    assert rounded.tobytes() == bits_of(torch.tensor(values, dtype=torch.float32).to(torch.bfloat16))


def test_a_flipped_bit_is_found() -> None:
    contents = contents_of(Raw("float32").encode(torch.ones(4)))
    with open_records(storage.to_bytes(contents)) as records:
        (entry,) = parse_index(records).entries
        data = bytearray(records.data)
        data[0] ^= 1
        with pytest.raises(CorruptError, match="w: the checksum of its numbers does not match"):
            whole.decode(entry, memoryview(data))
