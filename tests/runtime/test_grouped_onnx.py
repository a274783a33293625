"""Weights in groups as operators of ONNX Runtime: the numbers in the file are ours, and so are the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pared.formats.groups.grid import GroupGrid
from pared.model.contents import Contents
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import decoded
from pared.runtime.onnx.export import Exported, export_onnx
from pared.runtime.onnx.weights.grouped import AccuracyLevel
from pared.targets.graphs.onnx import TARGET
from pared.targets.graphs.packing import unpacked
from pared.targets.target import Offer
from tests.runtime.exports import Tied, encoder, flat, in_onnxruntime, sqnr
from tests.runtime.grouped import contents_with

pytestmark = pytest.mark.engine

OFFERS = [offer for offer in TARGET.offers if "linear" in offer.roles]


def exported(
    model: nn.Module, contents: Contents, path: Path, x: Tensor, level: AccuracyLevel = 0
) -> tuple[Exported, nn.Module]:
    floats = decoded(find_tensors(model), contents)
    return export_onnx(floats, contents, path, x, accuracy_level=level), floats


def answer(floats: nn.Module, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return flat(floats(x))[0]


def run(found: Exported, x: Tensor) -> np.ndarray:
    return in_onnxruntime(found.path, {next(iter(found.inputs)): x})[0]


def transposed(outputs: int, inputs: int) -> nn.Module:
    """A linear layer whose weight has its outputs last."""
    layer: nn.Module = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]  # transformers'
    return layer


def node_of(path: Path, op: str) -> tuple[onnx.NodeProto, dict[str, int], dict[str, np.ndarray]]:
    """The only node with an operator, its attributes, and the numbers in the file."""
    graph = onnx.load(str(path)).graph
    (node,) = [one for one in graph.node if one.op_type == op]
    numbers = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    return node, {one.name: one.i for one in node.attribute}, numbers


def grid_of(offer: Offer) -> GroupGrid:
    assert not isinstance(offer.grid, str)
    return offer.grid


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("offer", OFFERS, ids=lambda one: one.name)
def test_the_file_holds_the_numbers_and_the_answers_are_the_same(offer: Offer, columns: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    contents = contents_with(model, {"0.weight": grid_of(offer)})
    x = torch.randn(3, 5, columns)
    found, floats = exported(model, contents, tmp_path, x)
    assert (found.codes, found.floats) == (("0.weight",), {})
    other = torch.randn(7, 2, columns)
    assert sqnr(run(found, other), answer(floats, other)) > (100 if offer.name != "int8 row" else 33)


@pytest.mark.parametrize("name", ["int8 g32", "int4 g128 zero", "int2 g64 zero"])
def test_openvino_reads_products_too(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(100, 40)).eval(), torch.randn(3, 100)
    grid = next(grid_of(offer) for offer in OFFERS if offer.name == name)
    found, floats = exported(model, contents_with(model, {"0.weight": grid}), tmp_path, x)
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(found.path), "CPU", exact)
    assert sqnr(next(iter(compiled([x.numpy()]).values())), answer(floats, x)) > 100


@pytest.mark.parametrize("offer", [one for one in OFFERS if one.name != "int8 row"], ids=lambda one: one.name)
def test_constants_equal_codes_steps_and_zero_points(offer: Offer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 40)).eval()
    contents, grid = contents_with(model, {"0.weight": grid_of(offer)}), grid_of(offer)
    found, _ = exported(model, contents, tmp_path, torch.randn(3, 5, 128), 4)
    parts = {name: part.numpy() for name, part in contents.tensors[0].coded.parts.items()}
    node, attributes, numbers = node_of(found.path, "MatMulNBits")
    assert attributes == {"K": 128, "N": 40, "bits": grid.bits, "block_size": grid.group, "accuracy_level": 4}
    assert found.activations == {"0": "groups"}
    codes = unpacked(numbers[node.input[1]].reshape(40, -1), grid.bits, 128).astype(int) + grid.low
    assert np.array_equal(codes, parts["codes"])
    held = sum(numbers[name].nbytes for name in ("0.weight.codes", "0.weight.steps"))
    assert np.array_equal(numbers["0.weight.steps"], parts["step"])
    if grid.zero == "code":
        zeros = numbers[node.input[3]]
        assert np.array_equal(unpacked(zeros, grid.bits, parts["zero"].shape[1]).astype(int) + grid.low, parts["zero"])
        held += zeros.nbytes
    assert held == offer.nbytes(40, 128)


@pytest.mark.parametrize(
    "grid",
    [
        GroupGrid(4, None),
        GroupGrid(3, 32, "code"),
        GroupGrid(6, 16, nested=16, multiple_bits=8, signed=True),  # Q6_K: its steps need float32
        GroupGrid(8, 64, step="float32"),
        GroupGrid(4, 96),
    ],
    ids=lambda grid: f"{grid.label} {grid.zero} {grid.step}",
)
def test_grids_of_other_runtimes_are_exact_too(grid: GroupGrid, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 24, bias=False)).eval()
    contents = contents_with(model, {"0.weight": grid})
    x = torch.randn(5, 256)
    found, floats = exported(model, contents, tmp_path, x)
    assert (found.codes, found.floats) == (("0.weight",), {})
    assert sqnr(run(found, x), answer(floats, x)) > 100


def test_what_the_runtime_does_not_take_stays_in_floats_and_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96), nn.Conv1d(4, 8, 1)).eval()
    grids = {"0.weight": GroupGrid(4, 32, "least"), "1.weight": GroupGrid(4, 24), "2.weight": GroupGrid(4, 32)}
    contents = contents_with(model, grids)
    x = torch.randn(3, 4, 96)
    found, floats = exported(model, contents, tmp_path, x)
    assert found.codes == ()
    assert {name: reason[:16] for name, reason in found.floats.items()} == {
        "0.weight": "zero is not on i",
        "1.weight": "its groups have ",
        "2.weight": "the graph comput",
    }
    assert sqnr(run(found, x), answer(floats, x)) > 100


class _Cut(nn.Module):
    """Multiplies with the first columns of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 128))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[:, :64])


def test_rows_that_are_cut_stay_in_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Cut().eval(), torch.randn(3, 64)
    found, floats = exported(model, contents_with(model, {"weight": GroupGrid(4, 32)}), tmp_path, x)
    assert found.codes == ()
    assert sqnr(run(found, x), answer(floats, x)) > 100


@pytest.mark.parametrize("grid", [GroupGrid(4, 32), GroupGrid(2, 128, "code"), GroupGrid(8, None, step="float32")])
def test_a_table_that_is_also_a_weight_stands_in_the_file_once(grid: GroupGrid, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    contents = contents_with(model, {"*": grid})
    ids = torch.randint(0, 3000, (4, 7))
    found, floats = exported(model, contents, tmp_path, ids)
    assert found.floats == {}
    padded = 128 if grid.group == 128 else 64
    assert (
        found.nbytes < (3000 * (padded * grid.bits / 8 + 9) + 64 * 64) + 8000
    )  # rows of int8 have two copies of steps
    with torch.inference_mode():
        wanted = flat(floats(ids))
    least = 33 if grid.group is None else 100
    assert sqnr(in_onnxruntime(found.path, {next(iter(found.inputs)): ids})[0], wanted[0]) > least


@pytest.mark.parametrize(("level", "least"), [(0, 90), (4, 30)])
def test_rows_of_a_joined_weight_are_told_apart(level: AccuracyLevel, least: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = encoder().eval()
    contents = contents_with(model, {"*": GroupGrid(4, 32, "code")})
    found, floats = exported(model, contents, tmp_path, torch.randn(4, 10, 64), level)
    assert found.floats == {}
    assert set(found.activations.values()) == {"groups" if level else "float"}
    x = torch.randn(2, 5, 64)
    assert sqnr(run(found, x), answer(floats, x)) > least


def test_rows_of_int8_are_what_they_are_without_groups(tmp_path: Path) -> None:
    """Whatever reads them: products, convolutions, and layers whose weight is transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GELU(), transposed(24, 20)).eval()
    grid = GroupGrid(8, None)
    contents = contents_with(model, {"0.weight": grid, "2.weight": grid}, {"2.weight": (1,)})
    x = torch.randn(3, 4, 20)
    found, floats = exported(model, contents, tmp_path, x)
    assert (found.codes, found.floats) == (("0.weight", "2.weight"), {})
    numbers = node_of(found.path, "Conv")[2]
    for name, rows in (("0.weight", 8), ("2.weight", 24)):
        parts = next(one.coded.parts for one in contents.tensors if one.name == name)
        assert np.array_equal(numbers.get(f"{name}.codes", numbers.get(name)), parts["codes"])
        assert np.array_equal(numbers[f"{name}.steps"], parts["step"].reshape(rows))
    assert sqnr(run(found, x), answer(floats, x)) > 33


def test_groups_of_a_transposed_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(transposed(24, 64)).eval()
    contents = contents_with(model, {"0.weight": GroupGrid(4, 32)}, {"0.weight": (1,)})
    x = torch.randn(3, 4, 64)
    found, floats = exported(model, contents, tmp_path, x)
    assert (found.codes, found.floats) == (("0.weight",), {})
    assert sqnr(run(found, x), answer(floats, x)) > 100
