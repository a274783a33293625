"""LSTMs on ONNX Runtime's int8 products, against a plain reference, and what they give besides."""

import copy
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.formats.activation import Range
from pared.runtime.kernels.activation import FAR
from pared.runtime.kernels.fbgemm.recurrent import Weights
from pared.runtime.kernels.machine import FULL_LEVELS
from pared.runtime.kernels.onnxruntime.lstm import Lstm, available
from pared.runtime.kernels.onnxruntime.session import Sessions
from pared.runtime.layers import recurrent
from pared.runtime.record import contents_of
from tests.ratios import snr
from tests.runtime import reference
from tests.runtime.counterparts import counterpart_of
from tests.runtime.test_sequence_kernels import numbers, stack

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(available()), reason="ONNX Runtime has no exact int8 products on this machine"),
]


def dense(x: Tensor, state: list[Tensor], layers: list[list[Weights]], span: Range) -> tuple[Tensor, list[Tensor]]:
    """The outputs and last states, in float64, of products with rounded inputs and states."""
    scale, zero_point = span.grid(FULL_LEVELS)
    codes = reference.quantize(x.clamp(span.low, span.high), scale, zero_point, FULL_LEVELS)
    values, ways = (codes.double() - zero_point) * scale, len(layers[0])
    ends: list[list[Tensor]] = []
    for layer, weights in enumerate(layers):
        parts = []
        for way, own in enumerate(weights):
            first = [one[layer * ways + way] for one in state]
            given_ = values.flip(0) if way else values
            ran, *end = reference.sequence("lstm", given_.float(), first, own, first=not layer)
            parts.append(ran.flip(0) if way else ran)
            ends.append(end)
        values = torch.cat(parts, -1).double()
    return values, [torch.stack([end[which] for end in ends]) for which in (0, 1)]


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    layers=st.integers(1, 2),
    both=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_sequence_is_what_the_reference_says(
    sizes: tuple[int, ...], layers: int, both: bool, biased: bool, seed: int
) -> None:
    steps, batch, inputs, hidden = sizes
    generator, ways = torch.Generator().manual_seed(seed), 1 + both
    weights = stack(generator, 4, inputs, hidden, layers, ways, biased)
    x, span = numbers(generator, steps, batch, inputs), Range(-1.5, 2.0)  # which some of them exceed
    state = [numbers(generator, layers * ways, batch, hidden).clamp(-1, 1) for _ in range(2)]
    ran = Lstm([one for layer in weights for one in layer], layers, span).run(x, state)
    expected, ends = dense(x, state, weights, span)
    # A code that falls on the other side of a half moves a product by a step of it.
    assert torch.allclose(ran.out.double(), expected, atol=0.02)
    for got, end in zip(ran.last, ends, strict=True):
        assert torch.allclose(got.double(), end.double(), atol=0.04)
    assert torch.allclose(ran.energies, x.square().sum((0, 2)), rtol=1e-5)
    assert torch.equal(ran.peaks, ran.out.abs().amax((0, 2)))


def pair(layer: nn.LSTM, low: float = -4.0, high: float = 4.0) -> tuple[nn.Module, nn.Module]:
    """The layer with the weights that codes stand for, and its counterpart."""
    return layer.eval().requires_grad_(False), counterpart_of(layer, "static", low, high)


# Batches of other sizes, and other threads, round floats elsewhere: a code that falls on the other side of a half.
ROUNDING = 2e-3


def test_no_sample_changes_another() -> None:
    torch.manual_seed(0)
    _, counterpart = pair(nn.LSTM(12, 16, 2, bidirectional=True))
    x = torch.randn(9, 5, 12)
    together = counterpart(x)[0]
    for one in range(5):
        torch.testing.assert_close(
            counterpart(x[:, one : one + 1])[0], together[:, one : one + 1], rtol=0, atol=ROUNDING
        )
    loud = x.clone()
    loud[:, 1:] *= 100
    assert torch.equal(counterpart(loud)[0][:, 0], together[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_concerns_its_sample_only(bad: float) -> None:
    torch.manual_seed(0)
    layer, counterpart = pair(nn.LSTM(12, 16))
    x = torch.randn(9, 3, 12)
    right = counterpart(x)[0]
    x[2, 1, 3] = bad
    exact, found = layer(x)[0], counterpart(x)[0]
    assert torch.equal(found[:, ::2], right[:, ::2])
    assert torch.equal(found[:, 1].isfinite(), exact[:, 1].isfinite())


def test_an_input_far_beyond_its_range_is_told() -> None:
    torch.manual_seed(0)
    layer, counterpart = pair(nn.LSTM(12, 16), -1.0, 1.0)
    found: list[object] = []
    for x in (torch.rand(9, 3, 12), torch.randn(9, 3, 12) * 10):
        FAR.seen = None
        counterpart(x)
        found.append(FAR.seen)
    FAR.seen = None
    assert found == [None, (pytest.approx(10, rel=0.2), 1.0)]
    assert snr(layer(torch.full((9, 3, 12), 1.0))[0], counterpart(torch.full((9, 3, 12), 5.0))[0]) > 30


def test_where_it_cannot_run_other_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, counterpart = pair(nn.LSTM(12, 16))
    other, x = copy.deepcopy(counterpart), torch.randn(9, 3, 12)
    monkeypatch.setattr(recurrent, "without_onnxruntime", lambda: "it is not installed")
    found = other(x)[0]
    assert snr(layer(x)[0], found) > 30
    monkeypatch.undo()
    assert not torch.equal(counterpart(x)[0], found)


def test_threads_and_their_numbers_change_nothing() -> None:
    torch.manual_seed(0)
    _, counterpart = pair(nn.LSTM(48, 64, bidirectional=True))
    x = torch.randn(20, 8, 48)
    expected, barrier = counterpart(x)[0], threading.Barrier(4)

    def call(threads: int) -> Tensor:
        barrier.wait()
        torch.set_num_threads(threads)
        with torch.no_grad():
            found: Tensor = counterpart(x)[0]
        return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, (1, 2, 3, 1)):
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_the_default_type_is_the_users() -> None:
    torch.manual_seed(0)
    layer, counterpart = pair(nn.LSTM(12, 16, bias=False))
    x = torch.randn(9, 3, 12)
    torch.set_default_dtype(torch.float64)
    try:
        first = counterpart(x)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, counterpart(x)[0])
    assert snr(layer(x)[0], first) > 30


def test_inputs_with_signs_yet_to_be_applied() -> None:
    torch.manual_seed(0)
    _, counterpart = pair(nn.LSTM(12, 16))
    x = torch.randn(9, 3, 12)
    signed = torch.complex(x, -x).conj().imag
    assert signed.is_neg()
    assert torch.equal(counterpart(signed)[0], counterpart(x)[0])


def test_a_session_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, counterpart = pair(nn.LSTM(12, 16))
    opened: list[int] = []
    real = Sessions._opened

    def slowly(self: Sessions, threads: int) -> Any:
        opened.append(threads)
        time.sleep(0.2)
        return real(self, threads)

    monkeypatch.setattr(Sessions, "_opened", slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(counterpart, [torch.randn(9, 3, 12)] * 4))
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("approach", "spike", "mode"), [("auto", 1e3, ""), ("static", 1e3, "static"), ("auto", 3.0, "static")]
)
def test_inputs_with_spikes_stay_off_a_grid_that_holds_them(approach: Any, spike: float, mode: str) -> None:
    """On a grid of their range all other numbers would be zeros."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(24, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(input=x)[0])
            return out

    torch.manual_seed(0)
    calls = [torch.randn(9, 4, 24) for _ in range(4)]
    for x in calls:
        x[0, 0, 0], x[1, 0, 1] = spike, -spike
    model = Tagger().eval()
    conf = PostTrainingQuantConfig(approach=approach, quant_level=0)
    q = pared.fit(model, conf, calls, quiet=True)
    found = contents_of(q).activations.get("rnn")
    assert (found is not None and found.mode == "static") == (mode == "static")
    if approach == "auto":
        with torch.no_grad():
            assert snr(model(calls[0]), q(calls[0])) > 35


CHILD = """
import os, sys, torch
from torch import nn
from tests.runtime.counterparts import counterpart_of
torch.set_num_threads(2)
layer = counterpart_of(nn.LSTM(64, 64).eval().requires_grad_(False), "static", -4.0, 4.0)
x = torch.randn(20, 8, 64)
expected = layer(x)[0]
(torch.ones(1_000_000) * 2).sum()  # whose threads the child does not have
child = os.fork()
if not child:
    sys.exit(0 if torch.equal(layer(x)[0], expected) else 3)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.child
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_answers_and_ends() -> None:
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=Path(__file__).parents[2], **options)
    assert done.stdout.strip() == "0"
