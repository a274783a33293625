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

from pared.errors import ConfigError
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.targets.folders.bits import packed, words
from pared.targets.folders.folder import Layout, dtype_of, folder_nbytes, module_of, quantized, write_folder
from pared.targets.folders.shards import Group, Stored
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Role, Target

# Steps that are bfloat16 numbers are exact in the other types too: a model computes in that of its steps.
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
)


def write(source: Source, path: Path) -> list[Path]:
    """Write a folder; see `write_folder`."""
    return write_folder(source, path, TARGET, _layout(source))


def nbytes(source: Source) -> int:
    """The exact bytes of the weights' files."""
    return folder_nbytes(source, _layout(source))


def _layout(source: Source) -> Layout:
    step = "float16" if dtype_of(source.config) == "float16" else "bfloat16"
    config = dict(source.config)
    if quantized(source):
        config["quantization"] = config["quantization_config"] = quantization(source)
    return Layout(partial(_stored, step=step), partial(_arrays, step=step), {"config.json": config}, "mlx")


def _grid(offer: Offer) -> GroupGrid:
    assert isinstance(offer.grid, GroupGrid), offer.name  # this target has no floats among its offers
    return offer.grid


def _stored(outline: Outline, offer: Offer, *, step: str) -> Group:
    grid = _grid(offer)
    rows, columns = outline.shape
    module = module_of(outline.name)
    groups = (rows, grid.groups(columns))
    return [
        Stored(f"{module}.weight", "uint32", (rows, words(columns, grid.bits))),
        Stored(f"{module}.scales", step, groups),
        Stored(f"{module}.biases", step, groups),
    ]


def _arrays(outline: Outline, offer: Offer, parts: Mapping[str, Numbers], *, step: str) -> Sequence[Array]:
    pair = [converted(parts[name], ELEMENTS[step]) for name in ("step", "least")]
    for name, stored in zip(("step", "least"), pair, strict=True):
        if (stored.astype(np.float32) != parts[name]).any():
            raise ConfigError(
                f"has numbers that {step} does not hold exactly, in which the model computes",
                where=outline.name,
                remedy="Leave it in float, or pass a model in bfloat16.",
            )
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
