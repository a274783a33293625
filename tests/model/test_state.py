"""What a state dict does not hold as tensors: extra state of modules, and buffers that the constructor computes."""

import copy
import io
import json
import pickle
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.artifact.envelope import open_records
from pared.artifact.parse import parse_index
from pared.errors import CorruptError, MismatchError, ModelError
from pared.files.safetensors_file import write_safetensors
from pared.model.state.tables import is_computed

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Linear):
    """A layer with state that is in no tensor."""

    state: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.state if isinstance(self.state, float) else 1.0)

    def get_extra_state(self) -> Any:
        return {"state": self.state}

    def set_extra_state(self, state: Any) -> None:
        self.state = state["state"]


def scaled() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(64, 64), nn.ReLU(), Scaled(64, 64)).eval()


@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_extra_state_is_saved_and_loaded(container: str, tmp_path: Path) -> None:
    model = scaled()
    model[0].state = 7.0
    q = pared.fit(model, None, [X], quiet=True)
    pared.save(q, tmp_path, container=container)
    loaded = pared.load(tmp_path, scaled())
    assert (loaded[0].state, loaded[2].state) == (7.0, 1.0)
    assert torch.equal(loaded(X), q(X))
    q[2].state = 3.0  # as long as it lives, it is the model's own
    assert pared.load(pared.save(q, tmp_path, container=container), scaled())[2].state == 3.0
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert again[0].state == 7.0


VALUES: dict[str, Any] = {
    "nothing": None,
    "numbers": [1, 2.5, True, -(2**70), 1 + 2j],
    "not finite": [float("inf"), float("-inf")],
    "texts": ["", "é\ud800".encode("utf-8", "replace").decode(), "a/b"],
    "nested": {"a": ({1, 2}, [OrderedDict(b=frozenset(("x",)))]), 3: None, (1, "k"): []},
    "torch": [torch.float16, torch.Size([2, 3]), torch.device("cpu")],
    "bytes": [b"\x00\xff", b"", bytearray(b"abc")],
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_data_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    model = scaled()
    model[0].state = VALUES[name]
    pared.save(pared.fit(model, quiet=True), tmp_path)
    found = pared.load(tmp_path, scaled())[0].state
    assert found == VALUES[name]
    assert type(found) is type(VALUES[name])


def test_tensors_arrays_and_streams_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = scaled()
    table = torch.randn(33, 7)
    model[0].state = {
        "t": [table, table.bfloat16(), torch.arange(3), torch.zeros(0, 2), nn.Parameter(table)],
        "n": np.arange(6.0).reshape(2, 3).T,
        "b": io.BytesIO(b"what torch.save wrote"),
    }
    pared.save(pared.fit(model, None, [X], quiet=True), tmp_path)
    found = pared.load(tmp_path, scaled())[0].state
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["t"], model[0].state["t"], strict=True))
    assert np.array_equal(found["n"], model[0].state["n"])
    assert found["b"].read() == b"what torch.save wrote"


@pytest.mark.parametrize("value", [lambda: None, object(), io.StringIO("a"), torch.eye(2).to_sparse()], ids=type)
def test_what_only_a_pickle_could_store_is_refused_before_any_work(value: object) -> None:
    model = scaled()
    model[2].state = [value]
    for given in (None, [X]):
        with pytest.raises(ModelError) as error:
            pared.fit(model, None, given)
        assert error.value.where == "2"
        assert "at ['state'][0], which only a pickle could store" in error.value.what
        assert "Let get_extra_state return plain data" in error.value.remedy


def test_state_that_holds_itself_is_refused() -> None:
    model = scaled()
    model[0].state = []
    model[0].state.append(model[0].state)
    with pytest.raises(ModelError, match="0: its extra state nests containers too deeply"):
        pared.fit(model)


def test_state_counts_for_a_size_and_for_copies_under_two_names(tmp_path: Path) -> None:
    shared = Scaled(64, 64)
    shared.state = torch.randn(2000)
    model = nn.ModuleList([shared, shared, nn.Linear(64, 64)])
    plain = pared.save(pared.fit(nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]), quiet=True), tmp_path)
    size = plain.stat().st_size + 16_000
    conf = PostTrainingQuantConfig(max_size=size)
    assert pared.save(pared.fit(model, conf, quiet=True), tmp_path).stat().st_size <= size


def test_a_class_without_the_state_and_one_that_refuses_it_are_errors(tmp_path: Path) -> None:
    pared.save(pared.fit(scaled(), quiet=True), tmp_path)
    with pytest.raises(MismatchError, match=r"0\._extra_state: the artifact holds extra state of this module"):
        pared.load(tmp_path, nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))

    class Strict(Scaled):
        def set_extra_state(self, state: Any) -> None:
            raise KeyError(state["other"])

    with pytest.raises(MismatchError, match=r"0\._extra_state: set_extra_state raised KeyError: 'other'"):
        pared.load(tmp_path, nn.Sequential(Strict(64, 64), nn.ReLU(), Scaled(64, 64)))


def test_an_artifact_without_the_state_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    pared.save(pared.fit(plain, quiet=True), tmp_path)
    pared.load(tmp_path, scaled())
    assert "0._extra_state: the artifact holds no extra state of this module" in caplog.text


EDITS: dict[str, Any] = {
    "a tree of another kind": {"call": "os.system"},
    "two kinds": {"tuple": [], "dict": []},
    "a missing tensor": {"tensor": 1},
    "a tensor that is no row of bytes": {"bytes": 0},
    "a list as a key": {"dict": [[[1], 2]]},
    "a tensor in a set": {"set": [{"tensor": 0}]},
    "nothing, and a tensor left over": None,
    "an unknown type": {"dtype": "float3"},
    "a device": {"device": "evil:0"},
    "too deep": json.loads("[" * 90 + "]" * 90),
}


@pytest.mark.parametrize("edit", EDITS)
def test_trees_that_are_no_state_are_refused(edit: str, tmp_path: Path) -> None:
    model = scaled()
    model[0].state = torch.randn(4)
    path = pared.save(pared.fit(model, quiet=True), tmp_path)
    with open_records(path) as records:
        index, data = json.loads(zlib.decompress(records.index)), bytes(records.data)
    index["states"]["0._extra_state"] = EDITS[edit]
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, zlib.compress(json.dumps(index).encode()), (data,), len(data))
    with pytest.raises(CorruptError):
        pared.load(tmp_path / "x", scaled())


def test_tensors_of_a_state_with_a_gap_in_their_numbers_are_refused(tmp_path: Path) -> None:
    model = scaled()
    model[0].state = torch.randn(4)
    path = pared.save(pared.fit(model, quiet=True), tmp_path)
    with open_records(path) as records:
        text, data = zlib.decompress(records.index).decode(), bytes(records.data)
    index = json.loads(text.replace("0._extra_state/0", "0._extra_state/2"))
    index["states"]["0._extra_state"] = {"tensor": 2}
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, zlib.compress(json.dumps(index).encode()), (data,), len(data))
    with pytest.raises(CorruptError, match="its tensors are not numbered one after the other"):
        pared.load(tmp_path / "x", scaled())


# --- buffers that the constructor computes


def sinusoid(length: int, columns: int, base: float = 10_000.0) -> Tensor:
    return (torch.arange(length)[:, None] * base ** (-torch.arange(columns) / columns)).sin()


class Positions(nn.Module):
    """A table that grows in use, a mask, and random numbers; none of them in the state dict."""

    def __init__(self, length: int = 1000, base: float = 10_000.0, seed: int = 0) -> None:
        super().__init__()
        self.base = base
        self.table: Tensor
        self.noise: Tensor
        self.mask: Tensor
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("table", sinusoid(length, 64, base), persistent=False)
        self.register_buffer("mask", torch.full((256, 256), -torch.inf).triu(1), persistent=False)
        self.register_buffer("noise", torch.randn(100, 64, generator=generator), persistent=False)
        torch.manual_seed(0)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.table):
            self.table = sinusoid(len(x) + 10, 64, self.base)
        found: Tensor = self.out(x + self.table[: len(x)] + self.noise[0] + self.mask[: len(x), 0].sum())
        return found


def test_computed_tables_are_left_out_and_random_ones_are_stored(tmp_path: Path) -> None:
    q = pared.fit(Positions(), None, [X], quiet=True)
    path = pared.save(q, tmp_path)
    assert path.stat().st_size < 35_000  # 25,600 bytes of noise, and the weights
    treatments = {line.name: line.treatment for line in q.plan}
    assert treatments == {"out.weight": "grid", "out.bias": "grid", "table": "made", "mask": "made", "noise": "exact"}
    loaded = pared.load(tmp_path, Positions(seed=5))
    assert torch.equal(loaded(X), q(X))
    assert "not in the file, since the constructor computes them: table and 1 more" in q.report()
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(again(X), q(X))
    assert pared.save(loaded, tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_table_that_grew_is_that_of_the_class_again(tmp_path: Path) -> None:
    q = pared.fit(Positions(100), None, [X], quiet=True)
    long = torch.randn(150, 64)
    with torch.no_grad():
        wanted = q(long)
        pared.save(q, tmp_path)
        loaded = pared.load(tmp_path, Positions(100))
        assert len(loaded.table) == 100
        assert torch.equal(loaded(long), wanted)
        assert len(loaded.table) == 160


def test_a_small_table_that_grew_is_loaded_as_it_became(tmp_path: Path) -> None:
    class Small(Positions):
        def __init__(self) -> None:
            super().__init__(8)
            self.register_buffer("mask", torch.zeros(256, 1), persistent=False)
            self.table = self.table[:, :64]

    q = pared.fit(Small(), None, [X[:4]], quiet=True)
    with torch.no_grad():
        q(X[:10])
        pared.save(q, tmp_path)
        loaded = pared.load(tmp_path, Small())
        assert torch.equal(loaded(X), q(X))


def test_another_configuration_is_an_error_that_names_the_table(tmp_path: Path) -> None:
    pared.save(pared.fit(Positions(), None, [X], quiet=True), tmp_path)
    with pytest.raises(MismatchError, match="table: the model's constructor gives this table other numbers"):
        pared.load(tmp_path, Positions(base=500.0))


def test_the_last_bits_of_another_machine_are_no_error(tmp_path: Path) -> None:
    pared.save(pared.fit(Positions(), None, [X], quiet=True), tmp_path)
    model = Positions()
    model.table.add_(1e-6)
    assert torch.equal(pared.load(tmp_path, model).table, model.table)


def test_the_meta_device_cannot_supply_a_table(tmp_path: Path) -> None:
    pared.save(pared.fit(Positions(), None, [X], quiet=True), tmp_path)
    with pytest.raises(MismatchError, match="table: is on the meta device, and the artifact leaves it") as error:
        pared.load(tmp_path, Positions().to("meta"))
    assert error.value.remedy == "Build the model on the CPU, or at least this buffer."
    part = Positions()
    part.out.to("meta")
    assert pared.load(tmp_path, part)(X).isfinite().all()


def test_small_tables_load_into_the_meta_device(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", 1e4 ** (-torch.arange(32) / 32), persistent=False)
            self.out = nn.Linear(64, 64)

    q = pared.fit(Rotary(), quiet=True)
    pared.save(q, tmp_path)
    with torch.device("meta"):
        empty = Rotary()
    assert torch.equal(pared.load(tmp_path, empty).frequencies, q.frequencies)


def test_a_file_larger_than_the_state_dict_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("noise", torch.randn(100, 100), persistent=False)
    pared.save(pared.fit(model, quiet=True), tmp_path)
    assert "that the float model's state dict takes, which leaves buffers out; noise is the largest of 1" in caplog.text


COMPUTED = {
    "sinusoids in half precision": sinusoid(1000, 32).half(),
    "sinusoids with a row for padding": sinusoid(1000, 64).index_fill(0, torch.tensor(1), 0.0),
    "rotations": torch.polar(torch.ones(512, 32), torch.arange(512.0)[:, None] * 1e4 ** (-torch.arange(32) / 32)),
    "a window": torch.hann_window(4000),
    "a mask of bytes": torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril(),
    "a mask of the least number": torch.full((128, 128), torch.finfo(torch.float32).min).triu(1),
    "slopes": -torch.arange(512.0)[None, :] * 2.0 ** (-torch.arange(8))[:, None],
    "indices of relative positions": (torch.arange(49)[:, None] - torch.arange(49) + 48),
    "positions": torch.arange(4096)[None],
    "zeros": torch.zeros(5000),
    "frequencies far from zero": 1000 + torch.linspace(0, 1, 2048),
    "zeros of 8 bits": torch.zeros(5000, dtype=torch.float8_e4m3fn),
}
RANDOM = {
    "features": torch.randn(256, 64, generator=torch.Generator().manual_seed(0)),
    "a permutation": torch.randperm(4096, generator=torch.Generator().manual_seed(0)),
    "a permutation in floats": torch.randperm(300, generator=torch.Generator().manual_seed(0)).float(),
    "signs": torch.randn(4096, generator=torch.Generator().manual_seed(0)).sign(),
    "a sparse mask": torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.02,
    "numbers around 300": 300 + torch.randn(4096, generator=torch.Generator().manual_seed(0)),
    "rows around 25": 25 + 0.1 * torch.randn(256, 32, generator=torch.Generator().manual_seed(0)),
    "numbers of 8 bits": torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
    "a rotation": torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0],
}


@pytest.mark.parametrize("name", COMPUTED)
def test_tables_are_recognized(name: str) -> None:
    assert is_computed(COMPUTED[name])


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_not_tables(name: str) -> None:
    assert not is_computed(RANDOM[name])


def test_files_of_the_new_version_are_parsed_and_old_ones_stay_what_they_were(tmp_path: Path) -> None:
    for model, version in ((nn.Linear(8, 8), 2), (Positions(), 3), (scaled(), 3)):
        with open_records(pared.save(pared.fit(model, quiet=True), tmp_path)) as records:
            assert json.loads(zlib.decompress(records.index))["pared"] == version
            assert parse_index(records).to_json()["pared"] == version
