"""Inputs are quantized as the reference quantizes them, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import CalibrationError
from pared.formats.activation import Range
from pared.runtime.kernels.activation import FAR, NotFiniteError, quantize, quantize_rows
from tests.runtime import reference
from tests.runtime.inputs import SPAN, random

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
