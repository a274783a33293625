from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pared.errors import ConfigError
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.targets.conversion import Held, converted
from pared.targets.table import TARGETS
from tests.targets.grids import random_parts

_GGUF = TARGETS["gguf"]


def rows_of(name: str, codes: Numbers, step: float) -> Held:
    steps = np.full(len(codes), step, np.float32)
    roles: frozenset[Any] = frozenset(["linear"])
    return Held((name,), codes.shape, "float32", roles, "rows", codes.shape, lambda: {"codes": codes, "step": steps})


def codes_up_to(most: int, rows: int = 64, columns: int = 64) -> Numbers:
    return np.resize(np.arange(-most - 1, most + 1), (rows, columns)).astype(np.int16)


@pytest.mark.parametrize(("most", "name"), [(7, "Q4_0"), (15, "Q5_0"), (127, "Q8_0")])
def test_a_step_for_each_row_goes_into_the_smallest_format_that_holds_it(most: int, name: str) -> None:
    codes = codes_up_to(most)
    source = converted([rows_of("a.weight", codes, 0.25)], _GGUF, {}, None, {})
    (outline,) = source.outlines
    assert outline.offer is not None
    assert outline.offer.name == name
    assert isinstance(outline.offer.grid, GroupGrid)
    assert np.array_equal(outline.offer.grid.decode(source.read(outline)), codes * np.float32(0.25))


def test_what_must_be_alike_gets_the_same_format() -> None:
    target = next(one for one in TARGETS.values() if one.name == "compressed-tensors-any")
    held = [
        rows_of("layers.0.q_proj.weight", codes_up_to(7, columns=128), 0.25),
        rows_of("layers.0.k_proj.weight", codes_up_to(100, columns=128), 0.25),
        rows_of("layers.0.o_proj.weight", codes_up_to(7, columns=128), 0.25),
    ]
    q, k, o = (outline.offer for outline in converted(held, target, {}, None, {}).outlines)
    assert q is not None
    assert o is not None
    assert q == k
    assert q.nbytes(64, 128) > o.nbytes(64, 128)


def test_groups_go_as_they_are() -> None:
    grid = GroupGrid(4, 32, "least")
    parts = random_parts(grid, 8, 64)
    held = Held(("a.weight",), (8, 64), "float32", frozenset(["linear"]), grid, (8, 64), lambda: parts)
    source = converted([held], _GGUF, {}, None, {})
    assert source.outlines[0].offer is not None
    assert source.outlines[0].offer.name == "Q4_1"
    assert source.read(source.outlines[0]) is parts


def test_values_stay_values() -> None:
    parts = {"values": np.ones(64, np.float32)}
    held = Held(("a.bias",), (64,), "float32", frozenset(["other"]), None, (1, 64), lambda: parts)
    source = converted([held], _GGUF, {}, None, {})
    assert source.outlines[0].offer is None
    assert source.read(source.outlines[0]) is parts


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (rows_of("a.weight", codes_up_to(130), 0.25), "a.weight has codes from -131 to 130; 8 bits hold -128 to 127"),
        (rows_of("a.weight", codes_up_to(7), 0.3), r"steps that are not numbers of float16 \(0% of its rows"),
        (rows_of("a.weight", codes_up_to(7, columns=40), 0.25), "a.weight has 40 columns; a multiple of 32 or 256"),
        (
            Held(("a.weight",), (8, 64), "float32", frozenset(["linear"]), GroupGrid(4, 64), (8, 64), dict),
            "a.weight is on a grid that it does not have",
        ),
    ],
)
def test_nothing_is_rounded_a_second_time(held: Held, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        converted([held], _GGUF, {}, None, {})
    assert "target 'gguf': 1 of 1 tensors cannot be held exactly" in str(caught.value)
    assert "PostTrainingQuantConfig(target='gguf') chooses among F32, F16, BF16, Q8_0" in str(caught.value)


@pytest.mark.parametrize("name", ["mlx", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_steps_are_those_that_a_model_of_its_type_can_have(name: str, dtype: str) -> None:
    target = TARGETS[name]
    grid = target.offers[0].grid
    assert isinstance(grid, GroupGrid)
    parts = {part: numbers * np.float32(2.0**-19) for part, numbers in random_parts(grid, 32, 256).items()}
    parts["codes"] = random_parts(grid, 32, 256)["codes"]
    roles: frozenset[Any] = frozenset(["linear"])
    held = [
        Held(("a.weight",), (32, 256), "float32", roles, grid, (32, 256), lambda: parts),
        rows_of("b.weight", codes_up_to(7, columns=256), 2.0**-26),
    ]
    for one in held:
        if dtype == "float16":
            with pytest.raises(ConfigError, match="has steps that (float16 does not hold|are not numbers of float16)"):
                converted([one], target, {"dtype": dtype}, None, {})
        else:
            assert converted([one], target, {"dtype": dtype}, None, {}).outlines[0].offer is not None


def test_what_a_runtime_keeps_in_floats_is_not_a_matter_of_width() -> None:
    held = replace(rows_of("a.weight", codes_up_to(7, columns=64), 0.25), roles=frozenset(["table"]))
    with pytest.raises(ConfigError, match="a.weight is of a kind that the runtime keeps in floats, such as embeddings"):
        converted([held], TARGETS["compressed-tensors"], {}, None, {})
