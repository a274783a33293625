"""Extra state of modules in checkpoints: `compress` stores it or refuses it, and so does `expand`."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pared
from pared.errors import ConfigError, FileError, UnsafeError
from tests.model.test_state import Scaled

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


class Packed(nn.Linear):
    """A layer whose state is a tensor, as that of layers in FP8 is."""

    scales: Tensor = torch.zeros(4, 4)

    def get_extra_state(self) -> Any:
        return self.scales

    def set_extra_state(self, state: Any) -> None:
        self.scales = state


def model(layer: type[nn.Module] = Scaled) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(layer(64, 64), nn.ReLU(), layer(64, 64)).eval()


VALUES: dict[str, Any] = {
    "a number": 7.0,
    "not finite": float("-inf"),
    "nothing": None,
    "containers": [(1, 2.5, True), {1: "a", ("b",): []}, {3}, OrderedDict(x=1 + 2j), torch.Size([2])],
    "empty": [(), {}, [], set(), b""],
    "bytes": [b"\x00\xff" * 300, bytearray(b"abc")],
    "types": [torch.float16, -(2**80)],
}


@pytest.mark.parametrize(("protocol", "legacy"), [(2, False), (4, False), (2, True)])
@pytest.mark.parametrize("name", VALUES)
def test_plain_data_come_back_as_they_were(name: str, protocol: int, legacy: bool, tmp_path: Path) -> None:
    net = model()
    net[0].state = VALUES[name]
    torch.save(net.state_dict(), tmp_path / "m.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    pared.compress(tmp_path / "m.pt", tmp_path / "c")
    loaded = pared.load(tmp_path / "c", model())
    assert loaded[0].state == VALUES[name]
    assert type(loaded[0].state) is type(VALUES[name])
    assert loaded[2].state == 1.0


@pytest.mark.parametrize("asked", [{}, {"bits": 4}, {"max_size": 16_000}], ids=str)
def test_tensors_and_streams_in_a_state_are_exact(asked: dict[str, int], tmp_path: Path) -> None:
    net = model()
    stream = io.BytesIO()
    torch.save({"amax": torch.ones(3)}, stream)
    table = torch.randn(20, 30)
    net[2].state = {"t": [table, table.T, table[:, :3].double(), torch.arange(4)], "s": stream}
    torch.save({"model": net.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "m.pt")
    path = pared.compress(tmp_path / "m.pt", tmp_path / "c", **asked)
    assert path.stat().st_size <= asked.get("max_size", 1 << 20)
    found = pared.load(tmp_path / "c", model())[2].state
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["t"], net[2].state["t"], strict=True))
    assert torch.equal(torch.load(found["s"])["amax"], torch.ones(3))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_state_that_is_a_tensor_is_a_tensor_of_every_file(suffix: str, tmp_path: Path) -> None:
    net = model(Packed)
    net[0].scales = torch.randn(8, 8)
    source = tmp_path / f"m.{suffix}"
    save_file(net.state_dict(), source) if suffix == "safetensors" else torch.save(net.state_dict(), source)
    pared.compress(source, tmp_path / "c", bits=3)
    loaded = pared.load(tmp_path / "c", model(Packed))
    assert torch.equal(loaded[0].scales, net[0].scales)
    pared.save(loaded, tmp_path / "again")
    for folder in ("c", "again"):
        back = load_file(pared.expand(tmp_path / folder, tmp_path / f"{folder}.safetensors"))
        assert torch.equal(back["0._extra_state"], net[0].scales)
        other = model(Packed)
        other.load_state_dict(back)


def test_expand_refuses_what_its_format_lacks_and_leaves_nothing(tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "m.pt")
    pared.compress(tmp_path / "m.pt", tmp_path / "c")
    with pytest.raises(ConfigError, match=r"0\._extra_state: is extra state of a module that is more than one tensor"):
        pared.expand(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Own:
    """A class of the user's."""


@pytest.mark.parametrize("value", [Own(), torch.eye(3).to_sparse(), {"a": [range(3)]}], ids=type)
def test_what_only_a_pickle_could_store_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    net = model()
    net[2].state = value
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(FileError, match=r"2\._extra_state: its extra state holds .* which only a pickle could store"):
        pared.compress(tmp_path / "m.pt", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_state_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    bomb: list[Any] = []
    for _ in range(25):
        bomb = [bomb, bomb]
    torch.save({"w": torch.ones(4, 4), "_extra_state": bomb}, tmp_path / "m.pt")
    with pytest.raises(UnsafeError):
        pared.compress(tmp_path / "m.pt", tmp_path / "c")


def test_nothing_in_a_state_is_called(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "called",))

    content = {"w": torch.ones(4, 4), "_extra_state": [Evil()]}
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(FileError):
        pared.compress(tmp_path / "m.pt", tmp_path / "c")
    assert not (tmp_path / "called").exists()
    assert pickle.dumps(1)


def test_shards_of_a_folder_have_their_states(tmp_path: Path) -> None:
    net = model()
    net[0].state, net[2].state = [torch.arange(3), b"a"], 7.0
    state = net.state_dict()
    (tmp_path / "m").mkdir()
    for i, prefix in enumerate(("0.", "2.")):
        shard = {name: value for name, value in state.items() if name.startswith(prefix)}
        torch.save(shard, tmp_path / "m" / f"pytorch_model-0000{i + 1}-of-00002.bin")
    pared.compress(tmp_path / "m", tmp_path / "c")
    loaded = pared.load(tmp_path / "c", model())
    assert torch.equal(loaded[0].state[0], torch.arange(3))
    assert (loaded[0].state[1], loaded[2].state) == (b"a", 7.0)
