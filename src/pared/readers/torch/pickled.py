"""The tensors that a pickle of torch describes: in nested dictionaries, whole modules and scripted modules."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from pared.errors import UnsafeError
from pared.files.checks import Place
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Name, Node, Persistent
from pared.formats.dtypes import TYPES
from pared.readers.listing import ListedTensor
from pared.readers.torch.names import (
    REBUILD,
    REBUILD_META,
    REBUILD_PARAMETER,
    REBUILD_SUBCLASS,
    REBUILD_WITH_TYPE,
    STORAGES,
    UNUSUAL,
)

_DEEPEST: Final = 100
_ENTERED_NBYTES: Final = 96  # never given back
_STEP_NBYTES: Final = 512  # of a node whose contents are being visited, beside its name
# A module that is reached again takes time, though no more memory, and modules that hold each other twice unfold
# without end. Charging this much for each further visit bounds their number.
_AGAIN_NBYTES: Final = 3000
_HELD_NBYTES: Final = 240  # beside its name and its shape
_SIZE_NBYTES: Final = 16
_FEW: Final = 8  # things in a node that are looked through whenever it is met
_PAIR_NBYTES: Final = 16  # of an object's state, which is searched at each place of the object
# The dictionaries of a module; their names are not part of the names in its state dict.
_PARTS: Final = ("_parameters", "_buffers", "_modules")
_SCRIPTED: Final = "__torch__."


@dataclass(frozen=True, slots=True)
class _Step:
    """A node that is still to be visited.

    Args:
        name: the path to it.
        node: the node.
        path: whether the name is that of a module, to which the names of its tensors are joined by a dot.
        modules: the ids of the enclosing modules; None unless the node is a child module.
        depth: how deeply it is nested.
        unusual: what its tensors are parts of, if that is a tensor whose numbers they are not.
        key: the key at the end of the name, if there are slashes in it.
    """

    name: str
    node: Node
    path: bool = False
    modules: tuple[int, ...] | None = None
    depth: int = 0
    unusual: str = ""
    key: str = ""


def tensors_of(root: object, sizes: Mapping[str, int], where: str, memory: MemoryLimit) -> Iterator[ListedTensor]:
    """All tensors that a pickle describes, under the names that a state dict would give them.

    Each container is entered once, so that the walk ends; a module with several places in another is listed at each.

    Args:
        root: the root from `read_pickle`.
        sizes: the size of each storage in bytes.
        where: the file's name, for error messages.
        memory: for names and tensors, which may be far longer than the pickle.
    """
    entered: set[int] = set()
    # Of each node that is being visited the contents that are left, and what those and the node take.
    waiting = [(iter([_Step("", root)] if isinstance(root, Node) else []), 0, 0)]
    while waiting:
        inside, nbytes, each = waiting[-1]
        step = next(inside, None)
        if step is None:
            memory.give(nbytes)
            waiting.pop()
            continue
        if step.depth > _DEEPEST:
            raise UnsafeError(
                "its pickle nests containers deeper than any state dict",
                where=where,
                remedy="Do not use this file.",
            )
        memory.take(each)
        node, call, arguments = _resolved(step.node)
        if call in REBUILD or call == REBUILD_META:
            memory.take(_HELD_NBYTES + sys.getsizeof(step.name))
            held = _held(step.name, call, arguments, sizes, Place(f"{where}: {step.name}"))
            memory.take(_SIZE_NBYTES * len(held.shape))
            unusual = step.unusual or _view(arguments)
            yield replace(held, key=step.key, dtype=unusual or held.dtype) if unusual or step.key else held
        memory.take(_PAIR_NBYTES * len(node.states))
        memory.take(_PAIR_NBYTES * sum(len(state.pairs) for state in node.states if isinstance(state, Node)))
        again = step.modules is not None and _is_module(node) and id(node) not in step.modules
        known = id(node) in entered
        if _is_leaf(node) or (known and not again):
            continue
        entered.add(id(node))
        nbytes = _STEP_NBYTES + sys.getsizeof(step.name)
        memory.take(nbytes + (0 if known else _ENTERED_NBYTES))
        unusual = step.unusual or UNUSUAL.get(call, "")
        waiting.append((_inside(step, node, arguments, unusual), nbytes, _AGAIN_NBYTES if known else 0))


def _is_leaf(node: Node) -> bool:
    """Whether there is no tensor in a node of a few things: it is a tensor, for instance. Others are looked through."""
    return all(not isinstance(one, Node) or _is_plain(one) for one in _few(node))


def _is_plain(node: Node) -> bool:
    """Whether a node is not a tensor, and holds a few plain values at most: the shape of one, for instance."""
    is_tensor = isinstance(node.call, Name) and (node.call.path in REBUILD or node.call.path == REBUILD_META)
    return not is_tensor and not any(isinstance(one, Node) for one in _few(node))


def _few(node: Node) -> Sequence[object]:
    """What a node holds; itself if that is many things."""
    if len(node.arguments) + len(node.values) + len(node.pairs) + len(node.states) > _FEW:
        return (node,)
    return (*node.arguments, *node.values, *(value for _, value in node.pairs), *node.states)


def _view(arguments: Sequence[object]) -> str:
    """What a tensor is, if its numbers are not those of its storage: that is in the last argument of `REBUILD[1]`."""
    facts = arguments[6].pairs if len(arguments) > 6 and isinstance(arguments[6], Node) else ()
    return next((f"{key} view" for key, value in facts if key in ("conj", "neg") and value is True), "")


def tensor_of(node: Node, name: str, sizes: Mapping[str, int], at: Place) -> ListedTensor | None:
    """The tensor that a node describes; None if it describes something else."""
    _, call, arguments = _resolved(node)
    return _held(name, call, arguments, sizes, at) if call in REBUILD or call == REBUILD_META else None


def _resolved(node: Node) -> tuple[Node, str, Sequence[object]]:
    """The tensor inside a parameter or subclass, the function that would make it, and its arguments."""
    for _ in range(4):  # a tensor never has more wrappers than that
        call = node.call.path if isinstance(node.call, Name) else ""
        first = node.arguments[0] if node.arguments else None
        if call in REBUILD_PARAMETER and isinstance(first, Node):
            node = first
        elif call == REBUILD_SUBCLASS and isinstance(first, Name) and len(node.arguments) > 2:
            inner = node.arguments[2]
            return node, first.path, (*inner.values, *node.arguments[3:]) if isinstance(inner, Node) else ()
        else:
            break
    return node, node.call.path if isinstance(node.call, Name) else "", node.arguments


def _inside(step: _Step, node: Node, arguments: Sequence[object], unusual: str) -> Iterator[_Step]:
    """The named contents of a node; arguments of a call have the name of its result."""
    depth = step.depth + 1
    if _is_module(node):
        separator = "." if step.path else "/"
        above = (*(step.modules or ()), id(node))
        for key, value, is_module in _parts(node):
            name = _join(step.name, key, separator)
            yield _Step(name, value, True, above if is_module else None, depth, unusual)
        return
    inner_nodes = (one for one in arguments if isinstance(one, Node))
    yield from (_Step(step.name, one, False, None, depth, unusual, step.key) for one in inner_nodes)
    # The state of an object is its dictionary, or a tuple of anything.
    states = [state for state in node.states if isinstance(state, Node)]
    held = (node, *states)
    for key, inner in chain(*(enumerate(one.values) for one in held), *(one.pairs for one in held)):
        if isinstance(inner, Node):
            with_slash = _join("", key, "") if isinstance(key, str) and "/" in key else ""
            yield _Step(_join(step.name, key, "/"), inner, False, None, depth, unusual, with_slash)


def _is_module(node: Node) -> bool:
    if isinstance(node.call, Name) and node.call.path.startswith(_SCRIPTED):
        return True
    return any(key in ("_modules", "_parameters") for s in node.states if isinstance(s, Node) for key, _ in s.pairs)


def _parts(node: Node) -> Iterator[tuple[object, Node, bool]]:
    """The contents of a module as (key, node, whether it is a child module), parameters and buffers first."""
    scripted = isinstance(node.call, Name) and node.call.path.startswith(_SCRIPTED)
    states = [state for state in node.states if isinstance(state, Node)]
    attributes = [(key, value) for state in states for key, value in state.pairs if isinstance(value, Node)]
    for part in () if scripted else _PARTS:
        for key, group in attributes:
            if key == part:
                yield from ((k, v, part == "_modules") for k, v in group.pairs if isinstance(v, Node))
    for key, value in attributes:
        if scripted or key not in _PARTS:
            yield key, value, scripted


def _join(name: str, key: object, separator: str) -> str:
    if isinstance(key, int) and abs(key) < 1 << 63:
        key = str(key)
    # Python strings may hold surrogates, which can be neither written nor printed.
    label = key.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(key, str) else "(key)"
    return f"{name}{separator}{label}" if name else label


def _held(name: str, call: str, arguments: Sequence[object], sizes: Mapping[str, int], at: Place) -> ListedTensor:
    if call == REBUILD_META:
        kind, size, *_ = _at_least(arguments, 2, at)
        return ListedTensor(name, _element_type(kind, at), _shape(size, at), 0, None)
    reference, offset, size, stride = _at_least(arguments, 4, at)[:4]
    key, kind, shift = storage_of(reference, at)
    nbytes = _checked_size(reference, sizes, key, kind, at)
    if call == REBUILD_WITH_TYPE:
        kind = _element_type(_at_least(arguments, 7, at)[6], at)
    strides = tuple(at.whole(step, "a stride") for step in _values(stride, at))
    return view_of(name, kind, _shape(size, at), strides, at.whole(offset, "its offset") + shift, (key, nbytes), at)


def view_of(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    first: int,
    storage: tuple[str, int],
    at: Place,
) -> ListedTensor:
    """A tensor that is a view of a storage.

    Args:
        name: the tensor's name.
        dtype: its element type, one of `TYPES`.
        shape: its shape.
        stride: the distance between neighbours in each dimension, in elements.
        first: the position of its first element in the storage, in elements.
        storage: the storage's key and size in bytes.
        at: the place in the file, for error messages.

    Raises:
        CorruptError: it is not within the storage.
    """
    key, nbytes = storage
    bits = TYPES[dtype].bits
    if len(stride) != len(shape):
        at.fail(f"it has {len(shape)} sizes and {len(stride)} strides")
    reach = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    # The strides and offset of an empty tensor are meaningless.
    empty = 0 in shape
    if not empty and (reach + 1) * bits > 8 * nbytes:
        at.fail(f"it reaches beyond its storage, which has {nbytes:,} bytes")
    plain = empty or stride == tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    offset = 0 if empty else first * bits // 8
    return ListedTensor(name, dtype, shape, -(-math.prod(shape) * bits // 8), key, offset, None if plain else stride)


def storage_of(reference: object, at: Place) -> tuple[str, str, int]:
    """The key and element type of a storage that a pickle refers to, and the offset at which its numbers begin.

    Raises:
        CorruptError: it refers to something else.
    """
    fields = _at_least(reference.fields if isinstance(reference, Persistent) else (), 5, at)
    tag, kind, key, *_ = fields
    if tag != "storage" or not isinstance(kind, Name) or kind.path not in STORAGES or not isinstance(key, str):
        at.fail("it refers to something that is not a storage")
    # Before torch 1.6, a storage could be a view of another.
    view = fields[5].values if len(fields) > 5 and isinstance(fields[5], Node) else ()
    shift = at.whole(view[1], "the offset of its storage") if len(view) > 1 else 0
    return key, STORAGES[kind.path], shift


def _checked_size(reference: object, sizes: Mapping[str, int], key: str, kind: str, at: Place) -> int:
    if key not in sizes:
        at.fail(f"its storage {key[:80]!r} is missing")
    nbytes, count = sizes[key], reference.fields[4] if isinstance(reference, Persistent) else None
    expected = at.whole(count, "the size of its storage") * max(1, TYPES[kind].bits // 8)
    if nbytes != expected:
        at.fail(f"its storage {key[:80]!r} has {nbytes:,} bytes where the pickle says {expected:,}")
    return nbytes


def _at_least(values: Sequence[object], least: int, at: Place) -> Sequence[object]:
    return values if len(values) >= least else at.fail("its description in the pickle is incomplete")


def _values(value: object, at: Place) -> Sequence[object]:
    return value.values if isinstance(value, Node) else at.fail("its sizes or strides are not a list")


def _shape(value: object, at: Place) -> tuple[int, ...]:
    return at.shape(list(_values(value, at)), "shape")


def _element_type(value: object, at: Place) -> str:
    kind = value.path.removeprefix("torch.") if isinstance(value, Name) else ""
    return kind if kind in TYPES else at.fail("its element type is not one of torch's")
