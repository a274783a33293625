"""Where each tensor of a model goes in a GGUF file: its name, its type, its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np

from pared.errors import ConfigError
from pared.formats import dtypes
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.targets.families.family import Family
from pared.targets.gguf.blocks import BLOCKS
from pared.targets.gguf.target import FLOATS
from pared.targets.pieces import Outline
from pared.targets.target import Offer

_SUFFIXES: Final = (".weight", ".bias")
# The graphs of llama.cpp add these without a look-up, which only floats of 32 bits allow.
_PLAIN: Final = ("token_types.weight",)


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor as it stands in the file.

    Args:
        outline: what it is in the source.
        name: in the file.
        type: the name of its type: "Q4_0", "F32".
        shape: the rows and columns of its numbers; or their count.
        heads: the heads whose rows are paired; 0: the rows stay in order.
        transposed: the source has its inputs in dimension 0. Codes come as (outputs, inputs) all the same.
        offset: what is added to its values.
    """

    outline: Outline
    name: str
    type: str
    shape: tuple[int, ...]
    heads: int = 0
    transposed: bool = False
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers, without padding."""
        columns, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape)) // columns * nbytes

    def pack(self, parts: Mapping[str, Numbers]) -> Numbers:
        """The bytes of its numbers, uint8.

        Args:
            parts: what `Source.read` gives for it.
        """
        if self.heads:
            parts = {name: part[_pairs(len(part), self.heads)] for name, part in parts.items()}
        if "values" not in parts:
            if self.type in BLOCKS:
                return BLOCKS[self.type].pack(parts).reshape(-1)
            assert self.outline.offer is not None
            assert isinstance(self.outline.offer.grid, GroupGrid)
            return _bytes(self.outline.offer.grid.decode(parts), self.type)
        values = parts["values"].T if self.transposed else parts["values"]
        return _bytes(values.astype(np.float32) + np.float32(self.offset) if self.offset else values, self.type)


def _pairs(rows: int, heads: int) -> Numbers:
    """The order of rows in which the two of each pair follow each other."""
    order: Numbers = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return order


def _bytes(values: Numbers, kind: str) -> Numbers:
    typed = np.ascontiguousarray(values.astype(dtypes.ELEMENTS[FLOATS[kind]]))
    return typed.reshape(-1).view(np.uint8)


def laid_out(outlines: Sequence[Outline], family: Family, config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the file, in the order of the source.

    Raises:
        ConfigError: one has no place in it, or a format that it cannot have there.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf], _blocks(config))
    entries = [_entry(outline, names, family, config) for outline in outlines if family.uses(outline.name)]
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise ConfigError(
                f"has the same place in a GGUF file as {seen[entry.name]}: {entry.name}",
                where=entry.outline.name,
                remedy="Export the model as its class in transformers holds it.",
            )
        seen[entry.name] = entry.outline.name
    return entries


def _blocks(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config["n_layer"])


def _entry(outline: Outline, names: gguf.TensorNameMap, family: Family, config: Mapping[str, Any]) -> Entry:
    all_names = (outline.name, *outline.names)
    # A tied head is the table: the architecture takes it for both.
    found = [names.get_name(family.plain(name), try_suffixes=_SUFFIXES) for name in all_names]
    name = next((name for name in found if name and name != "output.weight"), found[0])
    if name is None:
        raise ConfigError(
            f"has no place in a GGUF file of the architecture {family.name}",
            where=outline.name,
            remedy="Export the model as its class in transformers holds it, without layers of your own.",
        )
    module = family.plain(outline.name).split(".")[-2]
    transposed = module in family.transposed and len(outline.shape) == 2
    shape = outline.shape[::-1] if transposed else outline.shape
    heads = next((_heads(config, setting) for part, setting in family.paired if part == module), 0)
    kind = "F32" if len(shape) == 1 or name in _PLAIN else _type(outline, shape)
    offset = family.norm_offset if name.endswith("norm.weight") else 0.0
    return Entry(outline, name, kind, shape, heads, transposed, offset)


def _heads(config: Mapping[str, Any], setting: str) -> int:
    return int(config.get(setting) or config["num_attention_heads"])


def _type(outline: Outline, shape: tuple[int, ...]) -> str:
    if outline.offer is not None:
        return _offered(outline.offer, outline.name, shape)
    kind = next((name for name, dtype in FLOATS.items() if dtype == outline.dtype), None)
    if kind is None:
        raise ConfigError(
            f"holds {outline.dtype}, for which GGUF files of models have no place",
            where=outline.name,
            remedy="Convert it to a floating type of at most 32 bits.",
        )
    return kind


def _offered(offer: Offer, name: str, shape: tuple[int, ...]) -> str:
    known = offer.name in FLOATS or (offer.name in BLOCKS and BLOCKS[offer.name].grid == offer.grid)
    if not known:
        raise ConfigError(
            f"has the format {offer.name}, which is none of GGUF",
            where=name,
            remedy='Fit the model for it: PostTrainingQuantConfig(target="gguf").',
        )
    if shape[-1] % offer.multiple:
        fitting = "Q8_0, Q5_0 and Q4_0 need a multiple of 32; F16 takes every width."
        raise ConfigError(
            f"has {shape[-1]} columns, and {offer.name} needs a multiple of {offer.multiple}",
            where=name,
            remedy=f"Give it another format: {fitting}",
        )
    return offer.name
