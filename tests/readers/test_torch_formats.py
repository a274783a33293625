"""Modules, TorchScript, exported programs and optimizers in files of torch, and of what is built on it."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import readers
from tests.readers.checks import check, check_sum, listed


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.block[0].weight = nn.Parameter(torch.arange(16.0).reshape(4, 4).T)
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = nn.Parameter(self.table.weight[:, :])
        self.extra = torch.arange(3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.block(self.table(x) * self.scale.float() + self.extra[0])
        found: Tensor = self.head(hidden)
        return found


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickled_module_has_the_names_of_its_state_dict(tmp_path: Path, modern: bool) -> None:
    torch.manual_seed(0)
    module = Part()
    torch.save(module, tmp_path / "m.pt", _use_new_zipfile_serialization=modern)
    listing = check(tmp_path / "m.pt", {**module.state_dict(), "extra": module.extra})
    assert f"{Part.__module__}.Part" in listing.imports
    torch.save({"model": module, "step": 1}, tmp_path / "c.pt", _use_new_zipfile_serialization=modern)
    check(tmp_path / "c.pt", {f"model/{k}": v for k, v in {**module.state_dict(), "extra": module.extra}.items()})


def test_a_module_that_has_two_places_is_listed_at_both(tmp_path: Path) -> None:
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    torch.save(module, tmp_path / "m.pt")
    check(tmp_path / "m.pt", dict(module.state_dict()))


class Cyclic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.owners = [self]
        self.register_forward_hook(self.hook)

    def hook(self, *_: object) -> None:
        pass


def test_a_module_that_refers_to_itself_is_listed_once(tmp_path: Path) -> None:
    module = Cyclic()
    torch.save(module, tmp_path / "m.pt")
    check(tmp_path / "m.pt", dict(module.state_dict()))


@pytest.mark.parametrize("modern", [True, False])
def test_an_optimizer_checkpoint_is_listed(tmp_path: Path, modern: bool) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=modern)
    expected = {f"model/{name}": tensor for name, tensor in module.state_dict().items()}
    for i, kept in optimizer.state_dict()["state"].items():
        expected |= {f"optimizer/state/{i}/{key}": value for key, value in kept.items()}
    listing = check(tmp_path / "c.pt", expected)
    assert listing.imports == ()


def test_an_old_file_shares_storages(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "row": whole[1], "column": whole[:, 2], "half": whole.half(), "empty": whole[:0]}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    listing = check(tmp_path / "a.pt", state)
    assert len({held.storage for held in listing.tensors if held.name in ("whole", "row", "column")}) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # old files are what is read here
def test_torchscript_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    module = Part().eval()
    with torch.no_grad():
        scripted = torch.jit.trace(module, torch.tensor([1, 2]))
    torch.jit.save(scripted, str(tmp_path / "s.pt"), _extra_files={"labels.txt": b"cat" * 1000})
    listing = check(tmp_path / "s.pt", dict(torch.jit.load(str(tmp_path / "s.pt")).state_dict()), only=False)
    assert listing.kind == "a TorchScript archive"
    assert listing.imports == ()
    assert listing.notes["(debug)"].ballast
    assert (listing.notes["(extra)"].nbytes, listing.notes["(extra)"].ballast) == (3000, True)
    assert listing.notes["(code)"].nbytes > 0


@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")  # two weights are views of a third
@pytest.mark.slow
def test_exported_programs_are_listed(tmp_path: Path) -> None:
    module = Part().eval()
    exported = torch.export.export(module, (torch.tensor([1, 2]),))
    torch.export.save(exported, tmp_path / "a.pt2")
    constants = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    expected = {**exported.state_dict, **constants}
    listing = check(tmp_path / "a.pt2", expected)
    assert listing.kind == "an exported program (.pt2)"
    assert listing.notes["(sample inputs)"].ballast


def test_pickles_in_exported_programs_are_no_ballast(tmp_path: Path) -> None:
    """Subclasses of tensors are saved as pickles: nobody looks into those here, but they are no waste."""
    torch.export.save(torch.export.export(nn.Linear(200, 200), (torch.ones(1, 200),)), tmp_path / "plain.pt2")
    with zipfile.ZipFile(tmp_path / "plain.pt2") as plain, zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name).replace(b'"use_pickle": false', b'"use_pickle": true'))
    ledger = pared.inspect(tmp_path / "a.pt2")
    assert ledger.by_format()["objects"] == 4 * (200 * 200 + 200)
    assert ledger.findings == ()
    check_sum(tmp_path / "a.pt2")


def test_packages_of_several_programs_have_prefixes(tmp_path: Path) -> None:
    from torch.export.pt2_archive._package import package_pt2

    one, two = (torch.export.export(nn.Linear(3, n), (torch.ones(1, 3),)) for n in (2, 4))
    package_pt2(str(tmp_path / "a.pt2"), exported_programs={"one": one, "two": two})
    expected = {
        f"{name}/{k}": v for name, program in (("one", one), ("two", two)) for k, v in program.state_dict.items()
    }
    check(tmp_path / "a.pt2", expected)


# Quantized modules of torch.ao, as Intel Neural Compressor 2.6 makes them.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao says that it is old
def test_files_of_inc_are_listed(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.lstm(x)[0])
            return found

    class Wrapped(nn.Module):
        def __init__(self, quantized: nn.Module, original: nn.Module) -> None:
            super().__init__()
            self._model = quantized
            self.fp32_model = original

    original = Net()
    quantized = torch.ao.quantization.quantize_dynamic(original, {nn.Linear, nn.LSTM})
    state = quantized.state_dict()
    torch.save({**state, "best_configure": {"op": {("head", "Linear"): {"weight": {"bits": 8}}}}}, tmp_path / "own.pt")
    torch.save(Wrapped(quantized, original).state_dict(), tmp_path / "wrapped.pt")
    head = state["head._packed_params._packed_params"][0]
    with readers.open_listing(tmp_path / "own.pt") as listing:
        found = {held.name: held for held in listing.tensors}
        held = found["head._packed_params._packed_params/0"]
        assert (held.dtype, held.shape) == ("qint8", (2, 4))
        array = listing.array(held)
        assert array is not None
        assert array.tolist() == head.int_repr().tolist()
        assert sum(h.dtype == "qint8" for h in listing.tensors) == 3
    check_sum(tmp_path / "own.pt")
    names = {held.name for held in listed(tmp_path / "wrapped.pt").tensors}
    assert {f"fp32_model.{name}" for name in original.state_dict()} <= names
    assert any(name.startswith("_model.head._packed_params") for name in names)
    check_sum(tmp_path / "wrapped.pt")
