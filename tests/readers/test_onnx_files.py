"""ONNX, written by its own library: every type, sparse tensors, subgraphs, and data in other files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pared import readers
from pared.errors import CorruptError, FileError
from tests.readers.checks import check, check_sum, listed


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
