"""Grids without torch: the same codes and steps as with it; tensors that lie on a grid already."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.checkpoints.rates import steps_at_level, steps_at_rate
from pared.fitting.rounding.nearest import nearest
from pared.formats import grids
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.entropy import cost
from pared.formats.exact_grids import find_exact_grid
from pared.formats.views import View

FLOATS = ["float32", "float16", "bfloat16", "float64"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_array(tensor: torch.Tensor) -> Array:
    """As a listing would give it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ELEMENTS["bfloat16"])
    return tensor.numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_bits_are_those_of_fit(dtype: str, threads: int) -> None:
    tensor = (drawn(300, 700) * torch.logspace(-4, 2, 300)[:, None]).to(getattr(torch, dtype))
    tensor[17] = 0
    coded = nearest(tensor, 8, View((300, 700), (0,)))
    matrix = as_array(tensor)
    step = grids.finest_steps(grids.magnitudes(matrix, threads), "int8")
    codes = grids.encode(matrix, step, "int8", threads)
    assert np.array_equal(step, coded.parts["step"].numpy())
    assert np.array_equal(codes, coded.parts["codes"].numpy())


def test_a_row_longer_than_a_block_has_one_step() -> None:
    row = drawn(1, 1 << 18)
    row[0, -1] = 40
    assert grids.magnitudes(row.numpy(), 2).tolist() == [40]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_narrowing_is_that_of_torch(values: list[float]) -> None:
    wide = np.array(values, np.float32)
    for dtype in FLOATS:
        expected = as_array(torch.from_numpy(wide).to(getattr(torch, dtype)))
        assert np.array_equal(converted(wide, ELEMENTS[dtype]), expected)


def test_nan_stays_nan() -> None:
    assert np.isnan(converted(np.array([np.nan], np.float32), ELEMENTS["bfloat16"])).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5.5, 7, 10, 14])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_is_met(bits: float, dtype: str) -> None:
    matrix = as_array((drawn(400, 300) * torch.linspace(0.5, 1, 400)[:, None]).to(getattr(torch, dtype)))
    kind: grids.CodeType = "int8" if bits <= 8 else "int16"
    finest = grids.finest_steps(grids.magnitudes(matrix), kind)
    step = steps_at_rate(matrix, bits, finest, kind)
    rate = 8 * cost(grids.encode(matrix, step, kind)) / matrix.size
    assert bits - 0.06 < rate < bits + 0.02


def test_where_the_finest_step_takes_less_it_stays() -> None:
    matrix = np.zeros((20, 50), np.float32)
    matrix[:, 0] = 1
    finest = grids.finest_steps(grids.magnitudes(matrix), "int8")
    assert steps_at_rate(matrix, 6, finest, "int8") is finest


def test_steps_between_two_of_the_scale_are_mixed() -> None:
    step = steps_at_level(-8.25, np.full(400, 1e-9, np.float32))
    values, counts = np.unique(step, return_counts=True)
    assert len(values) == 2
    assert 95 <= counts[0] <= 105  # a quarter of the rows has the next finer one
    assert values[1] == 0.5


# --- exact grids


def quantized(tensor: torch.Tensor, step: torch.Tensor, limit: int) -> torch.Tensor:
    return (tensor / step).round().clamp(-limit, limit) * step


def decoded(array: Array, bits: float = 8) -> torch.Tensor | None:
    found = find_exact_grid(array, bits)
    if found is None:
        return None
    spread = [n if i in found.view.rows else 1 for i, n in enumerate(found.view.split)]
    values = found.codes.reshape(found.view.split).astype(np.float32) * found.step.reshape(spread)
    return torch.from_numpy(values.reshape(array.shape))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("limit", [127, 7])
@pytest.mark.parametrize("scope", ["row", "tensor", "column", "group"])
def test_a_grid_is_found_again(dtype: str, limit: int, scope: str) -> None:
    if dtype == "bfloat16" and limit == 127 and scope in ("tensor", "group"):
        pytest.skip("bfloat16 has no more digits than these codes: with few or many numbers the step stays unknown")
    tensor = drawn(96, 256)
    view = tensor.reshape(96, 8, 32) if scope == "group" else tensor
    largest = {"row": 1, "column": 0, "group": 2}.get(scope)
    step = (view.abs().amax() if largest is None else view.abs().amax(largest, keepdim=True)) / limit
    source = quantized(view, step, limit).reshape(96, 256).to(getattr(torch, dtype))
    found = decoded(as_array(source))
    assert found is not None
    assert torch.equal(found.to(source.dtype), source)


def test_a_grid_with_a_zero_point_is_found() -> None:
    tensor = drawn(64, 500) + 1
    step = (tensor.amax(1, keepdim=True) - tensor.amin(1, keepdim=True)) / 255
    source = (tensor / step).round() * step
    found = decoded(source.numpy())
    assert found is not None
    assert torch.equal(found, source)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ordinary_weights_are_on_no_grid(dtype: str) -> None:
    assert find_exact_grid(as_array(drawn(64, 256).to(getattr(torch, dtype))), 8) is None


def test_one_number_off_the_grid_is_enough() -> None:
    source = quantized(drawn(64, 300), torch.tensor(0.03), 127)
    assert find_exact_grid(source.numpy(), 8) is not None
    source[40, 211] += 0.001
    assert find_exact_grid(source.numpy(), 8) is None


def test_a_grid_that_takes_more_bits_is_left_alone() -> None:
    source = quantized(drawn(64, 300), torch.tensor(0.03), 127)
    assert find_exact_grid(source.numpy(), 4) is None


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 70),
    st.integers(1, 255),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.integers(0, 99),
)
def test_what_is_found_is_exact(rows: int, columns: int, levels: int, step: float, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-levels, levels + 1, (rows, columns))
    source = codes.astype(np.float32) * np.float32(step)
    found = decoded(source)
    assert found is None or np.array_equal(found.numpy(), source)
