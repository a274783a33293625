"""What int8 kernels the machine has, and how many levels its products allow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pared.runtime.kernels import machine
from pared.runtime.kernels.machine import exact_products, levels_for
from tests.runtime.inputs import TOLERANCE, needs_kernels, random_codes


@needs_kernels
def test_levels_are_full_where_products_are_exact_or_weights_small() -> None:
    assert levels_for(random_codes(4, 4)) == (255 if exact_products() else 127)
    assert levels_for(torch.full((2, 2), -64, dtype=torch.int8)) == 255
    assert levels_for(torch.empty(0, 3, dtype=torch.int8)) == 255


def test_the_reason_for_having_no_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = machine.available.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert ask() == "the int8 kernels need an x86 CPU with AVX2, and PyTorch reports DEFAULT"
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_OPERATORS", ("qlinear_of_another_time",))
        assert ask() == "this build of PyTorch lacks the int8 operator onednn::qlinear_of_another_time"
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert ask() == "this build of PyTorch has no oneDNN"


@needs_kernels
@pytest.mark.child
def test_without_vnni_activations_get_seven_bits_and_results_stay_right() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    child = subprocess.run(
        [sys.executable, str(root / "tests" / "runtime" / "avx2_child.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["available"] == ""
    assert report["exact"] is False
    assert report["levels"] == [127, 255, 127]
    assert {name: error for name, error in report["errors"].items() if error > TOLERANCE} == {}
    assert report["careless"] > 0.4
