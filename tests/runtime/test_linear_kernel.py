"""The linear kernel against its reference, on odd sizes, layouts and types."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import ModelError
from pared.formats.activation import Range
from pared.runtime.kernels import conv, linear
from pared.runtime.kernels.fbgemm import rows as few
from tests.runtime import reference
from tests.runtime.inputs import SPAN, TOLERANCE, assert_same, needs_kernels, random, random_codes, random_step

LEADING = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (2, 50)]
NOTHING = 1e-30  # below that a product is no number that anybody reads


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
    for row, expected in zip(x, together, strict=True):
        alone = linear.dynamic(row, packed)
        assert alone.shape == expected.shape
        assert float((alone - expected).abs().max()) <= TOLERANCE * max(float(expected.abs().max()), NOTHING)


@needs_kernels
@pytest.mark.parametrize("outputs", [1, 5, 48])
@pytest.mark.parametrize("count", [1, 2, few.MOST_ROWS, few.MOST_ROWS + 1])
def test_few_rows_give_what_many_give(count: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, step, bias = random_codes(outputs, 130), random_step(outputs), random(outputs, seed=3)
    x = random(count, 130) * 10 ** random(count, 1, seed=4)
    found = linear.dynamic(x, linear.pack(codes, step), bias)
    monkeypatch.setattr(few, "available", lambda: False)
    for got, expected in zip(found, linear.dynamic(x, linear.pack(codes, step), bias), strict=True):
        assert_same(got, expected, 4 * TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("count", [1, 5])
def test_few_rows_leave_a_range_as_many_do(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outliers, codes = ((7, 3), (3, -4), (3, 5)), random_codes(48, 130)
    packed = linear.pack(codes, random_step(48), outliers)
    x = random(count, 130) * 2
    x[:, 7] *= 9
    x[:, 3] *= -9
    found = linear.static(x, packed, None, SPAN, outliers)
    monkeypatch.setattr(few, "available", lambda: False)
    assert_same(found, linear.static(x, packed, None, SPAN, outliers))


@needs_kernels
def test_joined_weights_are_those_of_their_parts() -> None:
    parts, outliers = [random_codes(5, 20), random_codes(3, 20, seed=7)], ((2, 1),)
    joined = linear.joined(parts, random_step(8), outliers)
    whole = linear.pack(torch.cat(parts), random_step(8), outliers)
    for x in (random(1, 20), random(few.MOST_ROWS + 1, 20)):
        assert torch.equal(
            linear.static(x, joined, None, SPAN, outliers), linear.static(x, whole, None, SPAN, outliers)
        )
    assert torch.equal(joined.codes(), whole.codes())


@needs_kernels
def test_a_weight_is_packed_for_the_kernels_that_run() -> None:
    packed = linear.pack(random_codes(5, 9), random_step(5))
    linear.dynamic(random(1, 9), packed)
    assert ("weight" in vars(packed)) != few.available()
    linear.dynamic(random(few.MOST_ROWS + 1, 9), packed)
    assert "weight" in vars(packed)


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
        assert [bool(linear.dynamic(row, packed, bias).isfinite().all()) for row in x] == [True, False, False, True]
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
