"""Convolutions with codes of 16 bits run in OpenVINO as two with codes of 8 bits, where their input is clamped."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig, Rule
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import skeleton_of
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.kernels.machine import exact_products
from pared.runtime.openvino import halves
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of
from tests.ratios import snr

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not exact_products(), reason="without VNNI, products run in floats"),
]


class Clamped(nn.Module):
    """A depthwise and a plain convolution on clamped inputs, with norms and paddings; and one whose input is not."""

    def __init__(self, stride: int, pads: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, stride=stride, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.plain = nn.Conv2d(16, 24, 1)
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(3 * self.first(x) + 2)
        y = nn.functional.relu6(self.norm(self.wide(nn.functional.pad(y, self.pads))))
        out: Tensor = self.plain(y)
        return out


def model(stride: int = 1, pads: tuple[int, int, int, int] = (1, 1, 1, 1)) -> nn.Module:
    torch.manual_seed(0)
    made = Clamped(stride, pads)
    assert isinstance(made.norm.running_mean, Tensor)
    assert isinstance(made.norm.running_var, Tensor)
    made.norm.running_mean.uniform_(-1, 1)
    made.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(made.norm.weight, -2, 2)
    nn.init.uniform_(made.norm.bias, 0, 2)
    return made.eval()


def in_openvino(made: nn.Module, x: Tensor, bits: int) -> tuple[Any, nn.Module, Tensor]:
    """The graph, the quantized model on its modules, and the graph's output."""
    rules = [Rule(f"{name}.weight", bits=bits) for name in ("first", "wide", "plain")]
    conf = PostTrainingQuantConfig(approach="static", quant_level=0, rules=rules)
    q = pared.fit(made, conf, [x], quiet=True)
    q = assemble(find_tensors(skeleton_of(q)), contents_of(q), Profile(this_machine()))
    names = parameters_of(made)
    bound = bind(names, (x,), {})
    assert bound is not None
    graph = OpenVinoGraph(q, capture(model_like(made), arguments_of(bound)))
    return graph, q, graph(bound)


def model_like(made: nn.Module) -> nn.Module:
    assert isinstance(made, Clamped)
    return model(made.wide.stride[0], made.pads)


def convolutions(graph: Any) -> list[str]:
    """The type of what each convolution takes."""
    infos = [op.get_rt_info() for op in graph._sessions.here()._compiled.get_runtime_model().get_ordered_ops()]
    return [one["runtimePrecision"].value for one in infos if one["layerType"].value == "Convolution"]


@pytest.mark.parametrize(
    ("stride", "pads"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1)), (1, (0, 0, 0, 0)), (1, (2, 0, 1, 1))]
)
def test_both_halves_are_the_whole(stride: int, pads: tuple[int, int, int, int]) -> None:
    made, x = model(stride, pads), torch.randn(4, 3, 20, 20)
    graph, q, found = in_openvino(made, x, 12)
    kept = [one.coded.parts["codes"].dtype for one in contents_of(q).tensors if one.name.endswith(("wide.weight",))]
    assert kept == [torch.int16]
    with torch.no_grad():
        assert snr(q(x), found) > 40, "only the inputs are rounded, to 8 bits of what they are clamped to"
        assert snr(made(x), found) > 38
    assert convolutions(graph).count("u8") == 4, "two halves of each convolution whose input is clamped"


def test_what_is_not_clamped_or_too_large_stays_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = model(), torch.randn(4, 3, 20, 20)
    answers: list[bool] = []
    split = halves.split

    def noted(*args: Any) -> bool:
        answers.append(split(*args))
        return answers[-1]

    monkeypatch.setattr(halves, "split", noted)
    graph, q, found = in_openvino(made, x, 12)
    assert sorted(answers) == [False, True, True]
    answers.clear()
    monkeypatch.setattr(halves, "_MOST", 100)
    graph, q, found = in_openvino(made, x, 12)
    assert answers == [False] * 3
    assert "u8" not in convolutions(graph)
    with torch.no_grad():
        assert snr(q(x), found) > 80


def test_every_code_has_halves() -> None:
    codes = np.arange(-halves._MOST, halves._MOST + 1, dtype=np.int32)
    upper = (codes + halves._HALF // 2) // halves._HALF
    lower = codes - halves._HALF * upper
    assert np.abs(upper).max() <= 127
    assert (lower.min(), lower.max()) == (-64, 63)
