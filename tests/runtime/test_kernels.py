import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.errors import CalibrationError, ModelError
from pared.formats.activation import Range
from pared.runtime.kernels import conv, linear, machine
from pared.runtime.kernels.activation import FAR, NotFiniteError, quantize, quantize_rows
from pared.runtime.kernels.machine import available, exact_products, levels_for
from tests.runtime import reference

needs_kernels = pytest.mark.skipif(available() != "", reason=available() or "the int8 kernels run here")

# Sums are exact on both sides, so only the rounding of a few float32 operations may differ.
TOLERANCE = 2e-6

SPAN = Range(-2.0, 3.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def random_step(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(2)) / 50 + 1e-3


def assert_same(fast: Tensor, slow: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to within a share of the largest output: unlike a cosine, this sees a wrong scale."""
    assert fast.shape == slow.shape
    assert fast.dtype == slow.dtype
    if slow.numel():
        assert float((fast - slow).abs().max()) <= tolerance * float(slow.abs().max())


# --- activation -------------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(finite, min_size=1, max_size=70), finite, finite, st.sampled_from([127, 255]))
@settings(deadline=None)
def test_the_fast_quantizer_equals_the_reference_bit_for_bit(
    values: list[float], one: float, other: float, levels: int
) -> None:
    scale, zero_point = Range.of(min(one, other), max(one, other)).grid(levels)
    x = torch.tensor(values)
    codes = quantize(x, scale, zero_point, levels)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, reference.quantize(x, scale, zero_point, levels))


@given(finite, finite, st.sampled_from([127, 255]))
@settings(deadline=None)
def test_a_grid_holds_zero_exactly_and_reaches_both_ends(one: float, other: float, levels: int) -> None:
    span = Range.of(min(one, other), max(one, other))
    scale, zero_point = span.grid(levels)
    ends = quantize(torch.tensor([span.low, 0.0, span.high]), scale, zero_point, levels).tolist()
    assert 0 <= ends[0] <= ends[1] == zero_point <= ends[2] <= levels
    for value, code in zip((span.low, span.high), (ends[0], ends[2]), strict=True):
        assert abs(scale * (code - zero_point) - value) <= 0.5001 * scale + 1e-30


def test_halves_go_to_the_even_code() -> None:
    assert quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), 1.0, 0, 255).tolist() == [0, 2, 2, 4]
    assert quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), 1.0, 1, 255).tolist() == [2, 2, 4, 4]


def test_values_beyond_the_grid_take_its_ends_and_what_is_not_finite_has_no_code() -> None:
    x = torch.tensor([3e38, -3e38])
    for quantizer in (quantize, reference.quantize):
        assert quantizer(x, 0.01, 100, 127).tolist() == [127, 0]
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NotFiniteError):
            quantize(torch.tensor([1.0, bad]), 0.01, 100, 127)


def test_an_input_far_beyond_the_grid_is_noted() -> None:
    FAR.seen = None
    quantize(torch.tensor([1.0, 1.5]), 0.01, 100, 200)
    assert FAR.seen == pytest.approx((1.2748, 1.0), abs=1e-3)
    FAR.seen = None
    quantize(torch.tensor([0.5, 1.2]), 0.01, 100, 200)
    assert FAR.seen is None
    quantize(torch.empty(0), 0.01, 100, 200)
    assert FAR.seen is None


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 17), (129, 33), (70_001,)])
def test_quantizing_does_not_depend_on_size_or_layout(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    scale, zero_point = SPAN.grid(255)
    expected = reference.quantize(x, scale, zero_point, 255)
    assert torch.equal(quantize(x, scale, zero_point, 255), expected)
    strided = torch.stack((x, x), -1)[..., 0]
    assert torch.equal(quantize(strided, scale, zero_point, 255), expected)


def test_quantizing_keeps_channels_last() -> None:
    x = random(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert quantize(x, 0.1, 3, 255).is_contiguous(memory_format=torch.channels_last)


@given(st.lists(st.lists(finite, min_size=9, max_size=9), min_size=1, max_size=5), st.sampled_from([127, 255]))
@settings(deadline=None)
def test_rows_are_quantized_like_the_reference_to_within_half_a_step(values: list[list[float]], levels: int) -> None:
    x = torch.tensor(values)
    fast, slow = quantize_rows(x, levels), reference.quantize_rows(x, levels)
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, other)
    codes, scale, zero_point = fast
    assert int(codes.max()) <= levels
    assert bool(((scale * (codes - zero_point) - x).abs() <= 0.5001 * scale).all())


@pytest.mark.parametrize(("low", "high", "levels"), [(-101.5, 153.5, 255), (-102.5, 152.5, 255), (-51.5, 75.5, 127)])
def test_no_code_wraps_around_where_both_ends_of_a_row_are_rounded_up(low: float, high: float, levels: int) -> None:
    codes, scale, zero_point = quantize_rows(torch.tensor([[low, 0.0, high]]), levels)
    assert (codes - zero_point).mul(scale).flatten().tolist() == pytest.approx(
        [low, 0.0, high], abs=0.51 * float(scale)
    )


def test_a_row_of_zeros_has_a_grid_and_a_row_with_nan_or_inf_has_none() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 0.0], [-math.inf, 0.0]])
    codes, scale, zero_point = quantize_rows(x, 255)
    assert (scale * (codes - zero_point))[0].tolist() == [0.0, 0.0]
    assert scale.isfinite().flatten().tolist() == [True, False, False, False]


def test_a_range_must_be_finite_and_hold_zero() -> None:
    assert Range.of(1.0, 2.0) == Range(0.0, 2.0)
    assert Range.of(-2.0, -1.0) == Range(-2.0, 0.0)
    assert Range(0.0, 0.0).grid(255)[1] == 0
    with pytest.raises(CalibrationError) as caught:
        Range(1.0, 2.0)
    assert str(caught.value) == (
        "the activations' range 1 to 2 is not finite or does not include zero\n"
        "  Look for NaN or Inf in the calibration data; Range.of widens a range to include zero."
    )
    for low, high in ((math.nan, 1.0), (0.0, math.inf), (0.0, 1e39)):
        with pytest.raises(CalibrationError, match="is not finite"):
            Range.of(low, high)


# --- linear -----------------------------------------------------------------------------------------------

LEADING = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), list(product([1, 3, 17, 64, 200], [1, 5, 48])))
def test_linear_equals_its_reference(inputs: int, outputs: int) -> None:
    codes, step, bias = random_codes(outputs, inputs), random_step(outputs), random(outputs, seed=3)
    packed = linear.pack(codes, step)
    for leading, offset in product(LEADING, (None, bias)):
        x = random(*leading, inputs)
        for fast, span in (
            (linear.static(x, packed, offset, SPAN), SPAN),
            (linear.dynamic(x, packed, offset), None),
        ):
            assert_same(fast, reference.linear(x, codes, step, offset, span=span, levels=packed.levels))


@needs_kernels
def test_linear_is_near_the_float_layer() -> None:
    codes, step, bias = random_codes(48, 200), random_step(48), random(48, seed=3)
    packed, x = linear.pack(codes, step), random(9, 200)
    weight = codes.float() * step[:, None]
    exact = F.linear(x, weight, bias)
    # Each activation is at most half a step wrong.
    half_step = 0.51 * (x.amax(1) - x.amin(1)) / (packed.levels - 1)
    bound = half_step[:, None] * weight.abs().sum(1)
    assert bool(((linear.dynamic(x, packed, bias) - exact).abs() <= bound).all())
    span = Range.of(float(x.min()), float(x.max()))
    bound = 0.51 * (span.high - span.low) / packed.levels * weight.abs().sum(1)
    assert bool(((linear.static(x, packed, bias, span) - exact).abs() <= bound).all())


@needs_kernels
def test_a_row_of_the_output_does_not_depend_on_its_neighbours() -> None:
    packed = linear.pack(random_codes(16, 32), random_step(16))
    x = random(5, 32) * torch.tensor([[1.0], [1e3], [1e-3], [0.0], [1e6]])
    together = linear.dynamic(x, packed)
    for row, alone in zip(x, together, strict=True):
        assert_same(linear.dynamic(row, packed), alone)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    x, bias = random(4, 17).to(dtype), random(5, seed=3).to(dtype)
    packed = linear.pack(random_codes(5, 17), random_step(5))
    for fast, slow in (
        (linear.static(x, packed, bias, SPAN), linear.static(x.float(), packed, bias, SPAN)),
        (linear.dynamic(x, packed, bias), linear.dynamic(x.float(), packed, bias)),
        (linear.dynamic(x[:0], packed, bias), linear.dynamic(x[:0].float(), packed, bias)),
    ):
        assert fast.dtype == dtype
        assert torch.equal(fast, slow.to(dtype))


@needs_kernels
def test_linear_takes_inputs_of_any_layout_and_leaves_them_alone() -> None:
    codes, step = random_codes(5, 17), random_step(5)
    packed = linear.pack(codes, step)
    base = random(6, 34, 4)
    for x in (base[:, ::2, 0], base[:, :17].transpose(1, 2), base[0, 0, 0].expand(3, 17), base[:, 17:, 1]):
        kept = x.clone()
        for fast, span in ((linear.static(x, packed, None, SPAN), SPAN), (linear.dynamic(x, packed), None)):
            assert_same(fast, reference.linear(x, codes, step, span=span, levels=packed.levels))
        assert torch.equal(x, kept)


@needs_kernels
def test_codes_and_steps_of_any_layout_are_packed_right() -> None:
    codes, step, x = random_codes(17, 10).t()[::2], random_step(10)[::2], random(3, 17)
    packed = linear.pack(codes, step)
    assert_same(linear.dynamic(x, packed), reference.linear(x, codes, step, levels=packed.levels))


@needs_kernels
def test_a_row_without_a_step_gives_the_bias() -> None:
    packed = linear.pack(random_codes(2, 9), torch.tensor([0.0, 1.0]))
    bias, x = torch.tensor([0.25, 0.5]), random(4, 9)
    assert linear.static(x, packed, bias, SPAN)[:, 0].tolist() == [0.25] * 4
    assert linear.dynamic(x, packed, bias)[:, 0].tolist() == [0.25] * 4
    assert linear.dynamic(x, packed)[:, 0].tolist() == [0.0] * 4


@needs_kernels
def test_nothing_in_leaves_the_bias() -> None:
    packed = linear.pack(torch.empty(3, 0, dtype=torch.int8), torch.ones(3))
    bias = random(3)
    assert torch.equal(linear.static(torch.empty(2, 0), packed, bias, SPAN), bias.expand(2, 3))
    assert torch.equal(linear.dynamic(torch.empty(2, 0), packed), torch.zeros(2, 3))


@needs_kernels
def test_nan_and_infinity_show_in_the_rows_that_hold_them() -> None:
    packed = linear.pack(random_codes(5, 9), random_step(5))
    x = random(4, 9)
    x[1, 3], x[2, 0] = math.nan, math.inf
    for bias in (None, random(5)):
        assert linear.dynamic(x, packed, bias).isfinite().all(1).tolist() == [True, False, False, True]
        assert not linear.dynamic(x, packed, bias)[1:3].isfinite().any()


@needs_kernels
def test_the_fast_path_carries_no_gradient() -> None:
    with torch.inference_mode():  # where the first call may have been: what it packs is used outside, too
        packed = linear.pack(random_codes(5, 9), nn.Parameter(random_step(5)))
    x, bias = random(4, 9).requires_grad_(), nn.Parameter(random(5))
    for out in (
        linear.static(x, packed, bias, SPAN),
        linear.dynamic(x, packed, bias),
        linear.dynamic(x[:0], packed),
    ):
        assert not out.requires_grad


@needs_kernels
def test_threads_share_a_pack() -> None:
    codes, filters = random_codes(48, 64), random_codes(48, 64, 3)
    packed = linear.pack(codes, random_step(48))
    convolution = conv.pack(filters, random_step(48), conv.Geometry.of((3,)))
    inputs = [random(8 + i % 3, 64, 20, seed=i) for i in range(24)]

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.transpose(1, 2)
        return (
            linear.static(rows, packed, None, SPAN),
            linear.dynamic(rows, packed),
            conv.dynamic(x, convolution),
        )

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_linear_refuses_what_does_not_fit() -> None:
    with pytest.raises(ModelError) as caught:
        linear.pack(torch.zeros(2, 3), torch.ones(2))
    assert str(caught.value) == (
        "a linear layer's codes must be int8 in two dimensions, not torch.float32 in 2\n"
        "  Pass the codes of a grid of int8 codes, one row per output."
    )
    with pytest.raises(ModelError) as caught:
        linear.pack(random_codes(2, 3), torch.ones(1))
    assert str(caught.value) == (
        "2 rows of codes need 2 float32 steps, not torch.float32 (1,)\n  Pass one step per output."
    )


@needs_kernels
def test_linear_refuses_inputs_of_another_width() -> None:
    packed = linear.pack(random_codes(2, 3), torch.ones(2))
    for x in (torch.ones(4, 5), torch.tensor(1.0)):
        with pytest.raises(ModelError) as caught:
            linear.dynamic(x, packed)
        assert str(caught.value) == (
            f"the layer takes (..., 3), but was given {tuple(x.shape)}\n  Check the shape of the input."
        )


# --- conv -------------------------------------------------------------------------------------------------

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


# --- machine ----------------------------------------------------------------------------------------------


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
