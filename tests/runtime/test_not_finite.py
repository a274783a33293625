"""NaN and Inf in an input show in the output as float shows them, and inputs far beyond a range are told of, once."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.runtime import float_forms
from pared.runtime.graphs.call_kinds import arguments_of
from pared.runtime.graphs.graph import FiniteInputs
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.kernels.machine import available
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import serve
from tests.ratios import snr
from tests.runtime.test_graphs import CASES, assembled, bound_of, forced

pytestmark = pytest.mark.skipif(bool(available()), reason="no int8 kernels here")

WARNING = "far beyond the range that calibration saw"


def by_graph(q: nn.Module, call: dict[str, Any]) -> GraphServer:
    server = GraphServer(float_forms.outline_of, [arguments_of(bound_of(q, call))])
    serve(q, server)
    q(**call)  # made, and compared
    assert server.reason(bound_of(q, call)) == ""
    return server


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["int8", "float32"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["images", "sound"])
@pytest.mark.parametrize("as_graph", [False, True])
def test_what_is_not_finite_shows_and_spoils_no_other_sample(name: str, mode: str, kernel: str, as_graph: bool) -> None:
    model, q = assembled(CASES[name], mode, kernel)
    call = CASES[name].call(4, 24)
    with torch.no_grad():
        if as_graph:
            by_graph(q, call)
        clean = q(**call)
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = {key: value.clone() for key, value in call.items()}
            spoilt["x"][2].view(-1)[40] = bad
            expected, found = model(**spoilt), q(**spoilt)
            assert not (found[2].isfinite() & ~expected[2].isfinite()).any()
            if mode == "static":
                assert torch.equal(found.isfinite(), expected.isfinite())
            others = [0, 1, 3]
            assert snr(clean[others], found[others]) > (25 if as_graph else 100)  # modules answer: they round elsewhere
            assert torch.equal(q(**call), clean), "the next call is answered as before"


class Outliers(nn.Module):
    """One column of the input is a hundred times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones(32)
        scale[7] = 100.0
        out: Tensor = self.out(self.wide(x * scale).relu())
        return out


def fitted(make: Callable[[], nn.Module], shape: tuple[int, ...], approach: str = "static") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make().eval()
    conf = PostTrainingQuantConfig(approach=approach, quant_level=0)
    q = pared.fit(model, conf, [torch.randn(shape) for _ in range(3)], quiet=True)
    return model, forced(model, q, "int8")


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize("make", [plain, Outliers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    _, q = fitted(make, (16, 32))
    x = torch.randn(5, 32)
    with torch.no_grad():
        clean = q(x)
        x[1, 7], x[3, 0] = torch.nan, torch.inf
        q, x = (q.to(dtype), x.to(dtype)) if make is plain else (q, x)
        found = q(x)
    assert not found[[1, 3]].isfinite().any()
    assert snr(clean[[0, 2, 4]], found[[0, 2, 4]].float()) > (30 if dtype is torch.bfloat16 else 100)


def told(caplog: pytest.LogCaptureFixture) -> int:
    return sum(WARNING in record.getMessage() for record in caplog.records)


def test_inputs_far_beyond_the_range_are_told_of_once_for_each_model(caplog: pytest.LogCaptureFixture) -> None:
    _, q = fitted(plain, (16, 32))
    _, other = fitted(Outliers, (16, 32))
    q[0](100 * torch.randn(4, 32))  # a layer by itself tells nothing, now or later
    q(torch.randn(4, 32))
    assert not told(caplog)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: q(100 * torch.randn(4, 32)), range(8)))
    assert told(caplog) == 1
    q(100 * torch.randn(4, 32))
    copy.deepcopy(q)(100 * torch.randn(4, 32))
    assert told(caplog) == 1
    other(torch.randn(4, 32))
    assert told(caplog) == 1, "outlier columns reach far within their ranges"
    other(100 * torch.randn(4, 32))
    assert told(caplog) == 2


def test_a_loud_sample_is_told_of_and_a_dynamic_model_has_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(4, 32)
    x[2] *= 1000
    fitted(plain, (16, 32), "dynamic")[1](x)
    assert not told(caplog)
    fitted(plain, (16, 32))[1](x)
    assert told(caplog) == 1


def test_what_a_cache_holds_is_looked_at_again_after_a_write() -> None:
    finite = FiniteInputs()
    held, given = torch.zeros(4, 8), torch.zeros(3)
    bound = {"cache": None, "cache.own.0.keys": held, "ids": torch.zeros(3, dtype=torch.long), "x": given}
    finite.check(bound)
    given.numpy()[1] = np.nan  # which torch does not count
    with pytest.raises(NotFiniteError):
        finite.check(bound)
    given.zero_()
    finite.check(bound)
    held[1, 2] = torch.inf
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            finite.check(bound)
    held.zero_()
    finite.check(bound)
    with torch.inference_mode():
        uncounted = torch.zeros(4)
        finite.check({"cache.own.0.keys": uncounted})
        uncounted[0] = torch.nan
        with pytest.raises(NotFiniteError):
            finite.check({"cache.own.0.keys": uncounted})
