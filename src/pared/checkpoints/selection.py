"""Which tensors of a file belong to the model, and under which names; what else is in it, and why it is not needed.

A checkpoint keeps the weights in a dictionary beside the state of an optimizer; some files hold the model twice. The
rules here go by names, as people choose them, and by where the numbers are stored; numbers are compared only between
tensors of equal type and shape. Nothing here uses torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Literal

import numpy as np

from pared.errors import FileError
from pared.formats.dtypes import FLOATING
from pared.readers.listing import EXTRA_STATE, ListedTensor, Listing, Storage
from pared.readers.naming import HOLDERS, without_wrappers


@dataclass(frozen=True)
class Kept:
    """A tensor of the model.

    Args:
        held: the tensor in the file.
        names: the model's names for it; several if it is tied.
        kind: parameter or buffer, judged by type and name: files do not say; or part of a module's extra state.
        quantized: how its checkpoint was quantized before; empty if it was not.
    """

    held: ListedTensor
    names: tuple[str, ...]
    kind: Literal["parameter", "buffer", "state"]
    quantized: str = ""

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def exact(self) -> str:
        """Why it must not be rounded: it is extra state of a module, or quantized already; empty if it may be."""
        state = self.kind == "state" or self.name.rpartition(".")[2] == EXTRA_STATE
        return self.quantized or ("extra state" if state else "")


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the model does not need, or whose numbers are kept under another name.

    Args:
        name: its name in the file.
        nbytes: the size of its elements.
        because: the reason, for users.
        kind: "optimizer-state", "two-copies", "duplicate" or "ballast".
    """

    name: str
    nbytes: int
    because: str
    kind: str


@dataclass(frozen=True)
class Selection:
    """The tensors of a listing, divided into the model and the rest.

    Args:
        kept: the model's tensors, each once, in the file's order.
        left_out: all others. A duplicate of another tensor is here too; its name is among the other's names.
    """

    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]


# Top-level entries of a checkpoint that only training needs.
_TRAINING: Final = re.compile(
    r"(?i)(.*_)?optim|(.*_)?opt(_state.*)?$|.*optimizer|.*scheduler|(.*_|grad|loss)?scaler|amp$|grad(s|_.*|ients?)?$"
)
_RANDOM: Final = re.compile(r"(?i)(.*_)?rng(_|$)|random_state")
# What optimizers keep for each weight, whatever their dictionary is called.
_MOMENTS: Final = re.compile(r".*[/.](exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta)$")
# The prefix of a folder's tensors that are not in its main file.
_IN_FILE: Final = re.compile(r"((?:[^/]+/)*?[^/]+\.(?:safetensors|pt|pth|bin|ckpt|pt2|onnx|gguf|npz|npy))/")
# A pickled LSTM or GRU holds its weights here a second time.
_AGAIN: Final = re.compile(r"(.*[./])?_flat_weights/\d+$")
# The attributes of a module through which a pickle reaches its tensors.
_ATTRIBUTES: Final = ("_modules", "_parameters", "_buffers")
# Intel Neural Compressor 2.x registers the float model beside the one that it has quantized.
_FLOAT_COPY: Final = "fp32_model."
_QUANTIZED_COPY: Final = "_model."
_ADAPTER: Final = "adapter_model"
_BUFFERS: Final = re.compile(r"(.*\.)?(running_mean|running_var|num_batches_tracked)$")

# Only tensors of at least this size are compared: small ones are often equal by chance (all ones, all zeros).
_COMPARED: Final = 1 << 14
_BLOCK: Final = 1 << 22  # bytes compared at a time
_FIRST: Final = 1024  # numbers in a checksum that tells most tensors apart

_STATES: Final = "(extra state)"  # instead of a storage

_Named = tuple[str, ListedTensor]
_Verdict = tuple[str, str]  # why a tensor is left out, and the kind of finding


def select(listing: Listing, *, compare: bool = True) -> Selection:
    """Divide the tensors of a file into the model and the rest.

    Args:
        listing: the file or folder.
        compare: whether to compare the numbers of large tensors of equal type and shape, so that duplicates are kept
            once; if False, no numbers are read.

    >>> held = [ListedTensor(name, "float32", (2,), 8, name) for name in ("model/w", "optimizer/state/0/exp_avg")]
    >>> found = select(Listing(tuple(held)), compare=False)
    >>> [kept.names for kept in found.kept], [left.kind for left in found.left_out]
    ([('w',)], ['optimizer-state'])
    """
    left: list[LeftOut] = []
    named = [(held.name if listing.flat or held.key else _path(held.name), held) for held in listing.tensors]
    named = _divided(named, _not_of_a_model, left)
    if not listing.flat:
        named = _divided(named, _for_training, left)
        named = _main_file(named, left)
        named = _innermost(named, left)
    named = _one_copy(named, left, adapter=is_adapter(listing))
    return Selection(tuple(_together(listing, named, compare, left)), tuple(left))


@dataclass(frozen=True)
class Contained:
    """What a checkpoint holds of a model.

    Args:
        listing: the checkpoint, with the bytes of extra state as storages.
        kept: the model's tensors, then those in its extra state.
        states: extra state as trees of JSON, by the model's names.
        left_out: all other tensors.
    """

    listing: Listing
    kept: tuple[Kept, ...]
    states: Mapping[str, Any]
    left_out: tuple[LeftOut, ...]


def contained(listing: Listing) -> Contained:
    """Divide a checkpoint as `select` does, with the extra state of its modules.

    Raises:
        FileError: a state is more than plain data.
    """
    if not listing.states:
        chosen = select(listing)
        return Contained(listing, chosen.kept, {}, chosen.left_out)
    inside = tuple(f"{name}/" for name in listing.states)
    # Each state is selected by its name, like a tensor without numbers.
    markers = (ListedTensor(name, "uint8", (0,), 0, _STATES) for name in listing.states)
    plain = (held for held in listing.tensors if not held.name.startswith(inside))
    chosen = select(replace(listing, tensors=(*plain, *markers)))
    kept = [one for one in chosen.kept if one.held.storage != _STATES]
    storages, states = dict(listing.storages), {}
    for marker in (one for one in chosen.kept if one.held.storage == _STATES):
        state = listing.states[marker.held.name]
        if state.problem:
            raise FileError(
                f"its extra state {state.problem}, which only a pickle could store",
                where=f"{listing.where}: {marker.held.name}",
                remedy="Let get_extra_state return plain data: numbers, texts, bytes, tensors, and lists, tuples and "
                "dicts of them. Or delete the state from the checkpoint, if the model works without it.",
            )
        states[marker.name] = state.tree
        for i, part in enumerate(state.parts):
            name = f"{marker.name}/{i}"
            held = (
                part if isinstance(part, ListedTensor) else ListedTensor(name, "uint8", (len(part),), len(part), name)
            )
            if isinstance(part, bytes):
                storages[name] = Storage(len(part), partial(_view, part), coded=True)
            kept.append(Kept(held, (name,), "state"))
    left = tuple(one for one in chosen.left_out if one.name not in listing.states)
    return Contained(replace(listing, storages=storages), tuple(kept), states, left)


def _view(content: bytes) -> memoryview:
    return memoryview(content)


def _divided(named: Sequence[_Named], judge: Callable[[_Named], _Verdict | None], left: list[LeftOut]) -> list[_Named]:
    """The tensors for which `judge` has no verdict; all others are appended to `left`."""
    kept = []
    for one in named:
        verdict = judge(one)
        if verdict is None:
            kept.append(one)
        else:
            because, kind = verdict
            nbytes = 0 if kind == "duplicate" else one[1].nbytes  # its bytes count for the first name
            left.append(LeftOut(one[1].name, nbytes, because, kind))
    return kept


def _path(name: str) -> str:
    """A name with dots between modules, without the attributes through which pickled modules are reached.

    >>> _path("model/_modules/encoder/_parameters/weight"), _path("model/encoder.weight")
    ('model/encoder.weight', 'model/encoder.weight')
    """
    parts = name.split("/")
    first = next((i for i, part in enumerate(parts) if part in _ATTRIBUTES), len(parts))
    inside = ".".join(part for part in parts[first:] if part not in _ATTRIBUTES)
    return "/".join([*parts[:first], inside] if inside else parts[:first])


def _not_of_a_model(one: _Named) -> _Verdict | None:
    """The verdict on a tensor that belongs to no model, whatever else the file holds."""
    name, held = one
    if held.storage is None:
        return "it holds no numbers (a tensor on the meta device)", "ballast"
    if _MOMENTS.match(name):
        return "the state of an optimizer, which only training needs", "optimizer-state"
    if _AGAIN.match(name):
        return "the weights of a recurrent layer, which its pickle lists a second time", "duplicate"
    return None


def _dictionaries(one: _Named) -> str:
    """The dictionaries around a tensor, each with a slash behind it.

    >>> _dictionaries(("model/w", ListedTensor("model/w", "float32", (2,), 8, "w")))
    'model/'
    >>> _dictionaries(("model/a/b", ListedTensor("model/a/b", "float32", (2,), 8, "w", key="a/b")))
    'model/'
    """
    name, held = one
    return name.removesuffix(held.key) if held.key else name[: name.rfind("/") + 1]


def _for_training(one: _Named) -> _Verdict | None:
    """The verdict on what a checkpoint keeps beside its model in order to resume training."""
    top, nested, _ = _dictionaries(one).partition("/")
    top = top or one[0]
    if _RANDOM.match(top):
        return "the state of a random number generator, which only training needs", "optimizer-state"
    if nested and _TRAINING.match(top):
        return "the state of an optimizer, which only training needs", "optimizer-state"
    return None


def file_of(held: ListedTensor) -> str | None:
    """The file of a folder that a tensor is in, if its name starts with it.

    >>> file_of(ListedTensor("unet/model.safetensors/w", "float32", (2,), 8, "w"))
    'unet/model.safetensors'
    """
    found = _IN_FILE.match(held.name)
    return found[1] if found else None


def _main_file(named: list[_Named], left: list[LeftOut]) -> list[_Named]:
    """The tensors of a folder's main file, or of its shards: those without a file's name as prefix."""
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
    """The tensors of the innermost dictionary that holds the model, with their names in it."""
    while True:
        tops = {_dictionaries(one).partition("/")[0] for one in named}
        main: str | None = next((top for top in HOLDERS if top in tops), None)
        if len(tops) == 1 and "" not in tops:
            (main,) = tops
        if main is None:
            return [
                (_dictionaries(one).replace("/", ".") + (one[1].key or one[0].rpartition("/")[2]), one[1])
                for one in named
            ]
        inside = f"{main}/"
        named = [
            (name.removeprefix(inside), held)
            for name, held in _divided(named, lambda one, inside=inside: _beside(one, inside), left)  # type: ignore[misc]  # bound now
        ]


def _beside(one: _Named, inside: str) -> _Verdict | None:
    name = one[0]
    if name.startswith(inside):
        return None
    if _dictionaries(one).partition("/")[0] in HOLDERS:
        return f"another copy of the model, beside {inside!r}", "two-copies"
    return f"it is outside of the model, which is in {inside!r}", "ballast"


def is_adapter(listing: Listing) -> bool:
    """Whether a listing is that of an adapter of PEFT, which finds its tensors by the prefix of its wrapper."""
    return any(PurePath(name).name.startswith(_ADAPTER) for name in listing.files or (listing.where,))


def _one_copy(named: list[_Named], left: list[LeftOut], *, adapter: bool) -> list[_Named]:
    """Keep only the float model where a quantized copy is beside it; remove what wrappers add to names."""
    if adapter:
        return named
    if all(any(name.startswith(prefix) for name, _ in named) for prefix in (_FLOAT_COPY, _QUANTIZED_COPY)):
        second = f"a second copy of the model, which {_FLOAT_COPY!r} holds in float", "two-copies"
        named = _divided(named, lambda one: None if one[0].startswith(_FLOAT_COPY) else second, left)
        named = [(name.removeprefix(_FLOAT_COPY), held) for name, held in named]
    names = without_wrappers([name for name, _ in named])
    return [(name, held) for name, (_, held) in zip(names, named, strict=True)]


def _together(listing: Listing, named: Sequence[_Named], compare: bool, left: list[LeftOut]) -> list[Kept]:
    """Tensors with all their names: tied tensors and copies of one tensor are joined."""
    kept: list[Kept] = []
    places: dict[object, int] = {}
    forms: dict[object, list[int]] = {}  # indexes of kept tensors that may equal another
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
    """A key that equal tensors share: type, shape and a checksum of the first numbers.

    Unique for small tensors, and for those that strides of 0 expand: they are not compared.
    """
    large = held.nbytes >= _COMPARED and len(held.shape) > 1 and 0 not in (held.stride or ())
    array = listing.array(held) if large and held.dtype in FLOATING else None
    return object() if array is None else (held.dtype, held.shape, zlib.crc32(array[0].flat[:_FIRST]))


def _equal(listing: Listing, one: ListedTensor, other: ListedTensor) -> bool:
    """Whether two tensors of equal type and shape have the same bits."""
    arrays = listing.array(one), listing.array(other)
    if arrays[0] is None or arrays[1] is None:
        return False
    # As integers, NaN equals itself, and -0 differs from 0.
    first, second = (array.view(f"u{array.itemsize}") for array in arrays if array is not None)
    rows = max(1, _BLOCK * len(first) // one.nbytes)
    starts = range(0, len(first), rows)
    return all(np.array_equal(first[start : start + rows], second[start : start + rows]) for start in starts)
