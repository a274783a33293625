"""Recurrent layers and transposed convolutions on codes, against plain references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.formats.activation import Range
from pared.runtime.kernels import transposed
from pared.runtime.kernels.fbgemm import recurrent
from pared.runtime.kernels.fbgemm.recurrent import Kind, Weights
from pared.runtime.kernels.machine import exact_products, levels_for
from pared.runtime.kernels.transposed import Moves
from tests.runtime import reference

pytestmark = pytest.mark.skipif(bool(recurrent.available()), reason="the kernels do not run on this machine")


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def direction(generator: torch.Generator, gates: int, inputs: int, hidden: int, biased: bool) -> Weights:
    rows = gates * hidden
    steps = [torch.rand(rows, generator=generator) * 0.02 for _ in range(2)]
    steps[0][0] = 0.0  # a row of zeros
    biases = [numbers(generator, rows) if biased else None for _ in range(2)]
    both = codes(generator, rows, inputs), codes(generator, rows, hidden)
    return Weights(both, (steps[0], steps[1]), (biases[0], biases[1]))


def stack(
    generator: torch.Generator, gates: int, inputs: int, hidden: int, layers: int, ways: int, biased: bool
) -> list[list[Weights]]:
    """The directions of each layer."""
    widths = [inputs, *[ways * hidden] * (layers - 1)]
    return [[direction(generator, gates, width, hidden, biased) for _ in range(ways)] for width in widths]


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["lstm", "gru"]),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    layers=st.integers(1, 2),
    both=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_sequence_is_what_the_reference_says(
    kind: Kind, sizes: tuple[int, ...], layers: int, both: bool, biased: bool, seed: int
) -> None:
    steps, batch, inputs, hidden = sizes
    generator = torch.Generator().manual_seed(seed)
    gates, states, ways = {"lstm": (4, 2), "gru": (3, 1)}[kind] + (1 + both,)
    weights = stack(generator, gates, inputs, hidden, layers, ways, biased)
    x = numbers(generator, steps, batch, inputs)
    state = [numbers(generator, layers * ways, batch, hidden).clamp(-1, 1) for _ in range(states)]
    packed = [recurrent.pack(one, ways if i else 0) for i, layer in enumerate(weights) for one in layer]
    out, *last = recurrent.run(kind, x, state, packed, layers)

    expected, ends = x, []
    for layer, one in enumerate(weights):
        parts = []
        for way, own in enumerate(one):
            first = [s[layer * ways + way] for s in state]
            ran, *end = reference.sequence(kind, expected.flip(0) if way else expected, first, own, first=not layer)
            parts.append(ran.flip(0) if way else ran)
            ends.append(end)
        expected = torch.cat(parts, -1).float()
    # A code that falls on the other side of a half moves a product by a step of it, twice as large without VNNI.
    step = 0.02 if exact_products() else 0.1
    assert torch.allclose(out, expected, atol=step)
    if out.numel() >= 8:  # of few numbers such a code moves the median
        assert float((out - expected).abs().median()) < (1e-5 if exact_products() else 5e-3)
    for which, got in enumerate(last):
        assert torch.allclose(got, torch.stack([end[which] for end in ends]).float(), atol=2 * step)


@settings(deadline=None, max_examples=40)
@given(
    space=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
    dynamic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_transposed_convolution_is_what_the_reference_says(
    space: list[int], channels: tuple[int, int], data: st.DataObject, dynamic: bool, seed: int
) -> None:
    def each(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in space]

    generator = torch.Generator().manual_seed(seed)
    taps, stride, dilation = each(1, 4), each(1, 3), each(1, 2)
    padding = [data.draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(taps, dilation, strict=True)]
    extra = [data.draw(st.integers(0, s - 1)) for s in stride]
    moves = Moves.of(len(space), stride, padding, extra, 1, dilation)
    weight, step = codes(generator, *channels, *taps), torch.rand(channels[1], generator=generator) * 0.02
    x, bias = numbers(generator, 2, channels[0], *space), numbers(generator, channels[1])
    if min(moves.size(space, taps)) < 1:
        return
    span = None if dynamic else Range.of(float(x.min()), float(x.max()))
    ours = transposed.run(x, transposed.pack(weight, step), bias, taps, moves, span)
    expected = reference.transposed_convolution(x, weight, step, bias, moves, span, levels_for(weight))
    assert ours.shape == expected.shape
    assert torch.allclose(ours.double(), expected, atol=1e-4, rtol=1e-4)
