"""Whether a checkpoint is quantized already: by the configuration in its folder, and by the names and types in it."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pared.checkpoints.quantized.schemes import INTEGERS, METHODS, NARROW_FLOATS, SCHEMES
from pared.checkpoints.selection import Kept
from pared.readers.folders.hub import is_within
from pared.readers.gguf import BLOCKS
from pared.readers.listing import ListedTensor, Listing

log = logging.getLogger(__name__)

REMEDY: Final = "Start from the model that it was made from, before any tool quantized it."

# The files of a folder that say how it was quantized, and the keys below which they do; (): all of the file does.
_CONFIGS: Final[Mapping[str, tuple[str, ...]]] = {
    "config.json": ("quantization_config", "compression_config", "quantization"),
    "quantize_config.json": (),
    "quant_config.json": (),
    "quantization_config.json": (),
    "hf_quant_config.json": ("quantization",),
    "params.json": ("quantization",),
    "inc_config.json": ("quantization",),
}
_LARGEST_CONFIG: Final = 1 << 22  # bytes
_METHOD: Final = ("quant_method", "quant_algo", "qformat_weight")
_BITS: Final = ("bits", "w_bit", "nbits", "weight_bits")
_DEEPEST: Final = 3  # models in parts have a configuration for each
_LEAST: Final = 16  # codes: fewer are a count or a flag
_LABEL: Final = 60  # characters
_BLOCKS: Final = frozenset(block.name for block in BLOCKS.values() if block.elements > 1)


@dataclass(frozen=True)
class Quantization:
    """What another tool has made of a checkpoint.

    Args:
        label: the method: "GPTQ, 4 bits".
        seen: by what it was recognized, for people.
        codes: the tensors that hold codes, as far as their names say so.
    """

    label: str
    seen: str
    codes: tuple[ListedTensor, ...] = ()

    def __str__(self) -> str:
        return f"it is quantized already ({self.label}: {self.seen})"


def recognize(listing: Listing) -> Quantization | None:
    """How a checkpoint was quantized; None if it was not. No numbers are read.

    >>> held = [ListedTensor("a.weight", "int8", (8, 8), 64, "1"), ListedTensor("a.SCB", "float32", (8,), 32, "2")]
    >>> print(recognize(Listing(tuple(held))))
    it is quantized already (bitsandbytes, 8 bits: a.weight is int8)
    >>> recognize(Listing(tuple(held[1:]))) is None
    True
    """
    codes = list(_codes(listing))
    tensors = tuple(held for _, held in codes)
    known = Counter(label for label, _ in codes if label)
    label = known.most_common(1)[0][0] if known else "codes with scales"
    for name in _CONFIGS:
        if (said := _configured(listing, name)) is not None:
            method, bits = said
            return Quantization(", ".join(filter(None, (method or label, bits))), name, tensors)
    if not codes:
        return None
    first = next(held for found, held in codes if found == label or not known)
    more = f" and {len(codes) - 1:,} more" if len(codes) > 1 else ""
    kinds = "/".join(sorted({held.dtype for held in tensors}))
    return Quantization(label, f"{first.name}{more} {'are' if more else 'is'} {kinds}", tensors)


def unrounded(kept: Sequence[Kept], found: Quantization | None) -> tuple[Kept, ...]:
    """The same tensors, to be stored bit for bit if their checkpoint is quantized: codes, scales, and all others.

    The tools that read such a checkpoint take every tensor of it as it is; a rounded embedding would be a second loss
    beside the first.
    """
    return tuple(kept) if found is None else tuple(replace(one, quantized=str(found)) for one in kept)


def _codes(listing: Listing) -> Iterator[tuple[str, ListedTensor]]:
    """The tensors of codes, each with its method; the method is "" if it is none that is known."""
    names = {held.name for held in listing.tensors}
    for held in listing.tensors:
        if held.storage is None or math.prod(held.shape) < _LEAST:
            continue
        if held.dtype in NARROW_FLOATS:
            yield "FP8" if held.dtype.startswith("float8") else "FP4", held
        elif held.dtype in _BLOCKS:
            yield f"GGUF, {held.dtype}", held
        elif held.dtype in INTEGERS:
            label = _scheme_of(held.name, names)
            if label is not None:
                yield label, held


def _scheme_of(name: str, names: set[str]) -> str | None:
    for scheme in SCHEMES:
        found = scheme.codes.fullmatch(name)
        if found and any(other.format(*found.groups("")) in names for other in scheme.beside):
            return scheme.label
    return None


def _configured(listing: Listing, name: str) -> tuple[str, str] | None:
    """Method and bits by a configuration in the folder; None if it is not there, or says nothing of quantization."""
    note = listing.notes.get(f"({name})")
    if note is None or not note.file or note.nbytes > _LARGEST_CONFIG:
        return None
    folder = Path(listing.where)
    if not is_within(folder, name):
        log.warning("%s is not read: a link that leads out of the folder", folder / name)
        return None
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.info("%s in %s says nothing of quantization: %s", name, listing.where, error)
        return None
    keys = _CONFIGS[name]
    for found in _within(data, keys, _DEEPEST) if keys else [data]:
        if (said := _said(found)) is not None:
            return said
    return None


def _within(data: Any, keys: tuple[str, ...], deepest: int) -> Iterator[Any]:
    """What stands below one of the keys, in a configuration or in one of its parts."""
    if not isinstance(data, dict):
        return
    yield from (data[key] for key in keys if data.get(key))
    if deepest:
        for value in data.values():
            yield from _within(value, keys, deepest - 1)


def _said(found: Any) -> tuple[str, str] | None:
    """The method that a configuration names, and its bits; None if it names neither."""
    if isinstance(found, str):
        return _method(found), ""
    if not isinstance(found, dict):
        return None
    method = next((found[key] for key in _METHOD if found.get(key)), None)
    bits = next((found[key] for key in _BITS if type(found.get(key)) is int), None)
    bits = 4 if found.get("load_in_4bit") is True else 8 if found.get("load_in_8bit") is True else bits
    if method is None and bits is None:
        return None
    return "" if method is None else _method(str(method)), "" if bits is None else f"{bits} bits"


def _method(name: str) -> str:
    return METHODS.get(name.lower(), name[:_LABEL])
