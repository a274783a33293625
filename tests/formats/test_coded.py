"""Laws that every format keeps; a new format arrives here through `EXAMPLES`."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.errors import CorruptError
from pared.fitting.rounding.nearest import absmax_steps
from pared.formats import coded as formats
from pared.formats.coded import FORMATS, Coded, Float, Grid, Grouped, Raw, log_step
from pared.formats.groups.grid import GroupGrid
from pared.formats.streams import EncodedPart
from pared.formats.views import View

SHAPES = [(1, 1), (3, 5), (7, 1), (1, 64), (4, 3, 3, 3), (128, 33), (500, 80), (0, 4)]


def grid(
    codes: str, dimension: int = 0, adjust: Callable[[Tensor], Tensor] = Tensor.clone
) -> Callable[[Tensor], Coded]:
    def encode(w: Tensor) -> Coded:
        view = View(tuple(w.shape), (dimension,))
        fmt = Grid(codes)
        step = absmax_steps(w, view, fmt.limit) if w.numel() else torch.zeros(view.row_sizes)
        return fmt.encode(w, adjust(step), view)

    return encode


def largest(step: Tensor) -> Tensor:
    """One step for all rows, so that their codes spread differently."""
    return log_step(torch.full_like(step, step.max().item())) if step.numel() else step


def scaled(codes: str, dimension: int = 0) -> Callable[[Tensor], Coded]:
    """With scales from 1 / 4 to 4, all on the scale of steps."""

    def encode(w: Tensor) -> Coded:
        view = View(tuple(w.shape), (dimension,))
        scale = torch.exp2(torch.arange(view.n_columns) % 9 / 2 - 2).reshape(view.across.row_sizes)
        scale = log_step(scale * 0.999)
        even = w / view.across.spread(scale)
        fmt = Grid(codes, scaled=True)
        step = absmax_steps(even, view, fmt.limit) if w.numel() else torch.zeros(view.row_sizes)
        return fmt.encode(w, step, view, scale)

    return encode


def grouped(grid: GroupGrid, dimension: int = 0) -> Callable[[Tensor], Coded]:
    return lambda w: Grouped(grid).encode(w, view=View(tuple(w.shape), (dimension,)))


EXAMPLES: dict[str, tuple[Callable[[Tensor], Coded], float]] = {
    "grid int8": (grid("int8"), 1 / 127),
    "grid int16": (grid("int16"), 1 / 32767),
    "grid int8, scale": (grid("int8", adjust=log_step), 2 ** (1 / 8) / 127),
    "grid int16, scale, columns": (grid("int16", 1, log_step), 2 ** (1 / 8) / 32767),
    "grid int8, one step for all": (grid("int8", adjust=largest), 2 ** (1 / 8) / 127),
    "grid int8, scaled": (scaled("int8"), 16 / 127),
    "grid int16, scaled, of columns": (scaled("int16", 1), 16 / 32767),
    "groups, Q4_0": (grouped(GroupGrid(4, 32)), 1 / 3),
    "groups, Q4_K": (grouped(GroupGrid(4, 32, "least", nested=8, multiple_bits=6)), 1 / 3),
    "groups, Q6_K": (grouped(GroupGrid(6, 16, nested=16, multiple_bits=8, signed=True)), 1 / 12),
    "groups, int4 with a code for zero": (grouped(GroupGrid(4, 128, "code", step="bfloat16")), 1 / 3),
    "groups, MLX": (grouped(GroupGrid(4, 64, "least")), 1 / 3),
    "groups, int8 rows of columns": (grouped(GroupGrid(8, None, step="float32"), 1), 1 / 60),
    "float32": (Float("float32").encode, 0.0),
    "float16": (Float("float16").encode, 2.0**-10),
    "bfloat16": (Float("bfloat16").encode, 2.0**-7),
    "raw": (Raw("float32").encode, 0.0),
}


def values(shape: tuple[int, ...]) -> Tensor:
    """Gaussian, with a spread of its own for each row."""
    generator = torch.Generator().manual_seed(len(shape))
    spread = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator).exp()
    return torch.randn(shape, generator=generator) * spread


def test_every_format_has_an_example() -> None:
    assert {name.split()[0] for name in EXAMPLES} >= {"grid", "groups,", "float32", "raw"}
    assert {type(encode(values((2, 4))).format) for encode, _ in EXAMPLES.values()} == set(FORMATS.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
class TestEveryFormat:
    def test_decode_gives_back_shape_dtype_and_values(self, name: str, shape: tuple[int, ...]) -> None:
        encode, error = EXAMPLES[name]
        w = values(shape)
        decoded = encode(w).decode()
        assert decoded.dtype == w.dtype
        assert decoded.shape == w.shape
        bound = error * w.abs().amax() * 0.5001 if w.numel() else torch.tensor(0.0)
        assert bool(((decoded - w).abs() <= bound).all())

    def test_nbytes_is_what_is_stored(self, name: str, shape: tuple[int, ...]) -> None:
        coded = EXAMPLES[name][0](values(shape))
        assert coded.nbytes == sum(len(part.payload) for part in coded.format.streams(coded).values())

    def test_streams_come_back_bit_for_bit(self, name: str, shape: tuple[int, ...]) -> None:
        coded = EXAMPLES[name][0](values(shape))
        parts = coded.format.parts(coded.format.streams(coded), shape, coded.view)
        assert parts.keys() == coded.parts.keys()
        assert all(torch.equal(parts[key], coded.parts[key]) for key in parts)

    def test_json_round_trip(self, name: str, shape: tuple[int, ...]) -> None:
        fmt = EXAMPLES[name][0](values(shape)).format
        assert formats.from_json(json.loads(json.dumps(fmt.to_json())), "float32") == fmt
        assert eval(repr(fmt), {cls.__name__: cls for cls in (*FORMATS.values(), GroupGrid)}) == fmt

    def test_a_part_of_the_wrong_length_is_refused(self, name: str, shape: tuple[int, ...]) -> None:
        coded = EXAMPLES[name][0](values(shape))
        streams = coded.format.streams(coded)
        for key, part in streams.items():
            longer = replace(part, payload=bytes(part.payload) + b"\0")
            with pytest.raises(CorruptError):
                coded.format.parts(streams | {key: longer}, shape, coded.view)


@settings(deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.sampled_from(["int8", "int16"]),
)
def test_a_grid_is_recovered_exactly_from_its_values(numbers: list[float], codes: str) -> None:
    """What the quantized model rests on: round(value / step) is the code."""
    w = torch.tensor([numbers])
    coded = grid(codes)(w)
    assert isinstance(coded.format, Grid)
    again = coded.format.encode(coded.decode(), coded.parts["step"], coded.view)
    assert torch.equal(again.parts["codes"], coded.parts["codes"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", ["int8", "int16"])
def test_half_sources_keep_their_type_and_their_values(dtype: torch.dtype, codes: str) -> None:
    w = values((16, 32)).to(dtype)
    coded = grid(codes)(w)
    decoded = coded.decode()
    assert decoded.dtype == dtype
    assert isinstance(coded.format, Grid)
    again = coded.format.encode(decoded, coded.parts["step"], coded.view)
    assert torch.equal(again.decode(), decoded)


def test_rows_of_zeros_decode_to_zeros() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert torch.equal(grid("int8")(w).decode()[0], torch.zeros(2))


def test_negative_or_infinite_steps_are_refused() -> None:
    coded = grid("int8")(values((2, 4)))
    streams = coded.format.streams(coded)
    for bad in (-1.0, float("nan"), float("inf")):
        streams["step"] = EncodedPart(torch.tensor([1.0, bad]).numpy().tobytes())
        with pytest.raises(CorruptError, match="a step is negative or not finite"):
            coded.format.parts(streams, (2, 4), coded.view)


def test_a_part_of_the_wrong_length_says_what_is_needed() -> None:
    coded = Float("float32").encode(values((2, 4)))
    with pytest.raises(CorruptError) as error:
        coded.format.parts({"values": EncodedPart(b"12345")}, (2, 4), None)
    assert error.value.what == "a part holds 5 bytes where its shape [2, 4] needs 32"


def test_the_examples_store_grids_in_all_ways() -> None:
    """Else the laws above would hold of less than they say."""
    coded = [encode(values((500, 80))) for name, (encode, _) in EXAMPLES.items() if name.startswith("grid")]
    stored = [c.format.streams(c) for c in coded]
    assert {"codes" in parts for parts in stored} == {True, False}
    assert {parts["step"].base is None for parts in stored} == {True, False}


@pytest.mark.parametrize("dtype", formats.RAW_TYPES.values(), ids=str)
def test_raw_is_exact_for_every_type(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    coded = Raw(formats.dtype_name(dtype)).encode(tensor)
    parts = coded.format.parts(coded.format.streams(coded), (2, 2), None)
    assert parts["values"].dtype == dtype
    assert torch.equal(parts["values"], tensor)


def test_float16_survival_is_judged_value_by_value() -> None:
    assert formats.survives_float16(torch.tensor([0.0, 1.0, -65504.0]))
    assert not formats.survives_float16(torch.tensor([1.0, 65520.0 * 2]))  # overflows
    assert not formats.survives_float16(torch.tensor([1.0, 1e-6]))  # subnormal in float16: too coarse
    many = torch.ones(1000, 600, dtype=torch.bfloat16)
    assert formats.survives_float16(many.t())
    many[-1, -1] = 1e-6
    assert not formats.survives_float16(many)  # whichever piece it is in
    assert formats.survives_float16(torch.tensor(0.5))
