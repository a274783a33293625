"""The bytes of grids with groups: they come back bit for bit, and what the grid does not have is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pared.errors import CorruptError
from pared.formats.groups import stored
from pared.formats.groups.decoding import decoded
from pared.formats.groups.grid import GroupGrid, representable
from pared.formats.groups.search import nearest
from pared.formats.streams import EncodedPart
from pared.formats.views import View
from tests.formats.groups.grids import GRIDS, random_parts

SHAPES = [(5, 300), (1, 1), (3, 256), (0, 4), (3, 0)]
pytestmark = pytest.mark.parametrize("name", GRIDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAnyNumbers:
    def test_bytes_come_back(self, name: str, shape: tuple[int, int]) -> None:
        parts, view = random_parts(GRIDS[name], *shape), View(shape, (0,))
        found = stored.streams(GRIDS[name], parts, view)
        assert list(found) == sorted(found)  # the order of the data is that of the names
        back = stored.parts(GRIDS[name], found, shape, view)
        assert back.keys() == parts.keys()
        for part in parts:
            np.testing.assert_array_equal(back[part], parts[part])
            assert back[part].dtype == parts[part].dtype

    def test_torch_decodes_the_same_numbers(self, name: str, shape: tuple[int, int]) -> None:
        parts = random_parts(GRIDS[name], *shape)
        tensors = {part: torch.from_numpy(numbers) for part, numbers in parts.items()}
        np.testing.assert_array_equal(decoded(GRIDS[name], tensors["codes"], tensors), GRIDS[name].decode(parts))

    def test_codes_are_recovered_from_what_they_decode_to(self, name: str, shape: tuple[int, int]) -> None:
        """What a quantized model that holds floats rests on."""
        grid, parts = GRIDS[name], random_parts(GRIDS[name], *shape)
        values = grid.decode(parts)
        again = nearest(values, grid, parts)
        np.testing.assert_array_equal(grid.decode({**parts, "codes": again}), values)
        some = np.broadcast_to(grid.by_column(grid.steps(parts), shape[1]) != 0, shape)
        np.testing.assert_array_equal(again[some], parts["codes"][some])

    def test_a_group_without_a_step_has_the_code_that_says_nothing(self, name: str, shape: tuple[int, int]) -> None:
        grid, parts = GRIDS[name], random_parts(GRIDS[name], *shape)
        parts["step"][:] = 0
        assert set(nearest(np.ones(shape, np.float32), grid, parts).reshape(-1)) <= {
            grid.low if grid.zero == "least" else 0
        }


def test_steps_that_are_far_below_the_least_value_keep_their_codes(name: str) -> None:
    grid, parts = GRIDS[name], random_parts(GRIDS[name], 4, 256)
    parts["step"] = np.full_like(parts["step"], 2.0**-14)
    if "least" in parts:
        parts["least"][:] = 300
    values = grid.decode(parts)
    again = grid.decode({**parts, "codes": nearest(values, grid, parts)})
    np.testing.assert_array_equal(again, values)


def test_numbers_that_the_grid_does_not_have_are_refused(name: str) -> None:
    grid, view = GRIDS[name], View((4, 256), (0,))
    parts = random_parts(grid, 4, 256)
    beyond = {"codes": grid.high + 1, "zero": grid.low - 1}
    beyond |= dict.fromkeys(("multiple", "least multiple"), grid.multiples[1] + 1)
    beyond |= dict.fromkeys(("step", "least"), np.inf)
    for part in parts:
        if part not in ("step", "least") and beyond[part] > np.iinfo(parts[part].dtype).max:
            continue
        wrong = parts[part].copy()
        wrong.reshape(-1)[-1] = beyond[part]
        with pytest.raises(CorruptError, match=r"is not (between|finite)"):
            stored.parts(grid, stored.streams(grid, {**parts, part: wrong}, view), (4, 256), view)


def test_a_part_of_the_wrong_length_is_refused(name: str) -> None:
    grid, view = GRIDS[name], View((4, 256), (0,))
    found = stored.streams(grid, random_parts(grid, 4, 256), view)
    for key, part in found.items():
        longer = replace(part, payload=bytes(part.payload) + b"\0")
        with pytest.raises(CorruptError):
            stored.parts(grid, found | {key: longer}, (4, 256), view)


def test_nothing_is_a_step_of_its_own(name: str) -> None:
    """A part that stands for more numbers than it has bytes is refused before it is read."""
    grid, view = GRIDS[name], View((4, 256), (0,))
    found = stored.streams(grid, random_parts(grid, 4, 256), view)
    with pytest.raises(CorruptError):
        stored.parts(grid, found | {"step": EncodedPart(b"")}, (4, 256), view)


def test_defaults_are_left_out_of_json(name: str) -> None:
    data = GRIDS[name].to_json()
    assert GroupGrid(**{key: value for key, value in data.items() if key != "tag"}) == GRIDS[name]


@pytest.mark.parametrize("sign", [False, True])
def test_steps_that_are_much_alike_take_less(name: str, sign: bool) -> None:
    grid, view = GRIDS[name], View((64, 1024), (0,))
    if grid.step == "float32":
        pytest.skip("stored as they are")
    generator = np.random.default_rng(0)
    parts = random_parts(grid, 64, 1024)
    parts["step"] = representable(np.exp(generator.normal(size=parts["step"].shape) / 4).astype(np.float32), grid.step)
    parts["step"] *= np.where(generator.random(parts["step"].shape) < 0.5, -1, 1) if sign else 1
    found = stored.streams(grid, parts, view)
    assert len(found["step"].payload) < (0.85 if sign else 0.75) * 2 * parts["step"].size
    np.testing.assert_array_equal(stored.parts(grid, found, (64, 1024), view)["step"], parts["step"])
