"""Figures of similarity: against a plain reference, and the laws that they keep."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pared.formats.dtypes import ELEMENTS
from pared.inspection.comparison.metrics import Similarity, as_numbers, identical, measure

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ARRAYS = arrays(np.float32, array_shapes(max_dims=3, max_side=6), elements=FLOATS)
PAIRS = array_shapes(max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(arrays(np.float32, shape, elements=FLOATS), arrays(np.float32, shape, elements=FLOATS))
)


def dense(a: Any, b: Any) -> tuple[float, float, float]:
    """SQNR, cosine and largest error by definition, number by number."""
    x, y = ([float(v) for v in array.reshape(-1)] for array in (a, b))
    signal, noise = math.fsum(v * v for v in x), math.fsum((w - v) ** 2 for v, w in zip(x, y, strict=True))
    product = math.fsum(v * w for v, w in zip(x, y, strict=True))
    cosine = product / math.sqrt(signal) / math.sqrt(math.fsum(w * w for w in y))
    return 10 * math.log10(signal / noise), cosine, max(abs(w - v) for v, w in zip(x, y, strict=True))


@pytest.mark.parametrize("shape", [(7,), (300, 500), (1, 70_001), (3, 5, 7, 11), (200, 3, 400)])
@pytest.mark.parametrize("order", ["C", "F", "sliced"])
def test_blocks_give_what_the_definition_gives(shape: tuple[int, ...], order: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=shape).astype(np.float32)
    b = a + 0.01 * rng.normal(size=shape).astype(np.float32)
    if order == "sliced":
        a, b = np.repeat(a, 2, axis=0)[::2], np.repeat(b, 3, axis=-1)[..., ::3]
    elif order == "F":
        b = np.asfortranarray(b)
    found = measure(a, b)
    assert (found.sqnr, found.cosine, found.error) == pytest.approx(dense(a, b), rel=1e-9)
    assert found.count == a.size
    assert found.relative_error == pytest.approx(found.error / np.abs(a).max())
    assert not identical(a, b)
    assert identical(a, a.copy())


@given(PAIRS)
def test_equality_is_symmetric_and_means_infinite_sqnr(pair: Any) -> None:
    a, b = pair
    one, other = measure(a, b), measure(b, a)
    assert one.same == other.same == np.array_equal(a, b)
    assert (one.sqnr == math.inf) == one.same
    assert one.error == other.error
    assert one.noise == other.noise
    assert one.cosine == other.cosine or (math.isnan(one.cosine) and math.isnan(other.cosine))


@given(ARRAYS)
def test_everything_equals_itself(a: Any) -> None:
    found = measure(a, a)
    assert (found.sqnr, found.cosine, found.error, found.same) == (math.inf, 1.0, 0.0, True)


@given(PAIRS, st.floats(2**-10, 2**10))
@pytest.mark.slow
def test_the_cosine_does_not_see_scale(pair: Any, scale: float) -> None:
    a, b = (array.astype(np.float64) for array in pair)
    assume(np.abs(a).max() > 1e-3 and np.abs(b).max() > 1e-3)
    one, other = measure(a, b), measure(a, scale * b)
    if not one.same and not other.same:
        assert other.cosine == pytest.approx(one.cosine, abs=1e-12)
    if not one.same:
        assert measure(scale * a, scale * b).sqnr == pytest.approx(one.sqnr, abs=1e-6)


@given(PAIRS, PAIRS)
@pytest.mark.slow
def test_sums_are_those_of_both_behind_each_other(first: Any, second: Any) -> None:
    joined = [np.concatenate([one.reshape(-1), two.reshape(-1)]) for one, two in zip(first, second, strict=True)]
    found, whole = measure(*first) + measure(*second), measure(joined[0], joined[1])
    assert (found.count, found.equal, found.error, found.largest) == (
        whole.count,
        whole.equal,
        whole.error,
        whole.largest,
    )
    assert found.noise == pytest.approx(whole.noise, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "sqnr", "error"),
    [
        ([1.0, math.nan], [1.0, math.nan], math.inf, 0),
        ([1.0, math.inf], [1.0, math.inf], math.inf, 0),
        ([1.0, math.inf], [1.0, -math.inf], -math.inf, math.inf),
        ([1.0, 2.0], [1.0, math.nan], -math.inf, math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf, 1),
        ([0.0], [-0.0], math.inf, 0),
    ],
)
def test_what_is_not_finite_or_zero(a: list[float], b: list[float], sqnr: float, error: float) -> None:
    found = measure(np.array(a), np.array(b))
    assert (found.sqnr, found.error, found.same) == (sqnr, error, error == 0)


@pytest.mark.parametrize(("a", "b"), [(1e200, 1.0), (1.0, 1e200), (1e200, 1.001e200)])
def test_squares_beyond_float64_are_no_equality(a: float, b: float) -> None:
    found = measure(np.array([a, a]), np.array([b, b]))
    assert found.sqnr == -math.inf or math.isnan(found.sqnr)
    assert (math.isnan(found.cosine), found.no_angle, found.same) == (True, "too large", False)


def test_differences_below_what_squares_can_hold_are_differences() -> None:
    found = measure(np.array([1e-200, 1.0]), np.array([0.0, 1.0]))
    assert not found.same
    assert 3000 < found.sqnr < math.inf


def test_whole_numbers_beyond_float64_are_told_apart() -> None:
    a = np.array([2**62, 2**62 + 1])
    assert measure(a, a[::-1]).equal == 0
    assert not measure(a, a[::-1]).same


def test_signs_of_zero_are_bits() -> None:
    assert not identical(np.array([0.0]), np.array([-0.0]))


def test_nothing_is_like_nothing() -> None:
    assert measure(np.zeros((0, 3)), np.zeros((0, 3))) == Similarity()
    assert Similarity().same


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_every_float_of_eight_bits_is_what_torch_says(dtype: str) -> None:
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits).view(getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(as_numbers(bits.view(ELEMENTS[dtype])), expected)


def test_bfloat16_is_compared_by_value() -> None:
    values = torch.randn(1000)
    rounded = values.bfloat16().view(torch.int16).numpy().view(ELEMENTS["bfloat16"])
    found = measure(values.numpy(), rounded)
    assert found.error == float((values - values.bfloat16().float()).abs().max())
    assert 40 < found.sqnr < 60
