"""Decoding piece by piece gives what decoding as a whole gives, and takes little memory whatever a file describes."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import pared
from pared.artifact.decoding import pieces as module
from pared.artifact.decoding.pieces import pieces
from pared.artifact.decoding.whole import decode
from pared.artifact.envelope import open_records
from pared.artifact.index import Entry, Index
from pared.artifact.parse import parse_index
from pared.artifact.parts import placed
from pared.artifact.torch_file import write_torch
from pared.errors import MismatchError, UnsafeError
from pared.files.disk import write_atomic
from pared.files.memory_limit import MemoryLimit
from pared.formats.dtypes import Array, bytes_of
from pared.formats.entropy import Coding
from pared.formats.streams import EncodedPart, encode_codes, encode_steps
from pared.formats.views import View

LIMIT = MemoryLimit("a file", 0)
VIEWS = (
    View((60, 84), (0,)),
    View((60, 84), (1,)),
    View((60, 84), ()),
    View((60, 84), (0, 1)),
    View((4, 15, 84), (0, 2)),
    View((60, 3, 28), (0, 1)),
)


def packed(codes: Array, step: Array, view: View, dtype: str, scale: Array | None = None) -> tuple[Entry, memoryview]:
    parts = encode_codes(codes, view if scale is None else view.across)
    if scale is not None:
        parts["scale"] = encode_steps(scale)
    parts["step"] = encode_steps(step)
    entry = Entry(
        names=("w",),
        kind="parameter",
        dtype=dtype,
        shape=codes.shape,
        format={"tag": "grid", "codes": codes.dtype.name} | ({} if scale is None else {"scaled": True}),
        view=(view.split, view.rows),
        bits=None,
        because="",
        parts=placed(parts, 0),
    )
    data = bytearray()
    for part, piece in zip(entry.parts.values(), parts.values(), strict=True):
        data.extend(bytes(part.offset - len(data)))
        data.extend(piece.payload)
    return entry, memoryview(bytes(data))


@pytest.mark.parametrize("size", [7, 100, 1 << 18])
@pytest.mark.parametrize("spread", [0, 1, 40])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_pieces_are_the_whole(view: View, spread: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", size)
    chance = np.random.default_rng(0)
    for kind, dtype in itertools.product(("int8", "int16"), ("float32", "float64", "bfloat16")):
        scale = np.repeat(np.exp(chance.normal(size=60)), 84).reshape(60, 84)
        codes = np.clip(chance.normal(size=(60, 84)) * spread * scale, -120, 120).astype(kind)
        step = np.abs(chance.normal(size=view.n_rows)).astype(np.float32)
        for columns in (None, np.exp2(chance.integers(-2, 3, view.n_columns)).astype(np.float32)):
            entry, data = packed(codes, step, view, dtype, columns)
            found = list(pieces(entry, data, LIMIT))
            whole = decode(entry, data)
            assert all(one.ndim == 1 and one.dtype == whole.dtype for one in found)
            assert bytes(bytes_of(np.concatenate(found))) == bytes(bytes_of(whole))


def test_streams_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    codes = chance.integers(-1, 2, size=(700, 1000)).astype(np.int8)
    entry, data = packed(codes, np.ones(700, np.float32), View((700, 1000), (0,)), "float32")
    assert entry.parts["codes"].length > 4
    assert bytes(bytes_of(np.concatenate(list(pieces(entry, data, LIMIT))))) == bytes(bytes_of(decode(entry, data)))


def hostile(path: Path, shape: tuple[int, ...], *, rows: int = 1, dtype: str = "float32", codes: str = "int8") -> Path:
    """An artifact of a few bytes with very many equal numbers."""
    constant = EncodedPart(b"", Coding(per_symbol=1, constant=1))
    view = (shape, (0,)) if rows > 1 else (shape, ())
    step = (
        EncodedPart(b"", Coding(per_symbol=1, constant=0), base=0) if rows > 1 else encode_steps(np.ones(1, np.float32))
    )
    parts = {"codes": constant, "step": step}
    entry = Entry(("w",), "parameter", dtype, shape, {"tag": "grid", "codes": codes}, view, None, "", placed(parts, 0))
    data = b"".join(bytes(part.payload) for part in parts.values())
    index = Index((entry,)).to_bytes()
    write_atomic(path, lambda file: write_torch(file, index, (data,), len(data)))
    with open_records(path) as records:
        parse_index(records)
    return path


def test_zeros_of_a_real_model_are_read(tmp_path: Path) -> None:
    """A layer of one value takes no bytes; its numbers are the user's all the same."""
    path = hostile(tmp_path / "a.pt", (4096, 4096))
    model = nn.Linear(4096, 4096, bias=False, device="meta")
    model = nn.ParameterDict({"w": model.weight})  # type: ignore[assignment]  # of the name in the file
    assert pared.load(path, model=model).state_dict()["w"].shape == (4096, 4096)
    expanded = pared.expand(path, tmp_path / "a.safetensors")
    assert expanded.stat().st_size > 4 * 4096 * 4096
    (row,) = pared.compare(path, expanded).pairs
    assert row.identical
    assert row.similarity is not None
    assert row.similarity.count == 4096 * 4096


def test_a_file_of_a_few_bytes_is_not_loaded_into_a_small_model(tmp_path: Path) -> None:
    path = hostile(tmp_path / "a.pt", (1 << 13, 1 << 13))
    with pytest.raises(MismatchError, match="describes 67,108,864 numbers, and the model has 64"):
        pared.load(path, model=nn.Linear(8, 8, bias=False))
    with pytest.raises(MismatchError, match="describes"):
        pared.tune_speed(path, nn.Linear(8, 8, bias=False), [])


def test_steps_count_too(tmp_path: Path) -> None:
    path = hostile(tmp_path / "a.pt", (1 << 26, 1), rows=1 << 26)
    with pytest.raises(UnsafeError, match="cannot be decoded in memory of four times the file"):
        pared.expand(path, tmp_path / "a.safetensors")
    with pytest.raises(UnsafeError, match="cannot be decoded"):
        pared.compare(path, path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt"]


_MEASURE = """
import resource, sys, pared
import pared.checkpoints.expand, pared.inspection.comparison.compare
def most():
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] << 10
before = most()
{call}
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.child
@pytest.mark.parametrize("verb", ["expand", "compare", "inspect"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_is_bounded_by_the_file(verb: str, dtype: str, tmp_path: Path) -> None:
    path = hostile(tmp_path / "a.pt", (1 << 13, 1 << 12), dtype=dtype, codes="int16")
    calls: dict[str, Any] = {
        "expand": f"pared.expand({str(path)!r}, {str(tmp_path / 'b.safetensors')!r})",
        "compare": f"pared.compare({str(path)!r}, {str(path)!r}).render()",
        "inspect": f"pared.inspect({str(path)!r}, depth='deep').render()",
    }
    code = _MEASURE.format(call=calls[verb])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4 * path.stat().st_size + (64 << 20)
