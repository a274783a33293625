"""Models to export, what two runtimes make of their files, and how many bytes of which type a file may hold."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import skeleton_of
from pared.runtime.onnx.engines import EXACT_PRODUCTS
from pared.runtime.onnx.export import Exported
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of

_CODES = {TensorProto.INT8, TensorProto.INT16}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


class Tied(nn.Module):
    """A table that is also the last product's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 64)
        self.inner = nn.Linear(64, 64)
        self.last = nn.Linear(64, 3000, bias=False)
        self.last.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(self.table(ids)).relu())
        return out


class Recurrent(nn.Module):
    """A recurrent layer with states, and outputs in a dict."""

    def __init__(self, cls: type[nn.LSTM] | type[nn.GRU], **options: Any) -> None:
        super().__init__()
        self.layer = cls(32, 48, batch_first=True, **options)
        self.last = nn.Linear(96 if self.layer.bidirectional else 48, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        out, state = self.layer(x)
        return {"scores": self.last(out), "state": state, "nothing": None}


def convolutions() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.ConvTranspose2d(16, 24, 2, stride=2),
        nn.BatchNorm2d(24),
        nn.Hardswish(),
        nn.ConvTranspose2d(24, 8, 3, groups=4),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_()  # negative ones too
            module.bias.data.normal_()
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)), (6, 5, 64)),
    "convolutions": (convolutions, (4, 3, 16, 16)),
    "tied": (Tied, (4, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (4, 6, 32)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 6, 32)),
    "encoder": (encoder, (4, 10, 64)),
}


def batch_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3000, shape, generator=chance) if name == "tied" else torch.randn(shape, generator=chance)


def fitted(model: nn.Module, approach: str, batches: list[Any]) -> nn.Module:
    """At 8 bits, every layer in int8 that may be, whatever is faster here: an export does not depend on that."""
    conf = PostTrainingQuantConfig(approach=approach, quant_level=0)
    q = pared.fit(model.eval(), conf, batches, quiet=True)
    return assemble(find_tensors(skeleton_of(q)), contents_of(q), Profile(this_machine()))


def flat(outputs: Any) -> list[np.ndarray]:
    return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def in_onnxruntime(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    import onnxruntime  # not at the top: `make quick` reads this file without it

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return found


def in_openvino(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    import openvino  # not at the top: see above

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled({name: tensor.numpy() for name, tensor in inputs.items()}).values())


def sqnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """In dB; 200 for the same."""
    noise = float(np.square(found - wanted, dtype=np.float64).sum())
    return 10 * math.log10(float(np.square(wanted, dtype=np.float64).sum()) / max(noise, 1e-20))


def bytes_by_type(path: Path) -> dict[int, int]:
    """The bytes of numbers by their type, without zero points."""
    found: dict[int, int] = collections.Counter()
    for one in onnx.load(str(path)).graph.initializer:
        numbers = numpy_helper.to_array(one)
        if re.search(r"\.zeros(_\d+)?$", one.name):
            assert not numbers.any()
        else:
            found[one.data_type] += numbers.nbytes
    return found


def check_bytes(q: nn.Module, exported: Exported) -> None:
    """Integer weights once, and no more floats than were kept as such, one step to a row, and a few constants."""
    tensors = contents_of(q).tensors
    codes = sum(one.coded.parts["codes"].nbytes for one in tensors if "codes" in one.coded.parts)
    steps = sum(4 * one.coded.parts["step"].numel() for one in tensors if "codes" in one.coded.parts)
    scales = sum(4 * one.coded.parts["scale"].numel() for one in tensors if "scale" in one.coded.parts)
    kept = sum(4 * math.prod(one.coded.shape) for one in tensors if "codes" not in one.coded.parts)
    held = bytes_by_type(exported.path)
    assert exported.floats == {}
    activations = contents_of(q).activations
    outputs = {name: one.coded.shape[0] for one in tensors for name in one.names if one.coded.shape}
    further = sum(abs(n) * outputs[f"{name}.weight"] for name, one in activations.items() for _, n in one.outliers)
    # Vectors on grids may have gone into the weight before them, with a batch normalization.
    assert 0.995 * codes <= sum(held.get(kind, 0) for kind in _CODES) <= codes + further
    # A transposed convolution of several groups has steps along two dimensions, each repeated once for every input.
    assert sum(held.get(kind, 0) for kind in _FLOATS) <= 2 * steps + scales + kept + 4096
    assert exported.nbytes == exported.path.stat().st_size <= codes + further + 2 * steps + kept + 60_000
