"""Columns that leave a layer's range: what is beyond it goes on in extra columns."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pared
from pared import CorruptError, ModelError, PostTrainingQuantConfig
from pared.fitting.calibration.observe import collect
from pared.fitting.calibration.ranges import COLUMNS_EACH, without_outliers
from pared.formats.activation import Activation, Outliers, Range
from pared.model.storage import from_bytes, to_bytes
from pared.model.tensors import find_tensors
from pared.runtime import quantized
from pared.runtime.kernels import linear
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.linear import pack, static
from pared.runtime.kernels.outliers import columns_of, extra_columns
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.record import contents_of
from tests.runtime import reference

numbers = st.floats(-1e4, 1e4, width=32)
ranges = st.tuples(st.floats(-9, 0, width=32), st.floats(0, 9, width=32)).filter(lambda r: r[1] - r[0] > 1e-3)
levels = st.sampled_from([127, 255])
pairs = st.tuples(st.integers(0, 3), st.integers(-3, 3).filter(bool))


def unique(outliers: list[tuple[int, int]]) -> Outliers:
    """At most one entry for each side of a column."""
    return tuple({(column, count > 0): (column, count) for column, count in outliers}.values())


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=9), ranges, levels, st.lists(pairs))
@settings(deadline=None)
@pytest.mark.slow
def test_the_codes_equal_the_reference_bit_for_bit(
    rows: list[list[float]], ends: tuple[float, float], top: int, found: list[tuple[int, int]]
) -> None:
    outliers = unique(found)
    more = extra_columns(outliers, Range(*ends), top)
    x = torch.tensor([*rows, [torch.inf, -torch.inf, torch.nan, 3e38]])
    codes = more.codes(x)
    assert codes.shape == (len(x), len(columns_of(outliers)))
    assert torch.equal(codes, reference.extra_codes(more, x))


@given(st.lists(numbers, min_size=1, max_size=9), ranges, levels, st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_all_columns_together_reach_as_many_ranges_further(
    values: list[float], ends: tuple[float, float], top: int, above: int, below: int
) -> None:
    span = Range(*ends)
    scale, zero_point = span.grid(top)
    outliers = unique([(0, n) for n in (above, -below) if n])
    x = torch.tensor(values)[:, None]
    codes = torch.cat([quantize(x, scale, zero_point, top), extra_columns(outliers, span, top).codes(x)], 1)
    total = (codes.double() - zero_point).sum(1)
    # In steps, one rounding for all: the grid is as fine as without outliers, and longer.
    nearest = torch.round(x[:, 0].double() * float(torch.tensor(1.0 / scale)))
    wanted = nearest.clamp(-zero_point * (1 + below), (top - zero_point) * (1 + above))
    assert float((total - wanted).abs().max()) <= 1, "halves may go to either side"


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_equals_its_reference(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, 70, generator=generator).to(dtype)
    x[..., 3] = 8
    codes = torch.randint(-127, 128, (33, 70), generator=generator).to(torch.int8)
    step, bias = torch.rand(33, generator=generator) * 0.01, torch.randn(33, generator=generator)
    outliers, span = ((3, 2), (3, -1), (69, -2)), Range(-2.0, 3.0)
    packed = pack(codes, step, outliers)
    found = static(x, packed, bias, span, outliers)
    expected = reference.linear(x, codes, step, bias, span=span, outliers=outliers, levels=packed.levels)
    assert (found.dtype, found.shape) == (dtype, (*leading, 33))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, reference.linear(x, codes, step, bias, span=span, levels=packed.levels), atol=0.1)


@pytest.mark.parametrize(("there", "width"), [(False, 76), (True, 128)])
def test_columns_are_filled_up_to_what_an_instruction_takes(
    there: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_tiles", lambda: there)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (33, 70), generator=generator).to(torch.int8)
    step, outliers, span = torch.full((33,), 0.01), ((3, 2), (3, -1), (69, -2)), Range(-2.0, 3.0)
    packed = pack(codes, step, outliers)
    assert packed.width == width
    assert pack(codes, step).width == 70, "what has no extra columns need not be copied"
    x = torch.randn(5, 70, generator=generator) * 2
    expected = reference.linear(x, codes, step, span=span, outliers=outliers, levels=packed.levels)
    torch.testing.assert_close(static(x, packed, None, span, outliers), expected)


def test_an_outlier_that_is_no_column_is_refused() -> None:
    with pytest.raises(ModelError, match="an outlier lies outside the 4 columns"):
        pack(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2), ((4, 1),))


columns = st.lists(st.tuples(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32)), min_size=1, max_size=5)


@given(columns, st.integers(0, 4))
@settings(deadline=None)
def test_a_narrowed_range_holds_every_column(found: list[tuple[float, float]], more: int) -> None:
    lows = torch.tensor([min(pair) for pair in found] * (COLUMNS_EACH if more else 1))
    highs = torch.tensor([max(pair) for pair in found] * (COLUMNS_EACH if more else 1))
    low, high, outliers = without_outliers(lows, highs)
    assert low <= 0 <= high
    assert sum(abs(count) for _, count in outliers) <= len(lows) // COLUMNS_EACH
    reach = {(column, count > 0): abs(count) for column, count in outliers}
    for column in range(len(lows)):
        assert float(lows[column]) >= low * (1 + reach.get((column, False), 0)) - 1e-9
        assert float(highs[column]) <= high * (1 + reach.get((column, True), 0)) + 1e-9


def test_the_narrowest_range_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    lows, highs = -torch.rand(96, generator=generator), torch.rand(96, generator=generator)
    highs[7], highs[40], lows[40] = 3.0, 2.0, -5.0
    low, high, outliers = without_outliers(lows, highs)

    def needed(one: float, other: float) -> int:
        above, below = (highs / other).ceil() - 1, (lows / one).ceil() - 1
        return int(above.clamp(min=0).sum() + below.clamp(min=0).sum())

    shares = [2.0 ** (-i / 16) for i in range(97)]
    every = itertools.product((-5.0 * a for a in shares), (3.0 * b for b in shares))
    assert high - low == pytest.approx(min(b - a for a, b in every if needed(a, b) <= 96 // COLUMNS_EACH))
    assert {column for column, _ in outliers} <= {7, 40}


class Wild(nn.Module):
    """One column of the second layer's input is a hundred times as large as the others, for one sample in eight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.first(x))
        out: Tensor = self.second(hidden)
        return out


def wild() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Wild().eval(), torch.randn(64, 64)
    with torch.no_grad():
        model.first.weight[9] = 0
        model.first.weight[9, 0] = 60
    x[:, 0] = (torch.arange(64) % 8 == 0).float()
    return model, x


def loss(model: nn.Module, exact: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = exact(x)
        return float((model(x) - expected).square().sum() / expected.square().sum())


def test_one_column_does_not_make_the_grid_of_all_coarse(tmp_path: Any) -> None:
    model, x = wild()
    q = pared.fit(model, PostTrainingQuantConfig(approach="static", quant_level=0), [x], quiet=True)
    contents = contents_of(q)
    activation = contents.activations["second"]
    assert {column for column, _ in activation.outliers} >= {9}
    assert activation.high < 10
    plain = {**contents.activations, "second": Activation("static", activation.low, 60.0)}
    coarse = quantized.assemble(find_tensors(model), replace(contents, activations=plain), Profile(this_machine()))
    assert loss(q, model, x) < 0.2 * loss(coarse, model, x)
    loaded = pared.load(pared.save(q, tmp_path), model=wild()[0])
    assert contents_of(loaded).activations == contents.activations
    with torch.no_grad():
        assert torch.equal(loaded(x), q(x))


def test_statistics_have_a_range_for_each_column_of_a_linear_layer_only() -> None:
    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.flip(-1), self.weight, self.bias)

    model = nn.Sequential(nn.Conv1d(4, 64, 1), nn.Linear(8, 8), Turned(8, 8))
    batches = [torch.randn(3, 4, 8) for _ in range(3)]
    seen = collect(model, batches, 99).inputs
    with torch.no_grad():
        expected = torch.cat([model[0](one) for one in batches]).reshape(-1, 8)
    assert [seen[name].lows for name in "02"] == [None, None], "no column of its own input"
    for found, wanted in ((seen["1"].lows, expected.amin(0)), (seen["1"].highs, expected.amax(0))):
        assert found is not None
        assert torch.equal(found, wanted)
    assert (seen["1"].low, seen["1"].high) == (float(expected.min()), float(expected.max()))


def bytes_with(outliers: Any) -> bytes:
    model, x = wild()
    contents = contents_of(pared.fit(model, PostTrainingQuantConfig(approach="static", quant_level=0), [x], quiet=True))
    to_json = Activation.to_json
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(Activation, "to_json", lambda self: to_json(self) | {"outliers": outliers})
        return to_bytes(contents)
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("outliers", "message"),
    [
        (7, "the outliers of module 'first' is not a list"),
        ([7], "an outlier of module 'first' is not a list"),
        ([[1]], "an outlier of module 'first' is not a column and a number of ranges"),
        ([[1, 0]], "an outlier of module 'first' is not a column and a number of ranges"),
        ([[-1, 1]], "an outlier of module 'first' is not a column and a number of ranges"),
        ([[1, 1.5]], "an outlier of module 'first' is not a column and a number of ranges"),
        ([[True, 1]], "an outlier of module 'first' is not a column and a number of ranges"),
        ([[1, 10**9]], "64 columns of 'weight' would get 1,000,000,000 extra ones"),
        ([[64, 1]], "outliers of its input are not columns of 'weight'"),
        ([[1, 1], [1, 2]], "module 'first' has the outlier 1 twice"),
        ([[1, 65]], "64 columns of 'weight' would get 65 extra ones"),
    ],
)
def test_hostile_outliers_are_refused(outliers: Any, message: str) -> None:
    with pytest.raises((CorruptError, pared.UnsafeError)) as error:
        from_bytes(bytes_with(outliers))
    assert message in str(error.value)
