"""Threads: the number that is allowed is kept and obeyed, any number may call a model, and calls leave nothing."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from pared.runtime.kernels.machine import available
from tests.files.threads_child import THREADS
from tests.runtime.counterparts import EVERY, build, counterpart_of, tensors

CALLERS, CALLS_EACH = 8, 4
SEQUENCE_CALLS_EACH = 100  # one call in 5,000 was wrong while oneDNN packed the weights
# Of each way that a kernel is called: static, dynamic, convolutions, recurrent layers, attention, tables.
NAMES = (
    "linear",
    "conv1d",
    "conv2d",
    "conv2d depthwise",
    "conv3d",
    "transposed conv2d",
    "lstm",
    "gru",
)
CONCURRENT = [case for case in EVERY if case[0] in (*NAMES, "lstm cell", "attention", "embedding", "bags")]

CALLS, WARM = 10_000, 300
LEFT_OBJECTS = 100  # of Python's, after all calls: one for each call would be 10,000
LEFT_BYTES = 8 << 20  # the output of each call would be 160 MB


def in_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.files.threads_child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(bool(available()), reason="no int8 kernels here")
@pytest.mark.child
def test_kernels_start_no_more_threads_than_are_allowed() -> None:
    before, one, two = in_child("kernels")[THREADS]
    assert one == before
    assert two > before, "no kernel shared its work out, so this shows nothing"


@pytest.mark.child
def test_nothing_changes_how_many_threads_are_allowed(tmp_path: Path) -> None:
    found = in_child("everything", str(tmp_path))
    assert found["allowed"] == [1, 1, 1, 1]
    assert len(set(found["between operations"])) == 1


@pytest.mark.parametrize(("name", "mode"), CONCURRENT)
def test_callers_in_many_threads_get_what_one_gets(name: str, mode: str) -> None:
    _, counterpart, args, kwargs = build(name, mode)
    inputs = [_scaled(args, 1 - i / (2 * CALLERS)) for i in range(CALLERS)]  # another one each: a mix-up would show
    with torch.no_grad():
        expected = [tensors(counterpart(*each, **kwargs)) for each in inputs]
    fresh = build(name, mode)[1]  # nothing packed yet: all meet at the first use
    times = SEQUENCE_CALLS_EACH if name in ("lstm", "gru") else CALLS_EACH

    def work(caller: int) -> list[list[Tensor]]:
        with torch.no_grad():
            return [tensors(fresh(*inputs[caller], **kwargs)) for _ in range(times)]

    with ThreadPoolExecutor(CALLERS) as pool:
        found = list(pool.map(work, range(CALLERS)))
    for right, answers in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for answer in answers for a, b in zip(right, answer, strict=True))
    if mode != "gather":
        assert not torch.equal(expected[0][0], expected[1][0]), "all callers have the same input"


def _scaled(args: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
    """The first argument times this, if it is a tensor of floats."""
    first, *others = args
    return (first * factor if isinstance(first, Tensor) and first.is_floating_point() else first, *others)


class Chain(nn.Module):
    """An int8 layer of every kind of activation, so small that ten thousand calls take seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = counterpart_of(nn.Conv1d(8, 32, 3, padding=1).requires_grad_(False), "static", -3.0, 3.0)
        self.static = counterpart_of(nn.Linear(32, 32).requires_grad_(False), "static", -3.0, 3.0)
        self.dynamic = counterpart_of(nn.Linear(32, 32).requires_grad_(False), "dynamic")
        self.lstm = counterpart_of(nn.LSTMCell(32, 64).requires_grad_(False), "dynamic")

    def forward(self, x: Tensor) -> Tensor:
        x = self.dynamic(self.static(self.conv(x).transpose(1, 2)).relu())
        out: Tensor = self.lstm(x.flatten(0, 1))[0]
        return out


@pytest.mark.slow
def test_ten_thousand_calls_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    inputs = [torch.randn(8, 8, 8), torch.randn(7, 8, 8)]  # what is cached for one shape must not be for each call

    def call(times: int) -> None:
        for i in range(times):
            model(inputs[i % 2])

    allowed = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small products, threads would wait for each other most of the time
    try:
        objects, resident = _grown(call)
    finally:
        torch.set_num_threads(allowed)
    assert objects < LEFT_OBJECTS
    assert resident < LEFT_BYTES


def _grown(call: Callable[[int], None]) -> tuple[int, int]:
    """Objects and bytes that all calls left, once everything was warm."""
    with torch.inference_mode():
        call(WARM)
        gc.collect()
        objects, resident = len(gc.get_objects()), psutil.Process().memory_info().rss
        call(CALLS)
        gc.collect()
    return len(gc.get_objects()) - objects, psutil.Process().memory_info().rss - resident
