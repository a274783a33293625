"""Levels: counted where there are some, and none found where there are none."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.inspection.findings.levels import grid_of


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(3, 256),
    st.sampled_from(["row", "group of 32", "group of 64", "group of 128"]),
    st.booleans(),
)
def test_levels_are_counted(seed: int, levels: int, per: str, zero_point: bool) -> None:
    random = np.random.default_rng(seed)
    size = 512 if per == "row" else int(per.split()[-1])
    codes = random.integers(0, levels, (32 * 512 // size, size))
    codes[:, :2] = 0, levels - 1
    step = random.uniform(1e-4, 1, (len(codes), 1)).astype(np.float32)
    offset = random.normal(size=step.shape) if zero_point else -(levels // 2)
    weights = ((codes + offset) * step).astype(np.float32).reshape(32, 512)
    grid = grid_of(weights, "float32")
    assert grid is not None
    assert (grid.levels, grid.per) == (levels, per)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "uniform", "laplace", "standard_cauchy"]))
def test_numbers_of_no_grid_have_none(seed: int, distribution: str) -> None:
    weights = getattr(np.random.default_rng(seed), distribution)(size=(32, 256)).astype(np.float32)
    assert grid_of(weights, "float32") is None
    bfloat16 = (weights.view(np.uint32) >> 16).astype(np.uint16)
    assert grid_of(bfloat16, "bfloat16") is None
    assert grid_of(weights.clip(-65504, 65504).astype(np.float16), "float16") is None
