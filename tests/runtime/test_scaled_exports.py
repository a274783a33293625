"""Weights whose columns have scales in files of other runtimes: codes stay codes, and inputs are multiplied."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pared.formats.activation import Activation
from pared.formats.coded import Coded, Raw
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import decoded
from pared.runtime.onnx.export import export_onnx
from pared.runtime.openvino.export import export_openvino
from tests.runtime import exports
from tests.runtime.exports import flat, in_onnxruntime, sqnr
from tests.runtime.test_grouped_openvino import run as in_openvino
from tests.runtime.test_scales import scaled

pytestmark = pytest.mark.engine

# How the input of the last layer is treated, and the least distance of the answers, in dB.
MODES = {"dynamic": (Activation("dynamic"), 90), "static": (Activation("static", -9.0, 9.0), 20)}


class Net(nn.Module):
    """Two products of one input, one of another; a table with scales; and a product that is none of a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.one, self.two = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.out = nn.Linear(96, 8)
        self.odd = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        z: Tensor = self.out(torch.relu(self.one(y)) + self.two(y))
        return z @ self.odd.weight


def parts(out: Activation) -> tuple[nn.Module, Contents, nn.Module]:
    torch.manual_seed(0)
    model = Net().eval()
    stored = []
    for one in find_tensors(model):
        tensor = one.tensor.detach()
        coded: Coded = scaled(tensor) if tensor.dim() == 2 else Raw("float32").encode(tensor)
        stored.append(Stored(one.names, one.kind, coded, Decision(one.name, "grid", None, "")))
    contents = Contents(tuple(stored), {"one": Activation("dynamic"), "two": Activation("dynamic"), "out": out})
    return model, contents, decoded(find_tensors(model), contents)


TOKENS = torch.arange(36).reshape(4, 9)


@pytest.mark.parametrize("mode", MODES)
def test_onnx_holds_codes_and_answers_as_the_floats(mode: str, tmp_path: Path) -> None:
    out, least = MODES[mode]
    _, contents, floats = parts(out)
    found = export_onnx(floats, contents, tmp_path, TOKENS)
    assert set(found.codes) == {"table.weight", "one.weight", "two.weight", "out.weight", "odd.weight"}
    graph = onnx.load(str(found.path)).graph
    numbers = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    assert max(one.nbytes for one in numbers.values() if one.dtype == "float32" and one.size > 1) <= 4 * 96
    assert (found.activations["out"] == "static") == (mode == "static")
    with torch.inference_mode():
        expected = flat(floats(TOKENS[:2]))[0]
    answer = in_onnxruntime(found.path, {next(iter(found.inputs)): TOKENS[:2]})[0]
    assert sqnr(answer, expected) > min(least, 25)  # ONNX Runtime rounds the inputs of products with 8-bit weights


@pytest.mark.parametrize("mode", MODES)
def test_openvino_holds_codes_and_answers_as_the_floats(mode: str, tmp_path: Path) -> None:
    out, least = MODES[mode]
    _, contents, floats = parts(out)
    found = export_openvino(floats, contents, tmp_path, TOKENS)
    assert set(found.codes) == {"table.weight", "one.weight", "two.weight", "out.weight"}
    assert found.floats == {"odd.weight": "its columns have scales"}, "it is no layer's product"
    with torch.inference_mode():
        expected = flat(floats(TOKENS[:2]))[0]
    assert sqnr(in_openvino(found, TOKENS[:2]), expected) > least


@pytest.mark.parametrize("runtime", ["ONNX Runtime", "OpenVINO by ONNX", "OpenVINO"])
def test_rows_of_an_image_are_multiplied(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU()).eval()
    tensors, stored = find_tensors(model), []
    for one in tensors:
        tensor = one.tensor.detach()
        coded: Coded = scaled(tensor) if tensor.dim() == 2 else Raw("float32").encode(tensor)
        stored.append(Stored(one.names, one.kind, coded, Decision(one.name, "grid", None, "")))
    contents = Contents(tuple(stored), {"3": Activation("static", 0.0, 12.0)})
    floats, x = decoded(tensors, contents), torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        expected = floats(x).numpy()
    if runtime == "OpenVINO":
        found = in_openvino(export_openvino(floats, contents, tmp_path, x), x)
    else:
        path = export_onnx(floats, contents, tmp_path, x).path
        run = in_onnxruntime if runtime == "ONNX Runtime" else exports.in_openvino
        (found,) = run(path, {"input": x})
    assert sqnr(found, expected) > 25
