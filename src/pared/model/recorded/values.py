"""Values of any type, as models take and return them: the tensors in them, copies, and whether two are equal.

Lists, dicts, dataclasses, caches and batches of any class are taken apart: into items, and into attributes. No value's
own `==` is asked, which may do anything.
"""

from __future__ import annotations

import copy
import enum
import functools
import logging
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from pared.model.copying.reach import slotted

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
_Parts = list[tuple[object, object]]  # keys, or names of attributes, and what is there
Place = tuple[tuple[type, object], ...]  # the way to a leaf: of each container its class, and a key or an attribute

_DEEPEST: Final = 100  # levels; what lies deeper is one leaf
_WIDEST: Final = 16  # bytes of a number, of which the sizes of all others are divisors
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)
_LEAVES: Final = (
    *(*_PLAIN, Tensor, np.ndarray, np.generic, nn.Module, enum.Enum, type, torch.Generator, torch.dtype, torch.device),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(weakref.ReferenceType, logging.Logger),
)


def leaves(value: object, whole: tuple[type, ...] = ()) -> Iterator[tuple[Place, object]]:
    """What a value is made of, in order, each with its place; of what is there more than once, the first.

    Args:
        value: anything.
        whole: classes that are leaves, too.

    >>> [leaf for _, leaf in leaves({"a": [1, (2, None)], "b": "text"})]
    [1, 2, None, 'text']
    """
    return _leaves(value, whole, (), {})


def _leaves(
    value: object, whole: tuple[type, ...], place: Place, seen: dict[int, object]
) -> Iterator[tuple[Place, object]]:
    parts = None if isinstance(value, (*_LEAVES, *whole)) or len(place) > _DEEPEST else _parts(value)
    if parts is None:
        yield place, value
    elif id(value) not in seen:  # a value may contain itself, or the same one twice
        seen[id(value)] = value
        for key, part in parts:
            yield from _leaves(part, whole, (*place, (type(value), key)), seen)


def _parts(value: object) -> _Parts | None:
    """The items and the attributes of a value; None for what is a leaf."""
    parts: _Parts = []
    if isinstance(value, dict):
        parts += dict.items(value)
    elif isinstance(value, (list, tuple, deque)):
        parts += enumerate(value)
    elif isinstance(value, functools.partial):
        parts += [("args", value.args), ("keywords", value.keywords)]
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        items = value if isinstance(value, dict) else {}  # some classes of dicts hold each item as an attribute as well
        parts += [(f".{name}", part) for name, part in attributes.items() if dict.get(items, name, parts) is not part]
    parts += [(f".{name}", part) for name, part in slotted(value)]
    return parts if parts or isinstance(value, (dict, list, tuple, deque)) else None


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in a value, in order.

    >>> [len(one) for one in tensors_in({"x": torch.zeros(2), "rest": [torch.zeros(3), "text"]})]
    [2, 3]
    """
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def is_transformed() -> bool:
    """Whether a function is being transformed, as by `torch.func`: tensors stand for others then."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def nbytes(value: object) -> int:
    """The bytes of the tensors and arrays in a value."""
    return sum(leaf.nbytes for _, leaf in leaves(value) if isinstance(leaf, (Tensor, np.ndarray)))


def same(a: object, b: object, equal: Callable[[Tensor, Tensor], bool] | None = None) -> bool:
    """Whether two values have the same structure and equal leaves.

    Of leaves of unknown types only the class counts, and of sets the plain members.

    Args:
        a: anything.
        b: anything.
        equal: compares two tensors; default: type, shape and all numbers, where NaN equals NaN.

    >>> same([torch.zeros(2), {"n": 1}], [torch.zeros(2), {"n": 1}]), same([1, 2], (1, 2)), same(1, True)
    (True, False, False)
    """
    return _same(a, b, equal or _equal, 0, {})


def _same(
    a: object,
    b: object,
    equal: Callable[[Tensor, Tensor], bool],
    depth: int,
    seen: dict[tuple[int, int], tuple[object, object]],
) -> bool:
    """As `same`, at a depth within two values of which pairs have been seen before."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    ours, theirs = (_inner(one, depth) for one in (a, b))
    if ours is None or theirs is None:
        return ours is theirs and _same_leaf(a, b, equal)
    pair = (id(a), id(b))
    if pair in seen:  # compared before, or still being compared
        return True
    seen[pair] = (a, b)
    return len(ours) == len(theirs) and all(
        _same_key(k, m) and _same(p, q, equal, depth + 1, seen) for (k, p), (m, q) in zip(ours, theirs, strict=True)
    )


def _inner(value: object, depth: int) -> _Parts | None:
    """The parts of a value that are compared one by one.

    Vocabularies and other tables of plain values are one leaf: there may be hundreds of calls to look at them.
    """
    parts = None if isinstance(value, _LEAVES) or depth > _DEEPEST else _parts(value)
    return None if parts is None or _are_plain(parts) else parts


def _same_key(a: object, b: object) -> bool:
    """Keys of other kinds, such as tensors, are the same by where they stand."""
    return type(a) is type(b) and (a == b or not isinstance(a, _PLAIN))


def _same_leaf(a: object, b: object, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return equal(a, b)
    if isinstance(a, torch.Generator) and isinstance(b, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.dtype.hasobject or bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if isinstance(a, (*_PLAIN, np.generic)):
        return bool(a == b) or (a != a and b != b)
    if isinstance(a, enum.Enum):
        return a is b
    x, y = (None if isinstance(one, _LEAVES) else _parts(one) for one in (a, b))
    if x is not None and y is not None and _are_plain(x) and _are_plain(y):
        return len(x) == len(y) and all(
            type(k) is type(m) and k == m and type(p) is type(q) and (p == q or (p != p and q != q))
            for (k, p), (m, q) in zip(x, y, strict=True)
        )
    if type(a) is bytearray:
        return a == b
    if isinstance(a, (set, frozenset)) and isinstance(b, (set, frozenset)):
        return len(a) == len(b) and _plain_of(a) == _plain_of(b)
    return True


def _are_plain(parts: _Parts) -> bool:
    return all(type(part) in _PLAIN and type(key) in _PLAIN for key, part in parts)


def _plain_of(values: Set[object]) -> set[object]:
    """Those members of a set that are equal where they look alike."""
    return {one for one in values if isinstance(one, _PLAIN)}


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.is_leaf and b.is_leaf and a.requires_grad != b.requires_grad:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta == b.is_meta
    a, b = a.detach(), b.detach()
    if a.is_sparse or a.layout is not torch.strided or a.is_quantized or a.is_nested:
        return a.shape == b.shape and torch.equal(_dense(a), _dense(b))
    if torch.equal(a, b):
        return True
    return (a.is_floating_point() or a.is_complex()) and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.is_nested:
        return tensor.values() if tensor.layout is torch.jagged else tensor.to_padded_tensor(0.0)
    return tensor.to_dense()


def copied(value: ValueT, known: Mapping[int, object] | None = None) -> ValueT:
    """A copy whose tensors are its own; modules are shared, and whatever Python cannot copy.

    Tensors leave their graph, and keep `requires_grad`. Tensors that share memory do so in the copy.

    Args:
        value: anything.
        known: by `id`, objects with what takes their place in the copy.
    """
    memo: dict[int, Any] = dict(known or {})
    found = [leaf for _, leaf in leaves(value) if id(leaf) not in memo]
    memo |= {id(leaf): leaf for leaf in found if isinstance(leaf, nn.Module)}
    memo |= {id(leaf): _same_draws(leaf) for leaf in found if isinstance(leaf, torch.Generator)}
    memo |= _clones([leaf for leaf in found if isinstance(leaf, Tensor)])
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001  # whatever a class makes of being copied: what cannot be is shared
        for leaf in found:
            if id(leaf) not in memo and not isinstance(leaf, _LEAVES):
                memo |= _itself(leaf)
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception as error:  # noqa: BLE001  # as above
        log.debug("a %s cannot be copied and is shared: %s", type(value).__name__, error)
        return value


def _itself(leaf: object) -> dict[int, object]:
    """A leaf that cannot be copied, by its `id`; nothing if it can."""
    try:
        copy.deepcopy(leaf)
    except Exception as error:  # noqa: BLE001  # whatever its class makes of being copied
        log.debug("a %s cannot be copied and is shared: %s", type(leaf).__name__, error)
        return {id(leaf): leaf}
    return {}


def _same_draws(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def _clones(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """A copy of each tensor, by `id`."""
    by_storage: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        key = tensor.untyped_storage().data_ptr() if _may_share(tensor) else id(tensor)
        by_storage.setdefault(key, {})[id(tensor)] = tensor
    found: dict[int, Tensor] = {}
    for group in by_storage.values():
        found |= _views(list(group.values())) or {key: _clone(tensor) for key, tensor in group.items()}
    return found


def _may_share(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory, which others may be views of."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_cpu and tensor.numel() > 0
    return plain and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _views(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Copies of tensors of any types that share memory and do so again; nothing if it is one, or they lie far apart."""
    if len(tensors) == 1:
        return {}
    low = min(one.storage_offset() * one.itemsize for one in tensors) // _WIDEST * _WIDEST
    high = max(_end(one) for one in tensors)
    if high - low > sum(one.nbytes for one in tensors) + _WIDEST:
        return {}
    source = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage(), low, (high - low,), (1,))
    base = F.pad(source, (0, (low - high) % _WIDEST))
    return {
        id(one): base.view(one.dtype)
        .as_strided(one.shape, one.stride(), one.storage_offset() - low // one.itemsize)
        .requires_grad_(one.requires_grad)
        for one in tensors
    }


def _end(tensor: Tensor) -> int:
    """The byte of its storage after its last number."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + 1 + sum(steps)) * tensor.itemsize


def _clone(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    if tensor.requires_grad and not clone.requires_grad:
        clone.requires_grad_()
    for name, value in getattr(tensor, "__dict__", {}).items():
        clone.__dict__.setdefault(name, value)
    return clone
