"""The kernels of convolutions against their reference, on odd sizes, layouts and types."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from pared.errors import ModelError
from pared.runtime.kernels import conv
from pared.runtime.kernels.machine import levels_for
from tests.runtime import reference
from tests.runtime.inputs import SPAN, assert_same, needs_kernels, random, random_codes, random_step

FLOAT = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# inputs, outputs, groups, taps, stride, padding, dilation
FILTERS = [
    (3, 5, 1, (3,), 1, 1, 1),
    (1, 1, 1, (1,), 1, 0, 1),
    (16, 16, 16, (7,), 2, 3, 1),
    (4, 6, 2, (4,), 1, "same", 1),
    (3, 17, 1, (3, 3), 2, 1, 1),
    (17, 5, 1, (1, 1), 1, 0, 1),
    (8, 8, 8, (3, 3), 1, 1, 1),
    (8, 16, 8, (5, 3), (2, 1), (2, 1), 1),
    (6, 9, 3, (3, 2), 1, (1, 0), (2, 3)),
    (2, 4, 1, (2, 4), 1, "same", (1, 3)),
    (4, 4, 1, (3, 3), 1, "valid", 1),
    (1, 8, 1, (16, 1), (4, 1), (8, 0), 1),
    (3, 5, 1, (3, 3, 3), 1, 1, 1),
    (8, 8, 8, (3, 3, 3), 2, 1, 1),
    (4, 6, 2, (1, 2, 3), 1, 0, (1, 2, 1)),
]


@needs_kernels
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # the float layer's
@pytest.mark.parametrize("case", FILTERS, ids=str)
def test_convolutions_equal_their_reference_and_have_the_float_layers_layout(
    case: tuple[int, int, int, tuple[int, ...], int, int | str, int],
) -> None:
    inputs, outputs, groups, taps, stride, padding, dilation = case
    codes, step, bias = (
        random_codes(outputs, inputs // groups, *taps),
        random_step(outputs),
        random(outputs, seed=3),
    )
    geometry = conv.Geometry.of(taps, stride, padding, dilation, groups)
    packed = conv.pack(codes, step, geometry)
    weight = codes.float() * step.reshape(-1, 1, *(1 for _ in taps))
    space = (19, 14, 9)[: len(taps)]
    for batch, offset in product(((), (0,), (1,), (3,)), (None, bias)):
        x = random(*batch, inputs, *space)
        exact = FLOAT[len(taps)](x, weight, offset, stride, padding, dilation, groups)
        for fast, span in (
            (conv.static(x, packed, offset, SPAN), SPAN),
            (conv.dynamic(x, packed, offset), None),
        ):
            slow = reference.convolution(x, codes, step, geometry, offset, span=span, levels=packed.levels)
            assert_same(fast, slow)
            assert fast.shape == exact.shape
            assert fast.is_contiguous()
        assert_same(fast, exact, 0.03)


@needs_kernels
@pytest.mark.parametrize(("space", "layout"), [((9, 8), torch.channels_last), ((5, 4, 3), torch.channels_last_3d)])
def test_channels_last_comes_out_where_the_input_or_the_filter_is(
    space: tuple[int, ...], layout: torch.memory_format
) -> None:
    codes, step = random_codes(6, 4, *(3 for _ in space)), random_step(6)
    geometry = conv.Geometry.of(codes.shape[2:], padding=1)
    x = random(2, 4, *space)
    slow = reference.convolution(x, codes, step, geometry, levels=levels_for(codes))
    for filters, input_, expected in (
        (codes, x.contiguous(memory_format=layout), layout),
        (codes.contiguous(memory_format=layout), x, layout),
        (codes, x, torch.contiguous_format),
    ):
        out = conv.dynamic(input_, conv.pack(filters, step, geometry))
        assert out.is_contiguous(memory_format=expected)
        assert_same(out, slow)


@needs_kernels
def test_convolutions_take_inputs_of_any_layout_and_type() -> None:
    codes, step = random_codes(6, 4, 3, 3), random_step(6)
    geometry = conv.Geometry.of((3, 3))
    packed = conv.pack(codes, step, geometry)
    base = random(2, 8, 11, 20)
    for x in (
        base[:, ::2],
        base[:, :4, :, ::2],
        base[:, :4].transpose(2, 3),
        base[0, 0].expand(2, 4, 11, 20),
    ):
        for fast, span in ((conv.static(x, packed, None, SPAN), SPAN), (conv.dynamic(x, packed), None)):
            assert_same(fast, reference.convolution(x, codes, step, geometry, span=span, levels=packed.levels))
    half = base[:, :4].bfloat16()
    assert torch.equal(conv.dynamic(half, packed), conv.dynamic(half.float(), packed).bfloat16())


@needs_kernels
def test_a_channel_without_a_step_gives_the_bias_and_nan_shows() -> None:
    codes, step, bias = random_codes(2, 3, 3), torch.tensor([0.0, 0.1]), torch.tensor([0.25, 0.5])
    geometry = conv.Geometry.of((3,))
    packed = conv.pack(codes, step, geometry)
    x = random(1, 3, 8)
    assert conv.static(x, packed, bias, SPAN)[0, 0].tolist() == [0.25] * 6
    x[0, 1, 2] = math.nan
    assert conv.dynamic(x, packed, bias).isnan().all()
    assert reference.convolution(x, codes, step, geometry, bias).isnan().all()


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "case", [(4, 6, 1, (3, 3), 1, 1), (3, 8, 1, (16, 16), 16, 0), (8, 8, 8, (3, 3), 2, 1)], ids=str
)
def test_no_sample_of_a_convolution_depends_on_the_others(
    case: tuple[int, int, int, tuple[int, ...], int, int], layout: torch.memory_format
) -> None:
    inputs, outputs, groups, taps, stride, padding = case
    geometry = conv.Geometry.of(taps, stride, padding, 1, groups)
    packed = conv.pack(random_codes(outputs, inputs // groups, *taps), random_step(outputs), geometry)
    x = random(5, inputs, 33, 32).contiguous(memory_format=layout)
    x[1], x[2], x[3] = x[1].abs(), x[2] * 1e6, x[3] * 1e-4
    alone = [conv.dynamic(sample[None], packed, random(outputs)) for sample in x]
    for whole, each in zip(conv.dynamic(x, packed, random(outputs)), alone, strict=True):
        assert_same(whole, each[0])
    x[2, 0, 3, 3], x[4, 1, 5, 5] = math.nan, math.inf
    spoilt = conv.dynamic(x, packed, random(outputs))
    assert spoilt.isfinite().flatten(1).any(1).tolist() == [True, True, False, True, False]
    assert torch.equal(spoilt[[0, 1, 3]], conv.dynamic(x[[0, 1, 3]], packed, random(outputs)))


def test_convolutions_refuse_what_does_not_fit() -> None:
    with pytest.raises(ModelError) as caught:
        conv.Geometry.of((3, 3), stride=(1, 2, 3))
    assert str(caught.value) == (
        "a filter with 2 spatial dimensions was given 3 numbers: (1, 2, 3)\n"
        "  Give one number for all dimensions, or one for each."
    )
    line = conv.Geometry.of((3,))
    with pytest.raises(ModelError) as caught:
        conv.pack(random_codes(2, 3), torch.ones(2), line)
    assert str(caught.value) == (
        "a convolution's codes must be int8 in three to five dimensions, not torch.int8 in 2\n"
        "  Pass the codes of a grid of int8 codes, one row per output channel."
    )
    with pytest.raises(ModelError, match="a filter with 2 spatial dimensions cannot move by Geometry"):
        conv.pack(random_codes(2, 3, 3, 3), torch.ones(2), line)
    with pytest.raises(ModelError, match="2 rows of codes need 2 float32 steps, not torch.float64 "):
        conv.pack(random_codes(2, 3, 3), torch.ones(2, dtype=torch.float64), line)


@needs_kernels
@pytest.mark.parametrize("shape", [(3,), (1, 4, 9), (1, 3, 9, 9)])
def test_convolutions_refuse_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    packed = conv.pack(random_codes(2, 3, 3), torch.ones(2), conv.Geometry.of((3,)))
    with pytest.raises(ModelError) as caught:
        conv.static(torch.ones(shape), packed, None, SPAN)
    assert str(caught.value) == (
        f"the layer takes (batch, 3, width), but was given {shape}\n  Check the shape of the input."
    )
