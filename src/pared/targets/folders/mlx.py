"""MLX's layout, as mlx-lm reads it on Apple's machines and elsewhere.

A matrix becomes `weight` (words of codes), `scales` and `biases`: each group of columns has its least value. Modules
keep the names that they have in Hugging Face's folder: mlx-lm renames what its own models call differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.formats.dtypes import Array
from pared.formats.groups.grid import GroupGrid, Numbers, StepType
from pared.targets.folders.bits import packed, words
from pared.targets.folders.folder import (
    Layout,
    config_of,
    dtype_of,
    folder_nbytes,
    half_or_bfloat16,
    module_of,
    quantized,
    stored_steps,
    write_folder,
)
from pared.targets.folders.mlx_types import check_loaded
from pared.targets.folders.shards import Group, Stored
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Role, Target

# A model computes in the type of its steps: in float16 they have to be numbers of that as well.
_STEP: Final = "bfloat16"
_ROLES: Final[frozenset[Role]] = frozenset(("linear", "table", "head"))
_EXPERT: Final = re.compile(r"(.*)\.experts\.\d+\.(\w+)")
_STACKED: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _nbytes(rows: int, columns: int, *, grid: GroupGrid) -> int:
    return 4 * rows * words(columns, grid.bits) + 4 * rows * grid.groups(columns)


def _offer(bits: int, group: int) -> Offer:
    grid = GroupGrid(bits, group, "least", _STEP)
    return Offer(f"{bits} bits g{group}", grid, partial(_nbytes, grid=grid), group, _ROLES)


TARGET: Final = Target(
    "mlx",
    "MLX: mlx-lm, LM Studio",
    "",
    (),
    tuple(_offer(bits, group) for bits in (8, 6, 5, 4, 3, 2) for group in (32, 64, 128)),
    (("experts",),),
    parts=3,
    steps_of=half_or_bfloat16,
)


def check(config: Mapping[str, Any], _folder: Path | None = None) -> None:
    """Refuse a model that mlx-lm does not load, before any work.

    Raises:
        ConfigError: this is one.
    """
    if config:  # a model that has none is refused by `check_config`
        check_loaded(config)


def write(source: Source, path: Path) -> list[Path]:
    """Write a folder; see `write_folder`.

    Raises:
        ConfigError: mlx-lm does not load the model, or its format does not hold it.
        FileError: the folder cannot be written, or there is something already.
    """
    check(source.config)
    return write_folder(source, path, TARGET, _layout(source))


def nbytes(source: Source) -> int:
    """The exact bytes of the weights' files."""
    return folder_nbytes(source, _layout(source))


def _layout(source: Source) -> Layout:
    step = half_or_bfloat16(dtype_of(source.config))
    config = config_of(source)
    if quantized(source):
        config["quantization"] = config["quantization_config"] = quantization(source)
    return Layout(partial(_stored, step=step), partial(_arrays, step=step), {"config.json": config}, "mlx")


def _grid(offer: Offer) -> GroupGrid:
    assert isinstance(offer.grid, GroupGrid), offer.name  # this target has no floats among its offers
    return offer.grid


def _stored(outline: Outline, offer: Offer, *, step: StepType) -> Group:
    grid = _grid(offer)
    rows, columns = outline.shape
    module = module_of(outline.name)
    groups = (rows, grid.groups(columns))
    return [
        Stored(f"{module}.weight", "uint32", (rows, words(columns, grid.bits))),
        Stored(f"{module}.scales", step, groups),
        Stored(f"{module}.biases", step, groups),
    ]


def _arrays(outline: Outline, offer: Offer, parts: Mapping[str, Numbers], *, step: StepType) -> Sequence[Array]:
    pair = [stored_steps(parts[name], step, outline.name) for name in ("step", "least")]
    return [packed(parts["codes"], _grid(offer).bits).view(np.uint32), *pair]


def quantization(source: Source) -> dict[str, Any]:
    """What `config.json` says: the format of most modules, and those of the others by their names."""
    chosen = quantized(source)
    count = {offer: sum(each == offer for each in chosen.values()) for offer in dict.fromkeys(chosen.values())}
    main = max(count, key=lambda offer: count[offer])
    others = {name: _numbers(offer) for name, offer in chosen.items() if offer != main}
    return {**_numbers(main), "mode": "affine", **others, **{_stacked(name): others[name] for name in others}}


def _numbers(offer: Offer) -> dict[str, Any]:
    grid = _grid(offer)
    return {"group_size": grid.group, "bits": grid.bits}


def _stacked(name: str) -> str:
    """The module into which mlx-lm stacks an expert; the same name for others.

    >>> _stacked("layers.0.mlp.experts.3.up_proj"), _stacked("layers.0.moe.experts.3.w2"), _stacked("lm_head")
    ('layers.0.mlp.switch_mlp.up_proj', 'layers.0.moe.switch_mlp.down_proj', 'lm_head')
    """
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}.switch_mlp.{_STACKED.get(found[2], found[2])}" if found else name
