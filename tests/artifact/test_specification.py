"""`docs/format.md` and the reader beside it: the example is true, and the reader needs nothing of ours."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.artifact.envelope import open_records
from pared.artifact.index import NEWEST, VERSION
from pared.artifact.parse import parse_index
from pared.errors import ParedError
from pared.files.safetensors_file import write_safetensors
from pared.formats import entropy
from pared.model import storage
from pared.model.contents import Contents
from pared.model.state.tables import made
from tests.golden import make
from tests.mutations import mutations

DOCS = Path(__file__).parents[2] / "docs"


def specification() -> str:
    return (DOCS / "format.md").read_text(encoding="utf-8")


def dumped(name: str) -> bytes:
    """The bytes of a dump in the specification; a star repeats the line above up to the next offset."""
    found = re.search(rf"```hexdump {name}\n(.*?)```", specification(), re.DOTALL)
    assert found is not None
    content = b""
    for line in found[1].splitlines():
        if line != "*":
            position = int(line[:4], 16)
            row = content[-16:]
            content += row * ((position - len(content)) // 16) + bytes.fromhex(line[6:53])
            assert len(content) > position
    return content


def example() -> bytes:
    """The file that the specification shows."""
    return dumped("header") + dumped("data") + dumped("index")


def test_the_example_of_the_specification_is_true() -> None:
    found = re.search(r"```json\n(.*?)```", specification(), re.DOTALL)
    assert found is not None
    with open_records(example()) as records:
        index = parse_index(records)
        assert json.loads(found[1]) == index.to_json()
        for entry in index.entries:
            *others, last = entry.parts.values()
            stored = b"".join(records.data[part.offset : part.end] for part in (*others, last))
            assert zlib.crc32(stored) == last.crc32
            assert [part.crc32 for part in others] == [None] * len(others)


def alone() -> ModuleType:
    """The stand-alone reader."""
    spec = importlib.util.spec_from_file_location("read_artifact", DOCS / "read_artifact.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_reader_alone_reads_the_example(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example())
    if kind == "pt":
        records = {"index": dumped("index"), "data": dumped("data")}
        torch.save({n: torch.tensor(list(r), dtype=torch.uint8) for n, r in records.items()}, tmp_path / "a")
    tensors = alone().read(tmp_path / "a")
    t = np.zeros((2, 16), np.float32)
    t[0, 3], t[1, 1], t[1, 14] = 0.5, -0.25, -1.25
    assert tensors["w"] is tensors["v"]
    c = np.zeros((4, 5), np.float32)
    c[0], c[2] = (5, -10, 15, -20, 25), np.array([-1, 2, -3, 4, -127], np.float32) * np.float32(0.5452538728713989)
    expected = {
        "t": t,
        "c": c,
        "w": np.array([[1, -1.5, 6], [0, 3, -254]], np.float32),
        "b": np.array([1, -0.5], np.float32),
    }
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert (tensors[name] == value).all()
    assert tensors["n"] == 7


@pytest.mark.child
def test_the_reader_alone_needs_neither_torch_nor_pared(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example())
    script = DOCS / "read_artifact.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 290
    code = (
        "import runpy, sys\n"
        "runpy.run_path(sys.argv[1])['read'](sys.argv[2])\n"
        "assert not {'torch', 'pared'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(script), str(tmp_path / "a")], check=True)


def test_the_reader_alone_refuses_flipped_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example().replace(bytes.fromhex("01fe03"), bytes.fromhex("01fe04")))
    with pytest.raises(ValueError, match="w: the checksum does not match"):
        alone().read(tmp_path / "a")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int8", "int16"]),
    st.sampled_from([0.1, 0.4, 0.8, 2.0, 9.0, 60.0, 700.0, 9000.0]),
    st.sampled_from([1, 2, 5, 100, 4001, 140_000, 300_000]),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_the_reader_alone_decodes_what_the_coder_writes(dtype: str, spread: float, count: int, seed: int) -> None:
    limits = np.iinfo(dtype)
    codes = np.random.default_rng(seed).laplace(0, spread, count).round().clip(limits.min, limits.max).astype(dtype)
    stream = entropy.encode(codes)
    coding = None if stream.coding is None else stream.coding.to_json()
    found = alone().decode(bytes(stream.payload), coding, count, dtype)
    assert found.dtype == codes.dtype
    assert (found == codes).all()


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@pytest.mark.slow
def test_the_reader_alone_rounds_to_bfloat16_as_torch_does(values: list[float]) -> None:
    given_values = torch.tensor(values)
    expected = given_values.to(torch.bfloat16).float().numpy()
    assert np.array_equal(alone().cast(given_values.numpy(), "bfloat16"), expected, equal_nan=True)


# --- the golden files

VERSIONS = ["v1", "v2", "v3", "v4", "v5"]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("version", VERSIONS)
def test_golden_files_are_read_alike_by_both_readers(version: str, kind: str) -> None:
    path = make.FOLDER / version / f"net.{kind}"
    expected = torch.load(make.FOLDER / version / "decoded.pt")
    ours = {stored.name: stored.coded.decode() for stored in storage.read(path).tensors}
    theirs = alone().read(path)
    assert ours.keys() == expected.keys() <= theirs.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert theirs[name].dtype == array.dtype
        assert np.array_equal(theirs[name], array)


def same(a: Contents, b: Contents) -> bool:
    return (a.activations, a.provenance, len(a.tensors)) == (b.activations, b.provenance, len(b.tensors)) and all(
        (x.names, x.kind, x.decision.bits, x.coded.format, x.coded.shape)
        == (y.names, y.kind, y.decision.bits, y.coded.format, y.coded.shape)
        and all(torch.equal(x.coded.parts[k], y.coded.parts[k]) for k in (x.coded.parts | y.coded.parts))
        for x, y in zip(a.tensors, b.tensors, strict=True)
    )


def test_the_golden_file_of_this_version_holds_every_way_of_storing() -> None:
    path = make.FOLDER / f"v{VERSION}" / "net.pt"
    assert same(storage.read(path), make.contents())
    with open_records(path) as records:
        entries = parse_index(records).entries
    assert {entry.format["tag"] for entry in entries} == {"grid", "float", "raw"}
    parts = [(name, part) for entry in entries for name, part in entry.parts.items()]
    coded = {name: {part.coding is None for n, part in parts if n == name} for name, _ in parts}
    assert coded["codes"] == coded["codes 0"] | coded["codes 7"] == coded["step"] == {True, False}
    assert {part.base is None for name, part in parts if name == "step"} == {True, False}
    assert {len(entry.parts) - 2 for entry in entries if "classes" in entry.parts} == {2, 4, 8}
    assert any(part.offset % 64 for _, part in parts)
    assert any(part.length >= 4096 for _, part in parts)


def test_the_golden_file_of_version_3_holds_what_only_that_has() -> None:
    found, wanted = storage.read(make.FOLDER / "v3" / "net.pt"), make.contents_of_version_3()
    assert same(replace(found, states={}), replace(wanted, tensors=wanted.tensors[:-1], states={}))
    assert {name: state.tree for name, state in found.states.items()} == {
        name: state.tree for name, state in wanted.states.items()
    }
    for ours, theirs in zip(
        found.states["a._extra_state"].tensors, wanted.states["a._extra_state"].tensors, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert found.made == (made(("positions", "again"), torch.arange(2000.0).reshape(20, 100)),)


def test_the_golden_file_of_version_4_holds_groups_of_every_kind() -> None:
    path = make.FOLDER / "v4" / "net.pt"
    assert same(storage.read(path), make.contents_of_version_4())
    with open_records(path) as records:
        entries = [entry for entry in parse_index(records).entries if entry.groups is not None]
    grids = [entry.groups for entry in entries if entry.groups is not None]
    assert {grid.zero for grid in grids} == {"fixed", "code", "least"}
    assert {grid.step for grid in grids} == {"float16", "bfloat16", "float32"}
    assert {(grid.nested > 0, grid.signed) for grid in grids} == {(False, False), (True, False), (True, True)}
    assert {grid.group is None for grid in grids} == {True, False}
    parts = [(name, part) for entry in entries for name, part in entry.parts.items()]
    assert {name for name, _ in parts} >= {
        *("classes", "codes", "codes 1", "step", "least", "multiple", "least multiple", "zero")
    }
    coded = {name: {part.coding is None for n, part in parts if n == name} for name, _ in parts}
    assert coded["codes"] == coded["step"] == {True, False}


def test_the_golden_file_of_version_5_holds_scales_of_every_kind() -> None:
    path = make.FOLDER / f"v{NEWEST}" / "net.pt"
    assert same(storage.read(path), make.contents_of_version_5())
    with open_records(path) as records:
        entries = [entry for entry in parse_index(records).entries if entry.scaled]
    assert {entry.format["codes"] for entry in entries} == {"int8", "int16"}
    assert {"classes" in entry.parts for entry in entries} == {True, False}
    for name in ("step", "scale"):
        assert {entry.parts[name].base is None for entry in entries} == {True, False}


CONTENTS = {"2": make.contents(), "4": make.contents_of_version_4(), "5": make.contents_of_version_5()}
SMALL = {version: storage.to_bytes(contents, "safetensors") for version, contents in CONTENTS.items()}


@pytest.mark.parametrize("version", SMALL)
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_bytes_of_every_way_of_storing_are_noticed(version: str, draw: st.DataObject) -> None:
    mutated = draw.draw(mutations(SMALL[version]))
    try:
        found = storage.from_bytes(mutated)
    except ParedError:
        return
    assert same(found, CONTENTS[version])


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where whole numbers stand."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    own = [path] if type(value) is int else []
    return own + [place for key, inner in inside for place in numbers(inner, (*path, key))]


@pytest.mark.parametrize("version", SMALL)
@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.slow
def test_another_number_in_the_index_is_refused_or_read(version: str, draw: st.DataObject) -> None:
    """Not every lie can be known for one, a base for instance; but none leads to any other error."""
    with open_records(SMALL[version]) as records:
        index, data = json.loads(zlib.decompress(records.index)), bytes(records.data)
    *path, last = draw.draw(st.sampled_from(numbers(index["tensors"])))
    place = index["tensors"]
    for key in path:
        place = place[key]
    place[last] = draw.draw(st.integers(-3, 300) | st.integers(0, 2**40) | st.just(place[last] + 1))
    file = io.BytesIO()
    write_safetensors(file, zlib.compress(json.dumps(index).encode()), (data,), len(data))
    try:
        found = storage.from_bytes(file.getvalue())
    except ParedError:
        return
    assert len(found.tensors) == len(CONTENTS[version].tensors)
