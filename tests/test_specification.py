"""`docs/format.md` and the reader beside it: the example is true, and the reader needs nothing of ours."""

import importlib.util
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import container, entropy

DOCS = Path(__file__).parent.parent / "docs"


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
    with container.open_records(example()) as records:
        index = container.parse_index(records)
        assert json.loads(found[1]) == index.to_json()
        for entry in index.entries:
            for part in entry.parts.values():
                assert zlib.crc32(records.data[part.offset : part.offset + part.length]) == part.crc32


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
    expected = {"t": t, "w": np.array([[1, -1, 6], [0, 2, -254]], np.float32), "b": np.array([1, -0.5], np.float32)}
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert (tensors[name] == value).all()
    assert tensors["n"] == 7


def test_the_reader_alone_needs_neither_torch_nor_pared(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example())
    script = DOCS / "read_artifact.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 200
    code = (
        "import runpy, sys\n"
        "runpy.run_path(sys.argv[1])['read'](sys.argv[2])\n"
        "assert not {'torch', 'pared'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(script), str(tmp_path / "a")], check=True)


def test_the_reader_alone_refuses_flipped_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(example().replace(bytes.fromhex("01fe03"), bytes.fromhex("01fe04")))
    with pytest.raises(ValueError, match="w: codes: the checksum does not match"):
        alone().read(tmp_path / "a")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int8", "int16"]),
    st.sampled_from([0.1, 0.4, 0.8, 2.0, 9.0, 60.0, 700.0, 9000.0]),
    st.sampled_from([1, 2, 5, 100, 4001, 140_000, 300_000]),
    st.integers(0, 2**32 - 1),
)
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
def test_the_reader_alone_rounds_to_bfloat16_as_torch_does(values: list[float]) -> None:
    given_values = torch.tensor(values)
    expected = given_values.to(torch.bfloat16).float().numpy()
    assert np.array_equal(alone().cast(given_values.numpy(), "bfloat16"), expected, equal_nan=True)
