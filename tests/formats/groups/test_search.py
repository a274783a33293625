"""The laws of steps that are searched for: what they promise of errors, and of numbers that are on a grid already."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pared.formats.groups.grid import Floats, GroupGrid, representable
from pared.formats.groups.search import fitted, nearest
from tests.formats.groups.grids import GRIDS, random_parts

NUMBERS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    elements=st.floats(-(2.0**14), 2.0**14, width=32, allow_subnormal=False),
)


def absmax(matrix: Floats, grid: GroupGrid) -> dict[str, NDArray[Any]]:
    """The finest steps that cut nothing off, rounded to what is stored."""
    size, columns = grid.group or matrix.shape[1], matrix.shape[1]
    groups = np.pad(matrix, ((0, 0), (0, -columns % size)), "edge").reshape(len(matrix), -1, size)
    if grid.zero == "fixed":
        return {"step": representable(np.abs(groups).max(2) / np.float32(grid.high), grid.step)}
    least = groups.min(2) if grid.zero == "least" else np.minimum(groups.min(2), 0)
    most = groups.max(2) if grid.zero == "least" else np.maximum(groups.max(2), 0)
    step = representable((most - least) / np.float32(grid.high - grid.low), grid.step)
    if grid.zero == "least":
        return {"step": step, "least": representable(least, grid.step)}
    with np.errstate(all="ignore"):
        zero = np.rint(np.where(step > 0, -(most + least) / 2 / step, 0) - 0.5)
    return {"step": step, "zero": np.where(step > 0, np.clip(zero, grid.low, grid.high), 0).astype(np.int8)}


def error(matrix: Floats, grid: GroupGrid, parts: dict[str, NDArray[Any]], weights: Any = 1) -> float:
    decoded = grid.decode({**parts, "codes": nearest(matrix, grid, parts)})
    return float((weights * (decoded.astype(np.float64) - matrix) ** 2).sum())


@settings(deadline=None, max_examples=60)
@given(NUMBERS, st.sampled_from([name for name in GRIDS if not GRIDS[name].nested]), st.booleans())
def test_no_worse_than_the_finest_steps_that_cut_nothing_off(matrix: Floats, name: str, negative: bool) -> None:
    grid = GRIDS[name]
    found = error(matrix, grid, fitted(matrix, grid, negative=negative))
    rounding = 1e-12 * float((matrix.astype(np.float64) ** 2).sum())  # of sums in float32
    assert found <= error(matrix, grid, absmax(matrix, grid)) * (1 + 1e-5) + rounding


@settings(deadline=None, max_examples=60)
@given(NUMBERS, st.sampled_from(list(GRIDS)))
@example(np.array([[8.0, *[2.0**-126] * 16]], np.float32), "Q6_K")  # groups of very different sizes share a step
def test_parts_are_what_can_be_stored(matrix: Floats, name: str) -> None:
    grid = GRIDS[name]
    parts = fitted(matrix, grid)
    shapes = grid.shapes(*matrix.shape)
    assert {part: numbers.shape for part, numbers in parts.items()} == {k: v for k, v in shapes.items() if k != "codes"}
    for part, numbers in parts.items():
        if part in ("step", "least"):
            np.testing.assert_array_equal(representable(numbers, grid.step), numbers)
            assert numbers.dtype == np.float32
        else:
            low, high = (grid.low, grid.high) if part == "zero" else grid.multiples
            assert numbers.min() >= low
            assert numbers.max() <= high
            assert numbers.dtype == (np.int8 if grid.signed or part == "zero" else np.uint8)
    if grid.zero == "fixed" and not grid.signed:
        assert (grid.steps(parts) >= 0).all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 96.0])
def test_constants_are_exact(name: str, value: float) -> None:
    grid, matrix = GRIDS[name], np.full((3, 300), value, np.float32)
    assert error(matrix, grid, fitted(matrix, grid)) == 0


@pytest.mark.parametrize("name", [name for name in GRIDS if not GRIDS[name].nested])
@pytest.mark.parametrize("negative", [False, True])
def test_numbers_that_are_on_a_grid_are_found_to_be(name: str, negative: bool) -> None:
    grid = GRIDS[name]
    parts = random_parts(grid, 40, 256)
    if not negative or grid.zero != "fixed":
        parts["step"] = np.abs(parts["step"])
    if grid.zero == "least":  # each group has its least value
        parts["codes"][:, :: grid.group] = grid.low
    matrix = grid.decode(parts)
    tolerance = 1e-12 if grid.step == "float32" else 0
    found = error(matrix, grid, fitted(matrix, grid, negative=negative))
    assert found <= tolerance * float((matrix.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_weights_say_which_errors_matter(name: str) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_t(4, size=(32, 512)).astype(np.float32)
    weights = generator.exponential(size=512).astype(np.float32) ** 2
    grid = GRIDS[name]
    plain, weighted = fitted(matrix, grid), fitted(matrix, grid, weights)
    assert error(matrix, grid, weighted, weights) < error(matrix, grid, plain, weights)
    again = fitted(matrix, grid, np.broadcast_to(weights, matrix.shape))
    assert all(np.array_equal(again[part], weighted[part]) for part in weighted)


@pytest.mark.parametrize("name", GRIDS)
def test_columns_without_weight_do_not_matter(name: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    parts = fitted(matrix, GRIDS[name], np.zeros(256, np.float32))
    assert error(matrix, GRIDS[name], parts) < float((matrix**2).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_threads_and_types_change_nothing(name: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(300, 256)).astype(np.float16)
    one = fitted(matrix.astype(np.float32), GRIDS[name])
    two = fitted(matrix, GRIDS[name], threads=2)
    assert all(np.array_equal(one[part], two[part]) for part in one)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "int4 g128, zero"])
def test_nested_steps_cost_little(name: str) -> None:
    """Of a grid whose own steps are nested, against the same with steps in 16 bits."""
    matrix = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    own = GRIDS[name]
    if own.zero == "code":
        pytest.skip("no runtime nests steps beside codes for zero")
    nested = GroupGrid(own.bits, own.group, own.zero, nested=8, multiple_bits=6, signed=own.zero == "fixed")
    plain = error(matrix, own, fitted(matrix, own, negative=True))
    assert error(matrix, nested, fitted(matrix, nested)) < plain * 1.05


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**60])
def test_numbers_of_any_size(factor: float) -> None:
    matrix = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    grid = GroupGrid(4, 32, step="float32")
    found = fitted(matrix * np.float32(factor), grid)["step"]
    np.testing.assert_array_equal(found, fitted(matrix, grid)["step"] * np.float32(factor))


@pytest.mark.parametrize("name", [name for name in GRIDS if GRIDS[name].nested])
def test_numbers_on_a_grid_with_nested_steps_are_mostly_found_to_be(name: str) -> None:
    """A group that does not use its least code says nothing sure about its least value."""
    grid = GRIDS[name]
    weights = np.random.default_rng(0).standard_t(5, size=(64, 1024)).astype(np.float32)
    parts = fitted(weights, grid)
    matrix = grid.decode({**parts, "codes": nearest(weights, grid, parts)})
    again = fitted(matrix, grid)
    decoded = grid.decode({**again, "codes": nearest(matrix, grid, again)})
    shares = (decoded == matrix).reshape(-1, (grid.group or 1) * grid.nested).all(1)
    assert shares.mean() > 0.8
    assert error(matrix, grid, again) < 1e-4 * float((matrix**2).sum())


def test_codes_of_steps_without_a_reciprocal_are_zero() -> None:
    """1 / 1e-39 is beyond float32."""
    parts = {"step": np.array([[1e-39, 0.5]], np.float32)}
    codes = nearest(np.array([[1e-39, -2e-39, 0.5, 1.0]], np.float32), GroupGrid(4, 2, step="float32"), parts)
    assert codes.tolist() == [[0, 0, 1, 2]]


@settings(deadline=None, max_examples=60)
@given(NUMBERS, st.sampled_from(["fixed", "code", "least"]), st.integers(-40, 0))
def test_steps_are_numbers_of_a_second_type_as_well(matrix: Floats, zero: Any, exponent: int) -> None:
    grid = GroupGrid(8, 32, zero, "bfloat16")
    numbers = np.ldexp(matrix, exponent)
    parts = fitted(numbers, grid, also="float16")
    for name in ("step", "least"):
        if name in parts:
            assert np.array_equal(representable(representable(parts[name], "float16"), "bfloat16"), parts[name])


@pytest.mark.parametrize("also", [None, "float16"])
@pytest.mark.parametrize("step", ["float16", "bfloat16"])
def test_the_smallest_numbers_of_float16_are_not_lost(step: Any, also: Any) -> None:
    """They are whole multiples of the least step that it has."""
    codes = np.random.default_rng(0).integers(-127, 128, (4, 64))
    matrix = (codes * 2.0**-24).astype(np.float32)
    grid = GroupGrid(8, 32, step=step)
    assert error(matrix, grid, fitted(matrix, grid, also=also)) == 0
    small = (codes * 2.0**-29).astype(np.float32)  # of which it has only a few
    assert error(small, grid, fitted(small, grid, also=also)) < 0.02 * float((small.astype(np.float64) ** 2).sum())
