"""A real network in groups of 4 bits: both runtimes answer as torch does on the decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples import minilm

from pared.formats.groups.grid import GroupGrid
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import decoded
from pared.runtime.onnx.export import export_onnx
from pared.runtime.openvino.export import export_openvino
from tests.runtime.exports import in_onnxruntime, sqnr
from tests.runtime.grouped import contents_with
from tests.runtime.test_grouped_openvino import compiled

pytestmark = [pytest.mark.engine, pytest.mark.model]


def test_minilm_of_four_bits_in_both_runtimes(tmp_path: Path) -> None:
    model = minilm.load()
    contents = contents_with(model, {"*": GroupGrid(4, 64, "code")})
    floats = decoded(find_tensors(model), contents)
    batch, other = minilm.tokenize(minilm.documents()[:4], 32), minilm.tokenize(minilm.documents()[4:7], 48)
    in_onnx = export_onnx(floats, contents, tmp_path / "model.onnx", batch, accuracy_level=0)
    in_openvino = export_openvino(floats, contents, tmp_path / "model.xml", batch)
    assert in_onnx.floats == in_openvino.floats == {}
    assert max(in_onnx.nbytes, in_openvino.nbytes) < 13_000_000
    with torch.inference_mode():
        wanted = floats(**other).last_hidden_state.numpy()
    found = compiled(in_openvino.path)({name: tensor.numpy() for name, tensor in other.items()})
    assert sqnr(in_onnxruntime(in_onnx.path, other)[0], wanted) > 100
    assert sqnr(next(iter(found.values())), wanted) > 100
