"""The ledger: its rows are all the bytes there are, whatever they are counted in."""

import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pared.artifact.index import Entry, Index, Part
from pared.errors import ConfigError, FileError
from pared.files.safetensors_file import write_safetensors
from pared.inspection import ledger
from pared.inspection.ledger import Ledger, Row

CODES, STEP, HALF = bytes(range(12)), np.ones(3, "<f4").tobytes(), np.ones(5, "<f2").tobytes()
LARGE = np.arange(512, dtype="<i8").tobytes()


def artifact() -> tuple[bytes, bytes]:
    """An index and data: a grid of 3 x 4, a tied half-precision vector, and a vector that begins behind padding."""
    data = CODES + STEP + HALF + bytes(30) + LARGE
    parts = {"codes": Part(0, 12), "step": Part(12, 12, zlib.crc32(CODES + STEP))}
    grid = Entry(
        ("w",), "parameter", "float32", (3, 4), {"tag": "grid", "codes": "int8"}, ((3, 4), (0,)), 8.0, "", parts
    )
    values = {"values": Part(24, 10, zlib.crc32(HALF))}
    fmt = {"tag": "float", "dtype": "float16"}
    half = Entry(("b", "c"), "parameter", "float32", (5,), fmt, None, None, "one dimension", values)
    table = {"values": Part(64, 4096, zlib.crc32(LARGE))}
    large = Entry(("d",), "buffer", "int64", (512,), {"tag": "raw"}, None, None, "kept", table)
    return Index((grid, half, large)).to_bytes(), data


def as_pt(index: bytes, data: bytes) -> bytes:
    file = io.BytesIO()
    records = {"index": index, "data": data}
    torch.save({name: torch.tensor(list(record), dtype=torch.uint8) for name, record in records.items()}, file)
    return file.getvalue()


def as_safetensors(index: bytes, data: bytes) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, index, (data,), len(data))
    return file.getvalue()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 4)
        self.out = nn.Linear(3, 7)
        self.out.weight = self.table.weight
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)


def by_name(found: Ledger) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


def check_sums(found: Ledger) -> None:
    assert sum(row.nbytes for row in found.rows) == found.nbytes
    assert sum(found.by_format().values()) == found.nbytes
    assert all(row.nbytes >= 0 for row in found.rows)


@pytest.mark.parametrize(("kind", "name"), [(as_pt, "best_model.pt"), (as_safetensors, "best_model.safetensors")])
def test_an_artifact(kind: Any, name: str, tmp_path: Path) -> None:
    index, data = artifact()
    file = kind(index, data)
    (tmp_path / name).write_bytes(file)
    found = ledger.inspect(tmp_path / name)
    check_sums(found)
    assert ledger.inspect(tmp_path) == ledger.inspect(str(tmp_path / name)) == found
    assert found == ledger.of_artifact_bytes(file, str(tmp_path / name))
    assert found.rows == (
        Row("w", (3, 4), "grid int8", 24, original=("float32", 48)),
        Row("b", (5,), "float16", 10, "one dimension; also c", original=("float32", 20)),
        Row("d", (512,), "int64", 4096, "kept", original=("int64", 4096)),
        Row("(padding)", None, "padding", 30),
        Row("(index)", None, "index", len(index)),
        Row("(container)", None, "container", len(file) - len(index) - len(data)),
    )
    assert (found.elements, found.original_nbytes, found.nbytes) == (529, 4164, len(file))
    assert found.bits_per_weight == 8 * len(file) / 529
    assert [row.bits for row in found.rows] == [16.0, 16.0, 64.0, 0.0, 0.0, 0.0]


def test_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "net.bin"
    whole = torch.ones(8, 4)
    torch.save({"net": Net().state_dict(), "view": whole[2], "meta": torch.ones(2, device="meta")}, path)
    found = ledger.inspect(path)
    check_sums(found)
    rows = by_name(found)
    assert rows["net/table.weight"] == Row(
        "net/table.weight", (7, 3), "float32", 84, "its storage is also that of net/out.weight"
    )
    assert rows["net/out.weight"] == Row(
        "net/out.weight", (7, 3), "float32", 0, "kept in the storage of net/table.weight"
    )
    assert rows["view"] == Row("view", (4,), "float32", 128, "a view of 16 bytes that keeps a storage of 128")
    assert rows["view"].bits == 256.0
    assert rows["meta"] == Row("meta", (2,), "float32", 0, "on the meta device: it holds no numbers")
    assert [row.name for row in found.rows][-2:] == ["(pickle)", "(container)"]
    lstm = sum(p.numel() for p in Net().lstm.parameters())
    assert found.elements == 21 + lstm + 7 + 4
    assert found.original_nbytes is None


def test_a_storage_without_a_tensor(tmp_path: Path) -> None:
    torch.save({"storage": torch.ones(5).untyped_storage(), "tensor": torch.ones(2)}, tmp_path / "a.pt")
    found = ledger.inspect(tmp_path / "a.pt")
    check_sums(found)
    assert by_name(found)["(data/0)"] == Row("(data/0)", None, "unused", 20, "no tensor refers to it")


def test_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    found = ledger.inspect(path)
    check_sums(found)
    assert found.rows[:2] == (Row("a", (3, 4), "float32", 48), Row("b", (2,), "bfloat16", 4))
    assert found.rows[2].name == "(header)"
    assert found.elements == 14


def test_a_live_model() -> None:
    net = Net()
    found = ledger.inspect(net)
    check_sums(found)
    rows = by_name(found)
    lstm = sum(p.numel() for p in net.lstm.parameters())
    assert (found.file, found.nbytes, found.elements) == ("Net", 4 * (21 + lstm + 7) + 2, 21 + lstm + 7 + 2)
    assert (rows["table.weight"].nbytes, rows["out.weight"].nbytes, rows["mask"].nbytes) == (84, 0, 2)
    assert found.bits_per_weight == pytest.approx(32, rel=0.02)


def test_live_models_of_unusual_tensors() -> None:
    net = nn.Module()
    whole = torch.ones(10)
    net.register_buffer("part", whole[:3])
    net.register_buffer("rest", whole[3:])
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("meta", torch.ones(3, device="meta"))
    net.register_buffer("empty", torch.ones(0))
    net.register_buffer("empty too", torch.ones(0))
    found = ledger.inspect(net)
    check_sums(found)
    assert [row.nbytes for row in found.rows] == [40, 0, 36, 0, 0, 0]
    assert found.elements == 10 + 9


def test_a_model_with_an_artifact_is_accounted_for_by_its_bytes() -> None:
    data = as_pt(*artifact())

    class Ours(nn.Linear):
        def _pared_artifact(self) -> bytes:
            return data

    found = ledger.inspect(Ours(1, 1))
    assert (found.file, found.nbytes) == ("Ours", len(data))
    assert found == ledger.of_artifact_bytes(data, "Ours")


def test_nothing_that_can_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        ledger.inspect(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: holds no file of weights\n"
        "  Pass the directory that save wrote, a Hugging Face folder, or the path of a file."
    )
    with pytest.raises(FileError, match="cannot be read: No such file or directory"):
        ledger.inspect(tmp_path / "missing")
    with pytest.raises(ConfigError) as wrong:
        ledger.inspect({"a": torch.ones(2)})
    assert str(wrong.value) == (
        "inspect: expected a path or a torch.nn.Module, got dict\n"
        "  Pass the path of a file or of a folder, or the model."
    )


def test_json() -> None:
    found = ledger.of_artifact_bytes(as_safetensors(*artifact()), "a").to_json()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"file", "bytes", "rows", "findings", "sampled"}
    assert found["rows"][0] == {"name": "w", "shape": [3, 4], "format": "grid int8", "bytes": 24, "bits": 16.0}
    assert found["rows"][-1]["shape"] is None
    assert found["findings"] == []


def test_text() -> None:
    shown = ledger.of_artifact_bytes(as_safetensors(*artifact()), "a/b").render().splitlines()
    size = len(as_safetensors(*artifact()))
    assert shown[0] == "a/b"
    assert shown[1] == f"{size:,} bytes, {size / 4164:.3f} of the source, {8 * size / 529:.2f} bits per weight"
    assert any(line.split() == ["w", "3x4", "grid", "int8", "16.00", "24"] for line in shown)


def test_text_stays_within_100_columns_and_moves_no_cursor() -> None:
    names = ["very.long." * 30, "[red]markup[/red]", "\x1b[2J", "two\nlines", "wide: 漢字"]
    rows = tuple(Row(name, (2, 3) * 9, "float32", 10**12, "because " * 30) for name in names)
    shown = str(Ledger("deep/" * 60, 5 * 10**12, rows, 1))
    assert max(map(len, shown.splitlines())) <= 100
    assert "[red]markup[/red]" in shown
    assert "\\x1b[2J" in shown
    assert all(character == "\n" or character.isprintable() for character in shown)


@pytest.mark.child
def test_inspecting_files_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "best_model.pt").write_bytes(as_pt(*artifact()))
    (tmp_path / "ours.safetensors").write_bytes(as_safetensors(*artifact()))
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    torch.save(Net(), tmp_path / "module.pt")
    safetensors.torch.save_file({"a": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    (tmp_path / "text").write_text("hello")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from pared.errors import FileError\nfrom pared.inspection import ledger\n"
        "for path in [Path(sys.argv[1]), *Path(sys.argv[1]).iterdir()]:\n"
        "    try:\n        print(ledger.inspect(path).nbytes)\n"
        "    except FileError as error:\n        print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert len([line for line in shown.stdout.splitlines() if line.isdecimal()]) == 6


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype, start: torch.zeros((*shape, 4)).to(dtype)[..., start:],
    shapes,
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
    st.integers(0, 3),
)
trees = st.recursive(
    tensors | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(trees)
@pytest.mark.slow
def test_any_checkpoint_sums_to_its_file(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.pt"
    torch.save(tree, path)
    found = ledger.inspect(path)
    check_sums(found)
    assert found.nbytes == path.stat().st_size
    names = [row.name for row in found.rows if row.shape is not None]
    assert len(names) == count_tensors(tree)
    found.render()


def count_tensors(tree: object) -> int:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return isinstance(tree, torch.Tensor) + sum(map(count_tensors, inside))
