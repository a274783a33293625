"""Which tensors of a file are the model, under which names; and what else there is, and why a model needs none of it.

A checkpoint keeps the weights in a dictionary beside the states of an optimizer; some files keep the model twice. The
rules here go by names, as people give them, and by where numbers lie; only where tensors have equal type and shape are
numbers compared. Nothing here uses torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from pared.formats.dtypes import FLOATING, Array
from pared.readers.listing import ListedTensor, Listing
from pared.readers.naming import HOLDERS, without_wrappers


@dataclass(frozen=True)
class Kept:
    """A tensor of the model.

    Args:
        held: the tensor in the file.
        names: that the model knows it by; several where it is tied.
        kind: whether it is taken for a parameter or for a buffer, by its type and name: files do not say.
    """

    held: ListedTensor
    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the model does not need, or whose numbers are kept under another name.

    Args:
        name: in the file.
        nbytes: of its elements.
        because: why, in words.
        kind: "optimizer-state", "two-copies", "duplicate" or "ballast".
    """

    name: str
    nbytes: int
    because: str
    kind: str


@dataclass(frozen=True)
class Selection:
    """The tensors of a listing, divided.

    Args:
        kept: what the model is, each tensor once, in the file's order.
        left_out: the rest. A tensor with the numbers of another is here, and its name among those of the other.
    """

    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]


# Entries, at the top of a checkpoint, of what only training needs.
_TRAINING: Final = re.compile(
    r"(?i)(.*_)?optim|(.*_)?opt(_state.*)?$|.*optimizer|.*scheduler|(.*_|grad|loss)?scaler|amp$|grad(s|_.*|ients?)?$"
)
_RANDOM: Final = re.compile(r"(?i)(.*_)?rng(_|$)|random_state")
# What optimizers keep for each weight, whatever the dictionary is called.
_MOMENTS: Final = re.compile(r".*[/.](exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta)$")
# Before the names of a folder's tensors that are not in its main file.
_IN_FILE: Final = re.compile(r"((?:[^/]+/)*?[^/]+\.(?:safetensors|pt|pth|bin|ckpt|pt2|onnx|gguf|npz|npy))/")
# Where a pickled LSTM or GRU holds its weights a second time.
_AGAIN: Final = re.compile(r"(.*[./])?_flat_weights/\d+$")
# The attributes of a module through which a pickle reaches its tensors.
_ATTRIBUTES: Final = ("_modules", "_parameters", "_buffers")
# Intel Neural Compressor 2.x registers the float model beside the one that it has quantized.
_FLOAT_COPY: Final = "fp32_model."
_QUANTIZED_COPY: Final = "_model."
_BUFFERS: Final = re.compile(r"(.*\.)?(running_mean|running_var|num_batches_tracked)$")

# Numbers are compared of tensors of so many bytes and more: small ones are often equal by chance (all ones, all zeros).
_COMPARED: Final = 1 << 14
_BLOCK: Final = 1 << 22  # bytes compared at a time
_FIRST: Final = 1024  # numbers that tell most tensors apart

_Named = tuple[str, ListedTensor]
_Verdict = tuple[str, str]  # why a tensor is left out, and the kind


def select(listing: Listing, *, compare: bool = True) -> Selection:
    """Divide the tensors of a file into the model and the rest.

    Args:
        listing: of a file or folder.
        compare: whether the numbers of large tensors of equal type and shape are compared, so that what stands in
            the file twice is kept once; with False no number is read.

    >>> held = [ListedTensor(name, "float32", (2,), 8, name) for name in ("model/w", "optimizer/state/0/exp_avg")]
    >>> found = select(Listing(tuple(held)), compare=False)
    >>> [kept.names for kept in found.kept], [left.kind for left in found.left_out]
    ([('w',)], ['optimizer-state'])
    """
    left: list[LeftOut] = []
    named = [(held.name if listing.flat else _path(held.name), held) for held in listing.tensors]
    named = _divided(named, _not_of_a_model, left)
    if not listing.flat:
        named = _divided(named, _for_training, left)
        named = _main_file(named, left)
        named = _innermost(named, left)
    named = _one_copy(named, left)
    return Selection(tuple(_together(listing, named, compare, left)), tuple(left))


def _divided(named: Sequence[_Named], judge: Callable[[_Named], _Verdict | None], left: list[LeftOut]) -> list[_Named]:
    """What is not judged; the rest is added to what is left out."""
    kept = []
    for one in named:
        verdict = judge(one)
        if verdict is None:
            kept.append(one)
        else:
            because, kind = verdict
            nbytes = 0 if kind == "duplicate" else one[1].nbytes  # the first name has its bytes
            left.append(LeftOut(one[1].name, nbytes, because, kind))
    return kept


def _path(name: str) -> str:
    """A name with dots between modules, where the file has the attributes of pickled modules there.

    >>> _path("model/_modules/encoder/_parameters/weight"), _path("model/encoder.weight")
    ('model/encoder.weight', 'model/encoder.weight')
    """
    parts = name.split("/")
    first = next((i for i, part in enumerate(parts) if part in _ATTRIBUTES), len(parts))
    inside = ".".join(part for part in parts[first:] if part not in _ATTRIBUTES)
    return "/".join([*parts[:first], inside] if inside else parts[:first])


def _not_of_a_model(one: _Named) -> _Verdict | None:
    """What is no part of a model, whatever stands beside it."""
    name, held = one
    if held.storage is None:
        return "it holds no numbers (a tensor on the meta device)", "ballast"
    if _MOMENTS.match(name):
        return "the state of an optimizer, which only training needs", "optimizer-state"
    if _AGAIN.match(name):
        return "the weights of a recurrent layer, which its pickle names a second time", "duplicate"
    return None


def _for_training(one: _Named) -> _Verdict | None:
    """What a checkpoint keeps beside its model, to go on with training."""
    top, nested, _ = one[0].partition("/")
    if _RANDOM.match(top):
        return "the state of random numbers, which only training needs", "optimizer-state"
    if nested and _TRAINING.match(top):
        return "the state of an optimizer, which only training needs", "optimizer-state"
    return None


def file_of(held: ListedTensor) -> str | None:
    """The file of a folder that a tensor is in, where its name says so.

    >>> file_of(ListedTensor("unet/model.safetensors/w", "float32", (2,), 8, "w"))
    'unet/model.safetensors'
    """
    found = _IN_FILE.match(held.name)
    return found[1] if found else None


def _main_file(named: list[_Named], left: list[LeftOut]) -> list[_Named]:
    """Of a folder's files the one, or the shards, whose tensors have plain names."""
    plain = {name for name, _ in named if not _IN_FILE.match(name)}
    if plain:
        return _divided(named, lambda one: _in_another_file(one, plain), left)
    if len({found[1] for name, _ in named if (found := _IN_FILE.match(name))}) == 1:
        return [(_IN_FILE.sub("", name), held) for name, held in named]
    return named


def _in_another_file(one: _Named, plain: Container[str]) -> _Verdict | None:
    found = _IN_FILE.match(one[0])
    if found is None:
        return None
    if one[0][found.end() :] in plain:
        return f"a copy of the model, in {found[1]}", "two-copies"
    return f"in another file of the folder, {found[1]}", "ballast"


def _innermost(named: list[_Named], left: list[LeftOut]) -> list[_Named]:
    """The tensors of the dictionary that holds the model, with their names in it."""
    while True:
        tops = {name.partition("/")[0] if "/" in name else "" for name, _ in named}
        main: str | None = next((top for top in HOLDERS if top in tops), None)
        if len(tops) == 1 and "" not in tops:
            (main,) = tops
        if main is None:
            return [(name.replace("/", "."), held) for name, held in named]
        inside = f"{main}/"
        named = [
            (name.removeprefix(inside), held)
            for name, held in _divided(named, lambda one, inside=inside: _beside(one, inside), left)  # type: ignore[misc]  # bound now
        ]


def _beside(one: _Named, inside: str) -> _Verdict | None:
    name = one[0]
    if name.startswith(inside):
        return None
    if name.partition("/")[0] in HOLDERS:
        return f"another copy of the model, beside {inside!r}", "two-copies"
    return f"it stands beside the model, which is {inside!r}", "ballast"


def _one_copy(named: list[_Named], left: list[LeftOut]) -> list[_Named]:
    """Of a float model and its quantized copy only the former; and no name with what wrappers put into it."""
    if all(any(name.startswith(prefix) for name, _ in named) for prefix in (_FLOAT_COPY, _QUANTIZED_COPY)):
        named = _divided(named, _beside_float_copy, left)
        named = [(name.removeprefix(_FLOAT_COPY), held) for name, held in named]
    names = without_wrappers([name for name, _ in named])
    return [(name, held) for name, (_, held) in zip(names, named, strict=True)]


def _beside_float_copy(one: _Named) -> _Verdict | None:
    if one[0].startswith(_FLOAT_COPY):
        return None
    return f"a second copy of the model, which {_FLOAT_COPY!r} holds in float", "two-copies"


def _together(listing: Listing, named: Sequence[_Named], compare: bool, left: list[LeftOut]) -> list[Kept]:
    """Tensors with the same numbers, under all their names: tied ones, and those of which the file has copies."""
    kept: list[Kept] = []
    places: dict[object, int] = {}
    forms: dict[object, list[int]] = {}  # which of the tensors that are kept may have the numbers of another
    for name, held in named:
        place = (held.storage, held.offset, held.dtype, held.shape, held.stride)
        alike = forms.setdefault(_form(listing, held), []) if compare else []
        twin = places.get(place) if held.nbytes else None
        tied = twin is not None
        if twin is None:
            twin = next((i for i in alike if _equal(listing, held, kept[i].held)), None)
        if twin is None:
            twin = len(kept)
            alike.append(twin)
            kept.append(Kept(held, (name,), _kind(name, held)))
        else:
            first = kept[twin]
            kept[twin] = replace(first, names=(*first.names, name))
            because = f"{'tied to' if tied else 'a copy of'} {first.held.name}: stored once, under both names"
            left.append(LeftOut(held.name, 0 if tied else held.nbytes, because, "duplicate"))
        places.setdefault(place, twin)
    return kept


def _kind(name: str, held: ListedTensor) -> Literal["parameter", "buffer"]:
    return "parameter" if held.dtype in FLOATING and not _BUFFERS.match(name) else "buffer"


def _form(listing: Listing, held: ListedTensor) -> object:
    """What tensors with the same numbers have in common: type, shape and a checksum of the first ones.

    Nothing, where it is not worth finding out, or where strides of 0 make much of little.
    """
    large = held.nbytes >= _COMPARED and len(held.shape) > 1 and 0 not in (held.stride or ())
    array = listing.array(held) if large and held.dtype in FLOATING else None
    return object() if array is None else (held.dtype, held.shape, zlib.crc32(array[0].flat[:_FIRST]))


def _equal(listing: Listing, one: ListedTensor, other: ListedTensor) -> bool:
    """Whether two tensors of equal type and shape have the same bits."""
    arrays = listing.array(one), listing.array(other)
    if arrays[0] is None or arrays[1] is None:
        return False
    first, second = (_bits(array) for array in arrays if array is not None)
    rows = max(1, _BLOCK * len(first) // one.nbytes)
    starts = range(0, len(first), rows)
    return all(np.array_equal(first[start : start + rows], second[start : start + rows]) for start in starts)


def _bits(array: Array) -> Array:
    """The numbers as whole numbers: NaN equals itself, and -0 is not 0."""
    return array.view(f"u{array.itemsize}")
