"""Counterparts of recurrent layers: inputs and states of all sizes, threads, and what is not finite."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.runtime.layers.table import weights_of
from tests.ratios import snr
from tests.runtime.counterparts import RECURRENT, build, counterpart_of, tensors


@pytest.mark.parametrize("make", [lambda: nn.LSTM(12, 16, 2, bidirectional=True), lambda: nn.GRUCell(12, 16)])
@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e6])
def test_weights_for_inputs_in_unusual_units_lose_nothing(make: Callable[[], nn.Module], scale: float) -> None:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)
    for name in weights_of(module):
        if name.startswith("weight_ih") and "l1" not in name:
            module.get_parameter(name).mul_(scale)
    counterpart = counterpart_of(module, "dynamic")
    x = torch.randn(7, 3, 12)[-1 if isinstance(module, nn.GRUCell) else slice(None)] / scale
    assert snr(tensors(module(x))[0], tensors(counterpart(x))[0]) > 35


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_not_finite_shows_in_the_output(name: str, bad: float) -> None:
    layer, counterpart, (x, *rest), _ = build(name, "dynamic")
    x = copy.deepcopy(x)
    x.data.flatten()[0] = bad
    for exact, ours in zip(tensors(layer(x, *rest)), tensors(counterpart(x, *rest)), strict=True):
        assert (ours.isnan() | torch.isclose(exact, ours, atol=0.1)).all()
        assert bool(exact.isfinite().all()) >= bool(ours.isfinite().all())


@pytest.mark.parametrize("make", [lambda: nn.LSTM(12, 16), lambda: nn.GRU(12, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loud_sample_does_not_drown_a_quiet_one(make: Callable[[], nn.Module], packed: bool) -> None:
    torch.manual_seed(0)
    layer = make().eval().requires_grad_(False)
    counterpart = counterpart_of(layer, "dynamic")
    for louder in (7.0, 1000.0):
        x: Any = torch.randn(9, 2, 12).clamp(-2, 2)
        x[:, 1] *= louder / 2
        x = nn.utils.rnn.pack_padded_sequence(x, [5, 9], enforce_sorted=False) if packed else x
        states = [tensors(one(x)[1])[0][:, 0] for one in (layer, counterpart)]
        assert snr(*states) > 30


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loud_state_does_not_drown_a_quiet_one(make: type[Any], packed: bool) -> None:
    torch.manual_seed(0)
    layer = make(12, 16).eval().requires_grad_(False)
    counterpart = counterpart_of(layer, "dynamic")
    cell, pair = issubclass(make, nn.RNNCellBase), make in (nn.LSTM, nn.LSTMCell)
    if cell and packed:
        pytest.skip("cells take no packed sequences")
    state = torch.randn(2, 16).clamp(-0.9, 0.9)
    state[1] *= 1000
    state = state if cell else state[None]
    x: Any = torch.randn(2, 12).clamp(-2, 2) if cell else torch.randn(4, 2, 12).clamp(-2, 2)
    x = nn.utils.rnn.pack_padded_sequence(x, [4, 4]) if packed else x
    outputs = [tensors(one(x, (state, state) if pair else state))[0] for one in (layer, counterpart)]
    outputs = [one.reshape(-1, 2, 16)[:, 0] for one in outputs]
    assert snr(outputs[0], outputs[1]) > 30


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_integers_are_refused_as_the_float_layer_refuses_them(make: type[Any]) -> None:
    counterpart = counterpart_of(make(8, 8).eval().requires_grad_(False), "dynamic")
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        counterpart(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", RECURRENT)
def test_eight_threads_at_first_use_give_what_one_gives(name: str) -> None:
    _, counterpart, args, kwargs = build(name, "dynamic")
    expected = tensors(copy.deepcopy(counterpart)(*args, **kwargs))
    start = threading.Barrier(8)

    def call() -> list[Tensor]:
        start.wait()
        with torch.inference_mode():
            return tensors(counterpart(*args, **kwargs))

    engine = torch.backends.quantized.engine
    with ThreadPoolExecutor(8) as pool:
        found = [one.result() for one in [pool.submit(call) for _ in range(8)]]
    assert all(torch.equal(*pair) for one in found for pair in zip(one, found[0], strict=True))
    for ours, theirs in zip(found[0], expected, strict=True):  # other threads may add floats in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.backends.quantized.engine == engine
    # What was packed in inference mode serves outside of it.
    assert all(map(torch.equal, tensors(counterpart(*args, **kwargs)), expected))
