"""The artifact: exact, deterministic, atomic; and every kind of damage has its own clear error."""

import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pared
from pared import CorruptError, FileError, MismatchError, ParedError, PostTrainingQuantConfig, VersionError
from pared.artifact.envelope import open_records
from pared.artifact.parse import parse_index
from pared.model import storage
from pared.model.contents import Contents
from pared.runtime import summary
from pared.runtime.record import contents_of
from tests.mutations import mutations


class Net(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.gru = nn.GRU(width, 8, batch_first=True)
        self.head = nn.Linear(8, 50)
        self.register_buffer("offset", torch.arange(3), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.gru(self.table(ids))[0]) * self.scale
        return out + self.offset.sum()


IDS = torch.arange(10).reshape(2, 5)


def quantized() -> Net:
    torch.manual_seed(0)
    conf = PostTrainingQuantConfig(rules=[pared.Rule("gru", bits=10), pared.Rule("head", bits=4)])
    return pared.fit(Net().eval(), conf, [IDS])


@pytest.fixture(scope="module")
def q() -> Net:
    return quantized()


@pytest.fixture(scope="module")
def data(q: Net) -> bytes:
    return storage.to_bytes(contents_of(q))


def same(a: Contents, b: Contents) -> bool:
    return all(
        x.names == y.names
        and x.kind == y.kind
        and x.decision == y.decision
        and x.coded.format == y.coded.format
        and x.coded.view == y.coded.view
        and x.coded.dtype == y.coded.dtype
        and all(torch.equal(x.coded.parts[k], y.coded.parts[k]) for k in y.coded.parts)
        for x, y in zip(a.tensors, b.tensors, strict=True)
    ) and (a.activations, a.provenance) == (b.activations, b.provenance)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.slow
def test_what_is_saved_is_what_is_loaded(q: Net, kind: str, device: str, tmp_path: Path) -> None:
    path = pared.save(q, tmp_path, container=kind)
    with torch.device(device):
        skeleton = Net()
    before = None if device == "meta" else {k: v.clone() for k, v in skeleton.state_dict().items()}
    loaded = pared.load(tmp_path, model=skeleton)
    assert same(contents_of(loaded), contents_of(q))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    with torch.no_grad():
        assert torch.equal(loaded(IDS), q(IDS))
    assert pared.save(loaded, tmp_path / "again", container=kind).read_bytes() == path.read_bytes()
    if before is not None:
        assert all(torch.equal(v, before[k]) for k, v in skeleton.state_dict().items()), "the skeleton was touched"


@pytest.mark.slow
def test_equal_fits_give_equal_files(data: bytes) -> None:
    assert storage.to_bytes(contents_of(quantized())) == data


def test_the_name_of_the_file_is_not_in_the_bytes(q: Net, tmp_path: Path) -> None:
    first = pared.save(q, tmp_path / "a").read_bytes()
    assert first == pared.save(q, tmp_path / "some other place").read_bytes()


def test_torch_opens_it_as_plain_tensors(data: bytes) -> None:
    records = torch.load(io.BytesIO(data), weights_only=True)
    assert set(records) == {"index", "data"}
    assert json.loads(zlib.decompress(records["index"].numpy().tobytes()))["pared"] == 2


@pytest.mark.child
def test_a_fresh_process_gives_the_same_outputs(q: Net, tmp_path: Path) -> None:
    pared.save(q, tmp_path)
    (tmp_path / "deploy.yaml").unlink()
    code = (
        "import sys, torch, pared\nfrom tests.model.test_storage import IDS, Net\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "q = pared.load(sys.argv[1], model=Net())\n"
        "torch.save(q(IDS).detach(), sys.argv[1] + '/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), q(IDS))


def test_files_stand_beside_each_other(q: Net, tmp_path: Path) -> None:
    pared.save(q, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.pt", "deploy.yaml", "engine.json"]


def rezipped(data: bytes, **changes: bytes | None) -> bytes:
    """The same zip with members replaced, removed (None) or added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        members = {name: source.read(name) for name in source.namelist()}
        members.update({f"archive/{name}": value for name, value in changes.items() if value is not None})
        for name, value in members.items():
            if changes.get(name.removeprefix("archive/"), b"") is not None:
                target.writestr(name, value)
    return buffer.getvalue()


def reindexed(data: bytes, edit: object) -> bytes:
    """The same artifact with its index edited by a function."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        index = json.loads(zlib.decompress(source.read("archive/data/0")))
    edit(index)
    return rezipped(data, **{"data/0": zlib.compress(json.dumps(index).encode())})


def flipped(data: bytes) -> bytes:
    """One bit of the table's code stream flipped."""
    with open_records(data) as records:
        index = parse_index(records)
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        stored = bytearray(source.read("archive/data/1"))
    entry = next(e for e in index.entries if e.name == "table.weight")
    stored[entry.parts["codes"].offset + 5] ^= 1
    return rezipped(data, **{"data/1": bytes(stored)})


def drop_tensor(index: dict) -> None:  # type: ignore[type-arg]  # JSON
    index["tensors"] = [entry for entry in index["tensors"] if entry["name"] != "head.bias"]


def newer(index: dict) -> None:  # type: ignore[type-arg]  # JSON
    index["pared"] = 99


def misshapen(index: dict) -> None:  # type: ignore[type-arg]  # JSON
    entry = next(e for e in index["tensors"] if e["name"] == "head.bias")
    entry["shape"] = [51]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], type[ParedError]]] = {
    "truncated": (lambda d: d[: len(d) // 2], CorruptError),
    "empty": (lambda d: b"", FileError),
    "not an artifact": (lambda d: b"hello, this is text" * 10, FileError),
    "a flipped bit": (flipped, CorruptError),
    "a missing record": (lambda d: rezipped(d, **{"data/1": None}), CorruptError),
    "an extra record": (lambda d: rezipped(d, **{"data/2": b"more"}), CorruptError),
    "an index that is not JSON": (lambda d: rezipped(d, **{"data/0": zlib.compress(b"{oops")}), CorruptError),
    "an index that is not compressed": (lambda d: rezipped(d, **{"data/0": b"{}"}), CorruptError),
    "a newer version": (lambda d: reindexed(d, newer), VersionError),
    "a misshapen tensor": (lambda d: reindexed(d, misshapen), CorruptError),
    "a missing tensor": (lambda d: reindexed(d, drop_tensor), CorruptError),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(data: bytes, kind: str, tmp_path: Path) -> None:
    damage, error_type = DAMAGE[kind]
    (tmp_path / "best_model.pt").write_bytes(damage(data))
    with pytest.raises(error_type) as error:
        pared.load(tmp_path, model=Net())
    assert error.value.remedy


def test_a_flipped_bit_names_the_tensor(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "best_model.pt").write_bytes(flipped(data))
    with pytest.raises(CorruptError) as error:
        pared.load(tmp_path, model=Net())
    assert str(error.value) == (
        "table.weight: the checksum of its numbers does not match\n  Fetch the file again; it is damaged."
    )


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_bytes_are_refused_or_read_right(data: bytes, draw: st.DataObject) -> None:
    """Whatever is flipped, cut or inserted: an error of ours, or the very same numbers."""
    mutated = draw.draw(mutations(data, most=3))
    try:
        contents = storage.from_bytes(mutated)
    except ParedError:
        return
    assert same(contents, storage.from_bytes(data))


def test_the_wrong_architecture_is_explained(q: Net, tmp_path: Path) -> None:
    pared.save(q, tmp_path)
    with pytest.raises(MismatchError) as error:
        pared.load(tmp_path, model=nn.Linear(2, 2))
    assert str(error.value).startswith("wrong architecture: the artifact lacks bias, weight; the model has no ")
    with pytest.raises(MismatchError) as error:
        pared.load(tmp_path, model=Net(width=25))
    assert str(error.value).splitlines()[0] == "table.weight: the model has shape [50, 25], the artifact [50, 24]"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no artifact here"):
        pared.load(tmp_path, model=Net())


def test_an_unwritable_target_leaves_nothing(q: Net, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="file"):
        pared.save(q, tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_people_read_says_what_the_plan_says(tmp_path: Path) -> None:
    names = (
        "plain",
        "a: b",
        "{c}",
        "'d'",
        '"e"',
        "caf\u00e9",
        "\u2028",
        "\U0001f600",
        "null",
        "1e5",
        "- f",
        "# g",
        "\\",
    )
    model = nn.ParameterDict({name: torch.randn(8, 32) for name in names})
    model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    q = pared.fit(model)
    pared.save(q, tmp_path)
    text = (tmp_path / "deploy.yaml").read_text(encoding="utf-8")
    assert all("plan" not in line and line.startswith("- ") for line in text.splitlines()[-len(names) - 1 :])
    known = yaml.safe_load(text)["plan"]
    rows = {row.name: row for row in pared.inspect(tmp_path).rows}
    for line, ours in zip(known, q.pared.plan, strict=True):
        row = rows[ours.name]
        told = {**asdict(ours), "shape": list(ours.shape), "bytes": row.nbytes, "rate": row.bits}
        assert line == {key: value for key, value in told.items() if value not in (None, "")}


@pytest.mark.parametrize("value", [0.0, 1e-05, 1e22, 0.1, -2.5e-300, math.inf, -math.inf])
def test_numbers_that_people_read_are_numbers(value: float) -> None:
    text = summary._inline(value)
    assert yaml.safe_load(text) == value


def test_a_failed_write_keeps_what_was_there(q: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pared.save(q, tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="No space left on device"):
        pared.save(q, tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model.pt", "deploy.yaml", "engine.json"]


def test_a_meta_tensor_outside_the_state_is_named(tmp_path: Path) -> None:
    class Loose(nn.Linear):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            self.loose = torch.ones(2)

    pared.save(pared.fit(Loose(8, 8)), tmp_path)
    with torch.device("meta"):
        skeleton = Loose(8, 8)
    with pytest.raises(MismatchError, match="loose: is on the meta device and in no state dict"):
        pared.load(tmp_path, model=skeleton)


def test_an_engine_file_of_another_machine_is_not_used(q: Net, tmp_path: Path) -> None:
    pared.save(q, tmp_path)
    engine = json.loads((tmp_path / "engine.json").read_text())
    engine["machine"]["threads"] = 999
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    loaded = pared.load(tmp_path, model=Net())
    assert same(contents_of(loaded), contents_of(q))
    (tmp_path / "engine.json").write_text("{")
    assert same(contents_of(pared.load(tmp_path, model=Net())), contents_of(q))


GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_golden_files_stay_readable(name: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / name, tmp_path / ("best_model" + Path(name).suffix))
    loaded = pared.load(tmp_path, model=Net())
    expected = torch.load(GOLDEN / "decoded.pt")
    decoded = {stored.name: stored.coded.decode() for stored in contents_of(loaded).tensors}
    assert decoded.keys() == expected.keys()
    assert all(torch.equal(decoded[k], expected[k]) for k in expected)
