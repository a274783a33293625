"""Laws of a grid's bytes: steps on the scale, codes by classes of rows; slow references of both."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import CorruptError, ParedError
from pared.formats import entropy, streams
from pared.formats.coded import log_step
from pared.formats.entropy import Codes, Coding
from pared.formats.streams import STEP_INDEXES, EncodedPart, decode_codes, decode_steps, encode_codes, encode_steps
from pared.formats.views import View, first_dimension, single_row

MANTISSAS = (0x000000, 0x0B95C2, 0x1837F0, 0x25FED7, 0x3504F3, 0x45672A, 0x5744FD, 0x6AC0C7)
SCALE = np.array([(e + 127) << 23 | m for e in range(-126, 128) for m in MANTISSAS], np.uint32).view(np.float32)

sizes = st.floats(0, float(SCALE[-1]), width=32)
members = st.integers(0, len(SCALE) - 1).map(lambda i: float(SCALE[i]))


def test_the_scale_is_eighths_of_octaves() -> None:
    exact = np.array([2.0 ** (k / 8) for k in STEP_INDEXES], np.float64)
    assert np.array_equal(SCALE, exact.astype(np.float32))
    assert len(SCALE) == len(STEP_INDEXES)


@settings(deadline=None)
@given(st.lists(sizes | members, max_size=20))
def test_a_step_is_raised_to_the_next_of_the_scale(values: list[float]) -> None:
    steps = torch.tensor(values, dtype=torch.float32)
    raised = log_step(steps)
    expected = [0.0 if step == 0 else float(SCALE[np.float32(step) <= SCALE][0]) for step in values]
    assert raised.tolist() == expected
    assert torch.equal(log_step(raised), raised)


def test_steps_keep_their_shape() -> None:
    assert log_step(torch.ones(2, 3)).shape == (2, 3)
    assert log_step(torch.tensor(0.3)).shape == ()
    assert log_step(torch.ones(0)).dtype == torch.float32


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 3.2e38])
def test_what_has_no_place_on_the_scale_is_refused(bad: float) -> None:
    with pytest.raises(ParedError) as error:
        log_step(torch.tensor([1.0, bad]))
    assert error.value.what == "a step is negative, NaN or above 3.12e+38"


def same_bits(a: Any, b: Any) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all()) and a.shape == b.shape


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0]) | members | sizes, max_size=12), st.booleans())
def test_any_steps_come_back_bit_for_bit(values: list[float], on_scale: bool) -> None:
    steps = np.array(values, np.float32)
    if on_scale:
        steps = streams.ceiling(steps)
    part = encode_steps(steps)
    if part.base is None:
        assert part.coding is None
        assert same_bits(np.frombuffer(part.payload, "<f4"), steps)
    else:
        assert same_bits(decode_steps(part, len(steps)), steps)
        assert same_bits(reference_steps(part, len(steps)), steps)
        assert len(part.payload) <= len(steps)


def reference_steps(part: EncodedPart, count: int) -> Any:
    """As the specification says it."""
    differences = entropy.decode(part.payload, part.coding, count, np.int8)
    assert part.base is not None
    found = [0.0 if d == -128 else SCALE[STEP_INDEXES.index(part.base + int(d))] for d in differences]
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("indexes", "base"),
    [
        ([5], 5),
        ([0, 254], 127),
        ([0, 0, 0, 254], 127),
        ([-1008, -1008], -1008),
        ([1023, 1023, 1000], 1023),
        ([0, 255], None),
    ],
)
def test_steps_are_coded_that_are_within_reach_of_a_base(indexes: list[int], base: int | None) -> None:
    steps = SCALE[[STEP_INDEXES.index(i) for i in indexes]]
    assert encode_steps(steps).base == base
    assert encode_steps(np.append(np.float32(0), steps)).base == base


@pytest.mark.parametrize("odd", [1.09, 1e-40, -0.0, float("inf"), float("nan"), -1.0, 3.2e38])
def test_a_single_step_off_the_scale_makes_all_plain(odd: float) -> None:
    steps = np.array([1, 0, odd], np.float32)
    assert encode_steps(steps) == EncodedPart(steps.tobytes())


def test_equal_steps_take_no_bytes() -> None:
    assert encode_steps(np.full((3, 5), 0.25, np.float32)) == EncodedPart(b"", Coding(constant=0), base=-16)
    assert encode_steps(np.zeros(3, np.float32)) == EncodedPart(b"", Coding(constant=-128), base=0)
    assert encode_steps(np.zeros(0, np.float32)) == EncodedPart(b"")


HOSTILE_STEPS = {
    "above": (EncodedPart(b"\x01\x00", base=1023), "a step is beyond the scale of steps"),
    "below": (EncodedPart(b"\x00\xff", base=-1008), "a step is beyond the scale of steps"),
    "short": (EncodedPart(b"\x00", base=0), "2 plain int8 codes take 2 bytes, not 1"),
    "constant with bytes": (
        EncodedPart(b"\x00", Coding(constant=0), base=0),
        "1 bytes cannot stand for 2 int8 codes that are all 0",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_STEPS)
def test_hostile_steps_are_refused(kind: str) -> None:
    part, words = HOSTILE_STEPS[kind]
    with pytest.raises(CorruptError) as error:
        decode_steps(part, 2)
    assert error.value.what == words


# --- codes


@st.composite
def grids(draw: st.DrawFn) -> tuple[Codes, View]:
    """Rows of a few spreads, in any dimensions of the tensor; some of them enough to be worth classes."""
    split = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 8, 40, 90]), min_size=1, max_size=4)))
    rows = tuple(i for i in range(len(split)) if draw(st.booleans()))
    view = View(split if math.prod(split) < 200_000 else (7, 5), rows if math.prod(split) < 200_000 else (1,))
    kind = draw(st.sampled_from(["int8", "int16"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spreads = rng.choice(
        draw(st.lists(st.sampled_from([0, 0.3, 2, 20, 500, 30000]), min_size=1, max_size=4)), view.n_rows
    )
    limits = np.iinfo(kind)
    matrix = (rng.laplace(size=(view.n_rows, view.n_columns)) * spreads[:, None]).round().clip(limits.min, limits.max)
    return view.restore(torch.from_numpy(matrix), view.split).numpy().astype(kind), view


@settings(deadline=None, max_examples=150)
@given(grids())
@pytest.mark.slow
def test_any_codes_come_back_and_take_no_more_than_one_stream(grid: tuple[Codes, View]) -> None:
    codes, view = grid
    parts = encode_codes(codes, view)
    assert sum(len(part.payload) for part in parts.values()) <= entropy.cost(codes)
    decoded = decode_codes(parts, codes.shape, view, codes.dtype)
    assert decoded.dtype == codes.dtype
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    assert np.array_equal(decoded, codes)
    assert reference_codes(parts, view, str(codes.dtype)) == view.matrix(torch.from_numpy(codes)).tolist()


def reference_codes(parts: Mapping[str, EncodedPart], view: View, kind: str) -> list[list[int]]:
    """The rows, taken one by one from the stream of their class."""
    if "codes" in parts:
        whole = entropy.decode(parts["codes"].payload, parts["codes"].coding, math.prod(view.split), kind)
        rows: list[list[int]] = view.matrix(torch.from_numpy(whole)).tolist()
        return rows
    classes = entropy.decode(parts["classes"].payload, parts["classes"].coding, view.n_rows, np.int8)
    left = [
        entropy.decode(part.payload, part.coding, part.rows * view.n_columns, kind).tolist()
        for part in parts.values()
        if part.rows is not None
    ]
    found = []
    for number in classes:
        found.append(left[number][: view.n_columns])
        del left[number][: view.n_columns]
    assert not any(left)
    return found


def spread_out(rows: int, columns: int) -> Codes:
    rng = np.random.default_rng(0)
    spreads = np.exp2(rng.uniform(-2, 5, rows))[:, None]
    codes: Codes = rng.normal(0, spreads, (rows, columns)).round().clip(-127, 127).astype(np.int8)
    return codes


def test_rows_of_different_spreads_are_coded_apart_and_others_together() -> None:
    codes = spread_out(500, 300)
    parts = encode_codes(codes, first_dimension(codes.shape))
    assert list(parts) == ["classes", *(f"codes {i}" for i in range(8))]
    assert sum(part.rows or 0 for part in parts.values()) == 500
    assert sum(len(part.payload) for part in parts.values()) < 0.9 * entropy.cost(codes)
    assert list(encode_codes(codes, single_row(codes.shape))) == ["codes"]
    assert list(encode_codes(codes, View(codes.shape, (1,)))) == ["codes"]  # the columns are all alike
    assert list(encode_codes(codes[:8, :8], first_dimension((8, 8)))) == ["codes"]  # too few to pay for tables


def test_rows_that_are_all_zero_take_no_bytes_but_their_class() -> None:
    codes = spread_out(400, 100)
    codes[::2] = 0
    parts = encode_codes(codes, first_dimension(codes.shape))
    assert parts["codes 0"] == EncodedPart(b"", Coding(constant=0), rows=200)


def test_the_division_into_classes_is_the_cheapest() -> None:
    """Against all divisions there are."""
    costs = np.random.default_rng(0).uniform(1, 9, (10, 10))
    costs[np.tril_indices(10)] = np.inf
    for count, (cost, division) in streams._divisions(costs).items():
        every = {
            cuts: sum(costs[a, b] for a, b in itertools.pairwise((0, *cuts, 9)))
            for cuts in itertools.combinations(range(1, 9), count - 1)
        }
        assert cost == pytest.approx(min(every.values()))
        assert every[tuple(division.tolist())] == pytest.approx(cost)


@pytest.mark.parametrize("magnitude", [0.001, 0.3, 4.0, 90.0, 9000.0])
def test_the_model_of_a_class_is_the_entropy_of_a_geometric_distribution(magnitude: float) -> None:
    ratio = magnitude / (1 + math.sqrt(1 + magnitude**2))
    codes = np.arange(-400_000, 400_001)
    shares = (1 - ratio) / (1 + ratio) * ratio ** np.abs(codes)
    shares = shares[shares > 1e-300]
    rows, columns = 4, 50
    costs = streams._costs(np.array([0, round(rows * columns * magnitude * 1000)]), np.array([0, rows]), columns * 1000)
    assert costs[0, 1] == pytest.approx(-rows * columns * 1000 * (shares * np.log2(shares)).sum(), rel=1e-4)


def test_classes_that_are_not_as_large_as_said_are_refused() -> None:
    codes = spread_out(500, 300)
    parts = encode_codes(codes, first_dimension(codes.shape))
    classes = entropy.decode(parts["classes"].payload, parts["classes"].coding, 500, np.int8)
    swapped = np.where(classes == 0, 1, classes).astype(np.int8)
    beyond = np.where(classes == 7, 8, classes).astype(np.int8)
    negative = np.where(classes == 7, -1, classes).astype(np.int8)
    for wrong in (swapped, beyond, negative):
        stream = entropy.encode(wrong)
        with pytest.raises(CorruptError) as error:
            decode_codes(
                parts | {"classes": EncodedPart(stream.payload, stream.coding)},
                (500, 300),
                View((500, 300), (0,)),
                "int8",
            )
        assert error.value.what == "the classes of its rows differ in size from what its index says"
