"""GPTQ's layout: what vLLM, SGLang, transformers with GPTQModel, and the builder of onnxruntime-genai read.

A matrix of (rows, columns) becomes `qweight`, whose words run down the columns, `qzeros`, `scales` and `g_idx`. The
first version of the layout stores each zero point less one. Its readers add one to all zero points of a word at once,
so a zero point of 0 would spill into its neighbour: such weights need the second version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.errors import ConfigError
from pared.formats.dtypes import Array
from pared.formats.groups.grid import GroupGrid, Numbers, StepType, Zero
from pared.targets.folders.bits import packed, words
from pared.targets.folders.folder import (
    Layout,
    config_of,
    dtype_of,
    folder_nbytes,
    left,
    module_of,
    patterns,
    quantized,
    stored_steps,
    write_folder,
)
from pared.targets.folders.shards import Group, Stored
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Target
from pared.version import __version__

# Stored so where the model computes in bfloat16; else in float16, which has to hold them, too.
_STEP: Final = "bfloat16"
_FUSED: Final = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # as vLLM names the module of those it joins


def _nbytes(rows: int, columns: int, *, grid: GroupGrid) -> int:
    groups = grid.groups(columns)
    return 4 * (rows * words(columns, grid.bits) + groups * words(rows, grid.bits) + columns) + 2 * rows * groups


def _offer(bits: int, group: int | None, zero: Zero = "fixed") -> Offer:
    grid = GroupGrid(bits, group, zero, _STEP)
    name = f"{bits} bits {f'g{group}' if group else 'row'}{' zero' if zero == 'code' else ''}"
    return Offer(name, grid, partial(_nbytes, grid=grid), group or 32, row_multiple=32)


def _offers(zeros: Sequence[Zero]) -> tuple[Offer, ...]:
    """The formats from fine to coarse; eight bits need no zero points."""
    widths, groups = (8, 4, 3, 2), (32, 64, 128, None)
    return tuple(
        _offer(bits, group, zero)
        for bits in widths
        for group in (groups if bits < 8 else (128, None))
        for zero in zeros
        if zero == "fixed" or (bits < 8 and group is not None)
    )


TARGET: Final = Target(
    "gptq",
    "GPTQ: vLLM, SGLang, transformers with GPTQModel, onnxruntime-genai",
    "",
    (),
    _offers(("fixed",)),
    (("experts",), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")),
    parts=4,
    steps_of=lambda dtype: "bfloat16" if dtype == "bfloat16" else "float16",
)
V2: Final = replace(
    TARGET,
    name="gptq_v2",
    title="GPTQ's second version, with zero points: vLLM, GPTQModel",
    offers=_offers(("code", "fixed")),
)


def write(source: Source, path: Path) -> list[Path]:
    """Write a folder in the first version of the layout; see `write_folder`."""
    return write_folder(source, path, TARGET, _layout(source, less=1))


def write_v2(source: Source, path: Path) -> list[Path]:
    """Write a folder in the second version; see `write_folder`."""
    return write_folder(source, path, V2, _layout(source, less=0))


def nbytes(source: Source) -> int:
    """The exact bytes of the weights' files, in either version."""
    return folder_nbytes(source, _layout(source, less=0))


def _layout(source: Source, less: int) -> Layout:
    assert TARGET.steps_of is not None
    step = TARGET.steps_of(dtype_of(source.config))
    config = config_of(source)
    files: dict[str, Mapping[str, Any]] = {"config.json": config}
    if quantized(source):
        files["quantize_config.json"] = config["quantization_config"] = quantize_config(source, less)
    return Layout(partial(_stored, step=step), partial(_arrays, step=step, less=less), files)


def _grid(offer: Offer) -> GroupGrid:
    assert isinstance(offer.grid, GroupGrid), offer.name  # this target has no floats among its offers
    return offer.grid


def _stored(outline: Outline, offer: Offer, *, step: StepType) -> Group:
    grid = _grid(offer)
    rows, columns = outline.shape
    groups = grid.groups(columns)
    module = module_of(outline.name)
    return [
        Stored(f"{module}.qweight", "int32", (words(columns, grid.bits), rows)),
        Stored(f"{module}.qzeros", "int32", (groups, words(rows, grid.bits))),
        Stored(f"{module}.scales", step, (groups, rows)),
        Stored(f"{module}.g_idx", "int32", (columns,)),
    ]


def _arrays(
    outline: Outline, offer: Offer, parts: Mapping[str, Numbers], *, step: StepType, less: int
) -> Sequence[Array]:
    grid = _grid(offer)
    codes = parts["codes"]
    zeros = parts["zero"] if grid.zero == "code" else np.zeros(grid.shapes(*codes.shape)["step"], np.int8)
    if less and (zeros == grid.low).any():
        raise ConfigError(
            "a group has its zero at the least code, which the first version of GPTQ's layout cannot store",
            where=outline.name,
            remedy='Write it for "gptq_v2".',
        )
    steps = stored_steps(parts["step"], step, outline.name)
    stored_zeros = (zeros.T - np.int8(less)).astype(np.int8)
    groups = np.arange(codes.shape[1], dtype=np.int32) // np.int32(grid.group or codes.shape[1])
    return [packed(codes, grid.bits).T, packed(stored_zeros, grid.bits), steps.T, groups]


def quantize_config(source: Source, less: int) -> dict[str, Any]:
    """What the configuration says: the format of most modules, and by name those of the others and what is in float."""
    chosen = quantized(source)
    count = {offer: sum(each == offer for each in chosen.values()) for offer in dict.fromkeys(chosen.values())}
    main = max(count, key=lambda offer: count[offer])
    dynamic: dict[str, Mapping[str, Any]] = {}
    for offer in count:
        if offer != main:
            modules = _with_fused([name for name, each in chosen.items() if each == offer])
            dynamic |= {f"+:{pattern}": _numbers(offer) for pattern in patterns(modules)}
    # Loaders leave the head and embeddings alone; other matrices in float have to be named.
    floats = [name for name in left(source) if any(part.isdigit() for part in name.split("."))]
    dynamic |= {f"-:{pattern}": {} for pattern in patterns(_with_fused(floats))}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if less else "gptq_v2",
        **_numbers(main),
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"pared:{__version__}"]},
    }


def _numbers(offer: Offer) -> dict[str, Any]:
    grid = _grid(offer)
    return {"bits": grid.bits, "group_size": grid.group or -1, "sym": grid.zero == "fixed"}


def _with_fused(modules: Sequence[str]) -> list[str]:
    """Names with those of the modules into which vLLM joins them, by which it looks formats up."""
    joined = [
        f"{name.rpartition('.')[0]}.{_FUSED[last]}" for name in modules if (last := name.rpartition(".")[2]) in _FUSED
    ]
    return [*modules, *joined]
