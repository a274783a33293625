"""Weights in groups in OpenVINO's own files: the numbers in the file are ours, and so are the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ModelError
from pared.formats.coded import Grid
from pared.formats.groups.grid import GroupGrid
from pared.model.contents import Contents
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import decoded
from pared.runtime.onnx.export import Exported
from pared.runtime.onnx.signature import SIGNATURE, Signature
from pared.runtime.openvino.export import export_openvino
from pared.runtime.record import contents_of
from pared.targets.graphs.openvino import TARGET
from pared.targets.graphs.packing import unpacked
from pared.targets.target import Offer
from tests.runtime.exports import Tied, convolutions, encoder, fitted, flat, sqnr
from tests.runtime.grouped import contents_with

pytestmark = pytest.mark.engine

OFFERS = [offer for offer in TARGET.offers if "linear" in offer.roles]


def exported(model: nn.Module, contents: Contents, path: Path, x: Any) -> tuple[Exported, nn.Module]:
    floats = decoded(find_tensors(model), contents)
    return export_openvino(floats, contents, path, x), floats


def compiled(path: Path, *, rounded: bool = False) -> Any:
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if not rounded:  # else products round their inputs to int8
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return openvino.Core().compile_model(str(path), "CPU", options)


def run(found: Exported, *inputs: Tensor, rounded: bool = False) -> np.ndarray:
    given = dict(zip(found.inputs, (one.numpy() for one in inputs), strict=True))
    return next(iter(compiled(found.path, rounded=rounded)(given).values()))


def answer(floats: nn.Module, *inputs: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return flat(floats(*inputs))[0]


def grid_of(offer: Offer) -> GroupGrid:
    assert not isinstance(offer.grid, str)
    return offer.grid


def constants_of(path: Path) -> dict[str, list[np.ndarray]]:
    """The numbers in a file by their type, those of fewer than 8 bits as they are packed."""
    found: dict[str, list[np.ndarray]] = {}
    for node in openvino.Core().read_model(str(path)).get_ops():
        if node.get_type_name() == "Constant":
            data = np.array(node.get_tensor_view().data if hasattr(node, "get_tensor_view") else node.data)
            found.setdefault(node.get_element_type().get_type_name(), []).append(data)
    return found


@pytest.mark.parametrize("offer", OFFERS, ids=lambda one: one.name)
def test_the_file_holds_the_numbers_and_the_answers_are_the_same(offer: Offer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    grid = grid_of(offer)
    contents = contents_with(model, {"0.weight": grid})
    found, floats = exported(model, contents, tmp_path, torch.randn(3, 5, 256))
    assert (found.codes, found.floats) == (("0.weight",), {})
    x = torch.randn(7, 2, 256)  # another size than that of the example
    wanted = answer(floats, x)
    assert sqnr(run(found, x), wanted) > 100
    assert sqnr(run(found, x, rounded=True), wanted) > 30
    parts = {name: part.numpy() for name, part in contents.tensors[0].coded.parts.items()}
    held = constants_of(found.path)
    kind, count = offer.name.split()[0], 40 * 256
    numbers = next(one for one in held[kind] if one.nbytes == count * grid.bits // 8).reshape(-1).view(np.uint8)
    codes = unpacked(numbers, grid.bits, count).astype(int)
    signed = np.where(codes > grid.high, codes - (1 << grid.bits), codes) if kind[0] == "i" else codes + grid.low
    assert np.array_equal(signed.reshape(40, 256), parts["codes"])
    (steps,) = held["f16"]
    assert np.array_equal(steps.reshape(parts["step"].shape), parts["step"])
    zeros = [one for one in held[kind] if one.nbytes != count * grid.bits // 8]
    if grid.zero == "code":
        packed = unpacked(zeros[0].reshape(-1).view(np.uint8), grid.bits, parts["zero"].size).astype(int) + grid.low
        assert np.array_equal(packed.reshape(parts["zero"].shape), parts["zero"])
    assert sum(one.nbytes for one in (numbers, steps, *zeros)) == offer.nbytes(40, 256)


@pytest.mark.parametrize("grid", [GroupGrid(4, 32), GroupGrid(2, 64, "code"), GroupGrid(8, None), GroupGrid(4, 16)])
def test_a_table_that_is_also_a_weight_stands_in_the_file_once(grid: GroupGrid, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    contents = contents_with(model, {"*": grid})
    ids = torch.randint(0, 3000, (4, 7))
    found, floats = exported(model, contents, tmp_path, ids)
    assert found.floats == {}
    numbers = found.path.with_suffix(".bin").stat().st_size
    groups = 64 // (grid.group or 64)
    assert numbers < 3064 * (64 * grid.bits / 8 + 3 * groups) + 1000
    other = ids[:2, :5]
    assert sqnr(run(found, other), answer(floats, other)) > 100


def test_convolutions_and_transformers_run_with_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, model, grids, shape, other in (
        ("conv", convolutions(), {f"{i}.weight": GroupGrid(8, None) for i in (0, 3)}, (4, 3, 16, 16), (2, 3, 20, 24)),
        ("encoder", encoder(), {"*": GroupGrid(4, 32, "code")}, (4, 10, 64), (2, 5, 64)),
    ):
        contents = contents_with(model.eval(), grids)
        found, floats = exported(model, contents, tmp_path / name, torch.randn(shape))
        assert found.floats == {}
        x = torch.randn(other)
        assert sqnr(run(found, x), answer(floats, x)) > 90


def test_what_openvino_does_not_take_stays_in_floats_and_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)).eval()
    contents = contents_with(model, {"0.weight": GroupGrid(4, 32, "least"), "1.weight": GroupGrid(4, 64)})
    x = torch.randn(3, 96)
    found, floats = exported(model, contents, tmp_path / "model.xml", x)
    assert found.path == tmp_path / "model.xml"
    assert (found.codes, set(found.floats)) == ((), {"0.weight", "1.weight"})
    assert "groups of 64" in found.floats["1.weight"]
    assert sqnr(run(found, x), answer(floats, x)) > 100


def test_the_file_says_how_it_is_called(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"sum": self.layer(x) + scale, "product": self.layer(x) * scale}

    model = Two().eval()
    contents = contents_with(model, {"layer.weight": GroupGrid(4, 32)})
    x = torch.randn(3, 32)
    found, floats = exported(model, contents, tmp_path, {"x": x, "scale": torch.ones(3, 1)})
    made = compiled(found.path)
    assert [next(iter(one.names)) for one in made.inputs] == ["x", "scale"] == list(found.inputs)
    assert list(found.outputs) == ["sum", "product"]
    told = openvino.Core().read_model(str(found.path)).get_rt_info(["framework", SIGNATURE]).astype(str)
    assert Signature.from_json(told, "file").n_outputs == 2
    results = made({"x": x.numpy(), "scale": np.full((3, 1), 2, np.float32)})
    with torch.inference_mode():
        wanted = floats(x, torch.full((3, 1), 2.0))
    assert sqnr(results["product"], wanted["product"].numpy()) > 100


def test_nothing_is_left_where_a_call_cannot_be_written(tmp_path: Path) -> None:
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.mT)

    model = Fourier().eval()
    with pytest.raises(ModelError, match="OpenVINO cannot take it"):
        export_openvino(model, contents_with(model, {}), tmp_path, torch.randn(2, 4, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("approach", ["static", "weight_only"])
def test_a_fitted_model_is_exported(approach: str, tmp_path: Path) -> None:
    """Its floats as narrow as they are stored, its codes as they are, and inputs on their calibrated grids."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 64)
    q = fitted(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)), approach, [x])
    found = pared.export(q, tmp_path / "model.xml", x, to="openvino")
    assert found.floats == {}
    assert set(found.activations.values()) == ({"static"} if approach == "static" else set())
    held = constants_of(found.path)
    weights = [one.coded for one in contents_of(q).tensors if isinstance(one.coded.format, Grid)]
    stored = [part.numpy() for one in weights for part in one.parts.values()]
    kept = [one for kind in ("i8", "f32") for one in held[kind]]
    assert all(any(np.array_equal(one.reshape(-1), part.reshape(-1)) for one in kept) for part in stored)
    with torch.inference_mode():
        wanted = q(x).numpy()
    assert sqnr(run(found, x), wanted) > 30
