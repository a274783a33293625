"""What is no weight stays as it was, types stay what they were, and other machines and devices compute in floats."""

import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.model.tensors import find_tensors
from pared.runtime.kernels import conv, linear, transposed
from pared.runtime.kernels.fbgemm import recurrent
from pared.runtime.layers import registry
from pared.runtime.layers.holding import weights

WIDE = PostTrainingQuantConfig(quant_level=0)


class Odd(nn.Module):
    """One tensor of every kind that a grid is not for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32, generator=generator))
        self.of_double = nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=generator))
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            name = "of_" + str(dtype).removeprefix("torch.")
            self.register_buffer(name, torch.randint(0, 100, (4, 4), generator=generator).to(dtype))
        self.register_buffer("of_bool", torch.rand(9, 3, generator=generator) > 0.5)
        self.register_buffer("of_complex64", torch.randn(5, 3, dtype=torch.complex64, generator=generator))
        self.register_buffer("of_complex128", torch.randn(5, 3, dtype=torch.complex128, generator=generator))
        self.register_buffer("made", torch.randn(4, 4, generator=generator), persistent=False)
        self.register_buffer("infinite", torch.full((2, 2), -torch.inf))
        self.register_buffer("empty", torch.empty(0, 7))
        self.register_buffer("scalar", torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_all_that_is_no_weight_is_exact(tmp_path: Path) -> None:
    model = Odd()
    before = {model_tensor.name: model_tensor.tensor.detach().clone() for model_tensor in find_tensors(model)}
    q = pared.fit(model, WIDE)
    pared.save(q, tmp_path)
    loaded = pared.load(tmp_path, Odd())
    for one in (q, loaded):
        kept = [line.name for line in one.plan if line.treatment == "exact"]
        assert kept == [name for name in before if name != "weight"]
        for name in kept:
            found = one.get_parameter(name) if name == "of_double" else one.get_buffer(name)
            assert found.dtype == before[name].dtype
            assert torch.equal(found, before[name])
            assert name == "made" or torch.equal(one.state_dict()[name], before[name])
        because = {line.name: line.because for line in one.plan}
        assert because["of_bool"] == "bool is kept exactly"
        assert because["of_double"] == "float64 is kept exactly"
        assert because["made"] == "a buffer that the state dict leaves out"
        assert because["infinite"] == "a buffer that holds NaN or infinities"


@pytest.mark.parametrize("approach", ["weight_only", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision(dtype: torch.dtype, approach: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 16)).to(dtype).eval()

    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    q = pared.fit(build(), PostTrainingQuantConfig(quant_level=0, approach=approach), [x])
    pared.save(q, tmp_path)
    for one in (q, pared.load(tmp_path, build())):
        with torch.no_grad():
            wanted, found = build()(x), one(x)
        assert found.dtype == dtype
        assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.02
        assert one[0].weight.dtype == dtype


@pytest.mark.child
def test_a_machine_without_the_kernels_computes_in_floats_and_says_so() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(root / "src")}
    command = [sys.executable, str(root / "tests" / "formats" / "reference_child.py")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["capability"] == "DEFAULT"
    assert report["kernels"] == ["float"]
    assert "the int8 kernels need an x86 CPU with AVX2" in report["report"]
    assert report["equal"]
    assert report["error"] < 0.01


def test_a_build_without_the_operators_never_asks_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(registry, "available", lambda: "this build of PyTorch lacks them")
    for kernel in (linear, conv, transposed, recurrent):
        monkeypatch.setattr(kernel, "pack", gone)
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.GRU(16, 16), nn.Embedding(9000, 16)]
    model = nn.ModuleList([*layers, nn.RNNCell(16, 16), nn.ConvTranspose1d(16, 16, 3), nn.Conv1d(16, 16, 3)]).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = copy.deepcopy(model)

        def forward(self, ids: Tensor) -> Tensor:
            encoder, gru, table, cell, wider, narrower = self.parts
            x = gru(encoder(table(ids)))[0]
            out: Tensor = narrower(wider(cell(x.flatten(0, 1))[None].mT))
            return out

    net, ids = Net().eval(), torch.randint(0, 9000, (2, 5))
    q = pared.fit(net, PostTrainingQuantConfig(quant_level=0, approach="dynamic"), [ids])
    loaded = pared.load(pared.save(q, tmp_path), model=Net())
    assert {line.kernel for line in q.plan} == {"float", "int8 gather"}
    with torch.no_grad():
        assert torch.equal(q(ids), loaded(ids))
        assert torch.allclose(q(ids), net(ids), atol=0.05)


@pytest.mark.parametrize("approach", ["weight_only", "dynamic"])
def test_off_the_cpu_all_runs_in_floats(approach: str, caplog: pytest.LogCaptureFixture) -> None:
    weights._tell_of_device.cache_clear()
    model = nn.Sequential(nn.Linear(32, 48), nn.GRU(48, 16)).eval()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach=approach), [torch.randn(4, 32)])
    replaced = any(
        line.kernel != "float" for line in q.plan
    )  # which kernel is fastest, int8 or bfloat16, chance decides
    with caplog.at_level(logging.WARNING):
        moved = q.to("meta")  # the one device that is everywhere
    told = [record.message for record in caplog.records if record.name.startswith("pared.runtime.layers")]
    words = "int8 kernels are CPU only: on meta the layers run on floats, decoded from the codes"
    assert told == ([words] if replaced else [])
    assert moved(torch.empty(4, 32, device="meta"))[0].shape == (4, 16)


def test_to_an_accelerator_where_there_is_one() -> None:
    device = next((one for one in ("cuda", "mps") if getattr(torch, one).is_available()), None)
    if device is None:
        pytest.skip("no accelerator here")
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="weight_only"))
    x = torch.randn(4, 32)
    wanted = q(x)
    assert torch.allclose(q.to(device)(x.to(device)).cpu(), wanted, atol=1e-4)


def test_what_is_stored_in_an_odd_way_is_exact(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            complex_ = torch.randn(4, 4, dtype=torch.complex64)
            self.register_buffer("conjugate", complex_.conj())
            self.register_buffer("negative", complex_.conj().imag)
            self.register_buffer("expanded", torch.arange(4).expand(3, 4))

    model = Views()
    loaded = pared.load(pared.save(pared.fit(model), tmp_path), Views())
    for name in ("conjugate", "expanded"):
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))
    assert torch.allclose(loaded.get_buffer("negative"), model.get_buffer("negative"), atol=0.02)


def test_float_buffers_of_the_state_are_stored_like_weights() -> None:
    """As decision 003 says: a table that is shipped in the state dict is data like any weight."""
    model = nn.Module()
    model.register_buffer("table", torch.randn(64, 32))
    model.register_buffer("means", torch.randn(64))
    model.register_buffer("made", torch.randn(64, 32), persistent=False)
    q = pared.fit(model)
    assert {line.name: line.treatment for line in q.plan} == {"table": "grid", "means": "float16", "made": "exact"}
    assert torch.equal(q.get_buffer("made"), model.get_buffer("made"))


def prepared() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own tool deprecated
        config = torch.ao.quantization.get_default_qat_qconfig()
        made: nn.Module = torch.ao.nn.intrinsic.qat.ConvReLU2d(2, 2, 1, qconfig=config)
        return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.LazyLinear(4), "has lazy parameters"),
        (lambda: nn.ParameterList([nn.UninitializedParameter()]), "has lazy parameters"),
        (prepared, "prepared for it"),
    ],
    ids=["lazy module", "lazy parameter", "prepared"],
)
def test_what_cannot_be_read_is_refused_by_fit_and_load(make: Callable[[], nn.Module], words: str) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 4))
    both: list[Callable[[nn.Module], object]] = [pared.fit, lambda one: pared.load("nowhere", model=one)]
    for call in both:
        with pytest.raises(pared.ModelError, match=words):
            call(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda q: pared.save(q, 3),
        lambda q: pared.load(3, model=nn.Linear(2, 2)),  # type: ignore[call-overload]  # on purpose
        lambda q: pared.fit(nn.Linear(2, 2), eval_func=lambda _: 1.0, workspace=3),  # type: ignore[call-overload]  # on purpose
    ],
)
def test_what_is_no_path_is_refused(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(pared.ConfigError, match="expected a path, got int"):
        call(pared.fit(nn.Linear(2, 2)))
