"""What an index says beside tensors: the extra state of modules, and buffers that are left to constructors; checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pared.artifact.index import STATE, Entry
from pared.files.checks import Place
from pared.formats.dtypes import ITEM_SIZES, TYPES

DEVICE: Final = re.compile(r"(cpu|meta|cuda|mps|xpu)(:[0-9]{1,3})?")
_DEEPEST: Final = 70  # each container of a state takes two levels of JSON
_LISTS: Final = ("tuple", "set", "frozenset", "size")
_PAIRS: Final = ("dict", "ordered")
_REFERENCES: Final[Mapping[str, tuple[str, ...]]] = {
    "tensor": tuple(ITEM_SIZES),
    "array": tuple(ITEM_SIZES),
    **dict.fromkeys(("bytes", "bytearray", "stream"), ("uint8",)),
}
_UNHASHABLE: Final = ("set", "frozenset", "dict", "ordered", "tensor", "array", "bytearray", "stream")


def check_states(states: Mapping[str, Any], entries: Sequence[Entry], at: Place) -> None:
    """Check the trees of extra states, and that each of their tensors is there and used.

    Raises:
        CorruptError: they are not as `docs/format.md` says.
    """
    parts = {entry.name: entry for entry in entries if entry.kind == STATE}
    used: set[str] = set()
    for name, tree in states.items():
        here = Place(f"{at.place}: {name}")
        if name.rpartition(".")[2] != "_extra_state":
            here.fail("its name is not that of an extra state")
        own: set[str] = set()
        _check_tree(tree, name, parts, own, 0, here)
        if own != {f"{name}/{i}" for i in range(len(own))}:
            here.fail("its tensors are not numbered one after the other")
        used |= own
    for name, entry in parts.items():
        if name not in used or len(entry.names) > 1 or entry.format["tag"] != "raw":
            at.fail(f"{name!r} is part of no extra state, or not stored as it is")


def _check_tree(tree: object, name: str, parts: Mapping[str, Entry], used: set[str], depth: int, at: Place) -> None:
    if depth > _DEEPEST:
        at.fail("it nests too deeply")
    if isinstance(tree, list):
        for one in tree:
            _check_tree(one, name, parts, used, depth + 1, at)
        return
    if not isinstance(tree, dict):
        return
    if len(tree) != 1:
        at.fail("an object in it has not exactly one key")
    ((kind, inside),) = tree.items()
    if kind in _LISTS:
        for one in at.sequence(inside, f"a {kind}"):
            if kind in ("set", "frozenset"):
                _check_key(one, at)
            if kind == "size":
                at.whole(one, "a size")
            _check_tree(one, name, parts, used, depth + 1, at)
    elif kind in _PAIRS:
        for pair in at.sequence(inside, f"a {kind}"):
            if len(at.sequence(pair, "a pair")) != 2:
                at.fail(f"a {kind} in it has something that is not a pair")
            _check_key(pair[0], at)
            for one in pair:
                _check_tree(one, name, parts, used, depth + 1, at)
    elif kind in _REFERENCES:
        entry = parts.get(f"{name}/{at.whole(inside, 'a place')}")
        if entry is None or entry.dtype not in _REFERENCES[kind]:
            at.fail(f"a {kind} in it is missing")
        if _REFERENCES[kind] == ("uint8",) and len(entry.shape) != 1:
            at.fail(f"a {kind} in it is not a row of bytes")
        used.add(entry.name)
    else:
        _check_scalar(kind, inside, at)


def _check_key(key: object, at: Place) -> None:
    """Refuse what Python cannot hash."""
    if isinstance(key, list) or (isinstance(key, dict) and next(iter(key), "") in _UNHASHABLE):
        at.fail("a key in it is not a plain value")
    if isinstance(key, dict):
        inside = next(iter(key.values()), None)
        for one in inside if isinstance(inside, list) else ():
            _check_key(one, at)


def _check_scalar(kind: str, inside: object, at: Place) -> None:
    if kind == "float":
        at.one_of(inside, ("nan", "inf", "-inf"), "a float in it")
    elif kind == "dtype":
        at.one_of(inside, tuple(TYPES), "an element type in it")
    elif kind == "device":
        if not DEVICE.fullmatch(at.text(inside, "a device in it")):
            at.fail("it holds a device of an unknown kind")
    elif kind == "complex":
        if len([at.number(one, "a part of a number") for one in at.sequence(inside, "a complex number")]) != 2:
            at.fail("a complex number in it has not two parts")
    else:
        at.fail(f"it holds a {kind[:40]!r}, which this version does not know")


def parse_made(value: object, at: Place) -> tuple[dict[str, Any], ...]:
    """Check the list of buffers that are left to the constructor of their class.

    Raises:
        CorruptError: it is not as `docs/format.md` says.
    """
    found = []
    for one in at.sequence(value, "the list of buffers that are made"):
        known = at.fields(one, "a buffer that is made", ("names", "dtype", "shape", "sample"))
        names = [at.text(name, "a name") for name in at.sequence(known["names"], "its names")]
        if not names:
            at.fail("a buffer that is made has no name")
        here = Place(f"{at.place}: {names[0]}")
        dtype = here.one_of(known["dtype"], ITEM_SIZES, "its dtype")
        shape = here.shape(known["shape"], "shape")
        sample = [
            None if v is None else here.number(v, "its sample") for v in here.sequence(known["sample"], "its sample")
        ]
        if any(v is not None and not math.isfinite(v) for v in sample) or len(sample) > 2 * _SAMPLED:
            here.fail("its sample is not a few finite numbers")
        found.append({"names": names, "dtype": dtype, "shape": list(shape), "sample": sample})
    return tuple(found)


_SAMPLED: Final = 16
