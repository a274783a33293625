"""compressed-tensors: what vLLM, SGLang and transformers read.

A matrix becomes `weight_packed` (or int8 `weight`), `weight_scale`, `weight_shape` and, where groups have zero points,
`weight_zero_point`; `config.json` says which modules have which format. Embeddings and the head stay in float, since
vLLM runs quantized ones for few models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.formats.dtypes import ELEMENTS, Array
from pared.formats.groups.grid import GroupGrid, Numbers, Zero
from pared.targets.folders.bits import packed, words
from pared.targets.folders.folder import (
    Layout,
    config_of,
    folder_nbytes,
    half_or_bfloat16,
    left,
    patterns,
    quantized,
    write_folder,
)
from pared.targets.folders.shards import Group, Stored
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Target

# The steps' type. Runtimes cast them to the type in which a model computes, which has to hold them, too.
_STEP: Final = "bfloat16"
_INT8: Final = "W8A8 row"
_JOINED: Final = (
    ("experts",),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)


def _nbytes(rows: int, columns: int, *, grid: GroupGrid) -> int:
    groups = grid.groups(columns)
    zeros = 4 * words(rows, grid.bits) * groups if grid.zero == "code" else 0
    return 4 * rows * words(columns, grid.bits) + 2 * rows * groups + zeros + 16


def _offer(bits: int, group: int | None, zero: Zero = "fixed") -> Offer:
    grid = GroupGrid(bits, group, zero, _STEP)
    name = f"W{bits}A16 {f'g{group}' if group else 'row'}{' zero' if zero == 'code' else ''}"
    return Offer(name, grid, partial(_nbytes, grid=grid), group or 32)


def _offers(bits: Sequence[int], *, zeros: bool) -> tuple[Offer, ...]:
    """The formats from fine to coarse; eight bits need no small groups, and more than four no zero points."""
    found = []
    for width in bits:
        for group in (128, None) if width == 8 else (32, 64, 128, None):
            if zeros and width <= 4 and group is not None:
                found.append(_offer(width, group, "code"))
            found.append(_offer(width, group))
    return tuple(found)


def _int8_nbytes(rows: int, columns: int) -> int:
    return rows * columns + 2 * rows


TARGET: Final = Target(
    "compressed-tensors",
    "compressed-tensors: vLLM, SGLang, transformers",
    "compressed-tensors",
    (),
    _offers((8, 4), zeros=False),
    _JOINED,
    parts=4,
    steps_of=half_or_bfloat16,
)
# Versions of transformers that read mixtures give groups with zero points random numbers.
ANY_BITS: Final = replace(
    TARGET,
    name="compressed-tensors-any",
    title="compressed-tensors of 2 to 8 bits, with zero points: vLLM with Humming's kernels",
    offers=_offers((8, 7, 6, 5, 4, 3, 2), zeros=True),
)
INT8: Final = replace(
    TARGET,
    name="compressed-tensors-int8",
    title="compressed-tensors whose products are of int8: vLLM rounds each token's activations too",
    offers=(Offer(_INT8, GroupGrid(8, None, step=_STEP), _int8_nbytes, 32),),
)


def write(source: Source, path: Path) -> list[Path]:
    """Write a folder; see `write_folder`."""
    return write_folder(source, path, TARGET, _layout(source))


def write_any_bits(source: Source, path: Path) -> list[Path]:
    """Write a folder whose weights may have 2 to 8 bits, and zero points."""
    return write_folder(source, path, ANY_BITS, _layout(source))


def write_int8(source: Source, path: Path) -> list[Path]:
    """Write a folder whose products are of int8."""
    return write_folder(source, path, INT8, _layout(source))


def nbytes(source: Source) -> int:
    """The exact bytes of the weights' files."""
    return folder_nbytes(source, _layout(source))


def _layout(source: Source) -> Layout:
    config = config_of(source)
    if quantized(source):
        config["quantization_config"] = quantization_config(source)
    return Layout(_stored, _arrays, {"config.json": config})


def _grid(offer: Offer) -> GroupGrid:
    assert isinstance(offer.grid, GroupGrid), offer.name  # this target has no floats among its offers
    return offer.grid


def _stored(outline: Outline, offer: Offer) -> Group:
    grid = _grid(offer)
    rows, columns = outline.shape
    groups = grid.groups(columns)
    found = [Stored(f"{outline.name}_scale", _STEP, (rows, groups))]
    if offer.name == _INT8:
        return [Stored(outline.name, "int8", (rows, columns)), *found]
    if grid.zero == "code":
        found.append(Stored(f"{outline.name}_zero_point", "int32", (words(rows, grid.bits), groups)))
    return [
        Stored(f"{outline.name}_packed", "int32", (rows, words(columns, grid.bits))),
        *found,
        Stored(f"{outline.name}_shape", "int64", (2,)),
    ]


def _arrays(outline: Outline, offer: Offer, parts: Mapping[str, Numbers]) -> Sequence[Array]:
    grid = _grid(offer)
    steps = [parts["step"].astype(ELEMENTS[_STEP])]
    if offer.name == _INT8:
        return [parts["codes"], *steps]
    if grid.zero == "code":
        steps.append(packed(parts["zero"].T, grid.bits).T)
    return [packed(parts["codes"], grid.bits), *steps, np.array(outline.shape, np.int64)]


def quantization_config(source: Source) -> dict[str, Any]:
    """What `config.json` says: the modules of each format, and those that stay in float."""
    chosen = quantized(source)
    ignored = left(source)
    groups = {}
    for i, offer in enumerate(dict.fromkeys(chosen.values())):
        modules = [name for name, each in chosen.items() if each == offer]
        alone = len(modules) == len(chosen)
        targets = ["Linear"] if alone else [f"re:{pattern}" for pattern in patterns(modules)]
        groups[f"group_{i}"] = {"targets": targets, **_scheme(offer)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*ignored, "lm_head"}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(offer: Offer) -> dict[str, Any]:
    grid = _grid(offer)
    numbers = {"num_bits": grid.bits, "type": "int", "symmetric": grid.zero == "fixed", "dynamic": False}
    how = {"strategy": "group" if grid.group else "channel", "group_size": grid.group, "actorder": None}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "format": "int-quantized" if offer.name == _INT8 else "pack-quantized",
        "weights": {**numbers, **how},
        "input_activations": tokens if offer.name == _INT8 else None,
        "output_activations": None,
    }
