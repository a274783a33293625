"""Sweeps and rounding compute on the device that they are told; a fit stays on one kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pared
from pared.errors import ConfigError, WorkerError
from pared.executors import work
from pared.fitting.rounding.feedback import RowSteps, factor, feedback
from pared.switches import computing_on, device
from tests.executors.pickled import Pickled
from tests.fitting.streamed.elsewhere import DEVICE, Device, Elsewhere, Workers
from tests.fitting.streamed.models import small, some_calls, written

BATCHES = [dict(call.kwargs) for call in some_calls(9)]


def fitted(folder: Path, at: Path, executor: Any, **settings: Any) -> bytes:
    conf = pared.PostTrainingQuantConfig(approach="weight_only", **settings)
    with sdpa_kernel(SDPBackend.MATH):
        path: Any = pared.fit(folder, conf, BATCHES, workspace=at / "work", quiet=True, executor=executor)
    return bytes(Path(path).read_bytes())


@pytest.mark.parametrize("settings", [{}, {"target": "mlx"}])
def test_blocks_are_run_and_tensors_rounded_there(settings: dict[str, str], tmp_path: Path) -> None:
    folder = written(small("Llama", tied=True, layers=2), tmp_path / "model")
    here = fitted(folder, tmp_path / "here", Pickled(threads=1), **settings)
    there = Workers()
    assert fitted(folder, tmp_path / "there", there, **settings) == here
    costly = {"linalg_cholesky_ex", "linalg_solve_triangular", "baddbmm_", "mm", "silu", "_softmax_backward_data"}
    assert costly <= there.emulated.ran


def test_experts_are_counted_and_rounded_there(tmp_path: Path) -> None:
    """Transformers multiplies by experts in another way off the CPU, so bytes differ, and hardly the size."""
    folder = written(small("Mixtral", tied=True, layers=2), tmp_path / "model")
    here, there = fitted(folder, tmp_path / "here", Pickled(threads=1)), fitted(folder, tmp_path / "there", Workers())
    assert len(there) == pytest.approx(len(here), rel=0.05)


def test_what_is_rounded_comes_back() -> None:
    moments = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])
    steps = RowSteps(torch.tensor([[1.0]]), 127)
    with Device(), computing_on(DEVICE):
        factored = factor(moments, damping=0.0)
        codes = feedback(torch.tensor([[[0.4, 0.4]]]), factored, steps)
    assert type(codes) is Tensor
    assert type(factored.spill) is Tensor
    assert codes.tolist() == [[[0.0, 1.0]]]


def test_the_emulated_device_does_not_mix_with_the_cpu() -> None:
    with Device():
        there = torch.ones(2, device=DEVICE)
        assert isinstance(there + there.sum(), Elsewhere)
        assert there.cpu().tolist() == [1.0, 1.0]
        with pytest.raises(AssertionError, match="mixes devices"):
            there + torch.ones(2)


def test_the_device_is_that_of_the_context() -> None:
    assert device() == "cpu"
    with computing_on("cuda"):
        assert device() == "cuda"
    assert device() == "cpu"


def test_a_fit_goes_on_where_it_began(tmp_path: Path) -> None:
    folder = written(small("Llama", tied=True, layers=2), tmp_path / "model")
    fitted(folder, tmp_path, Pickled(threads=1))
    with pytest.raises(ConfigError, match="work: was begun on processors, .* and GPUs compute now"):
        fitted(folder, tmp_path, Workers("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_reported() -> None:
    with pytest.raises(WorkerError, match="sees no GPU there, and Ray has given it one"):
        work.run(abs, -1, 1, 30, "cuda")
